"""Plans as tables: of one program on the terminal, of all published recipes in a file."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from launch.engine import console
from launch.engine.circumstances import circumstances
from launch.lab import markdown
from launch.lab.plan import hlo, slices
from launch.lab.plan.planning import Plan, Settings
from vavae_jax.common.files import read_note, write_json

# Every published recipe, and the sizes of LightningDiT.
PUBLISHED = (
  *((f"configs/lightningdit_{name}.py", "train") for name in ("xl_64ep", "xl_800ep", "sdvae")),
  *((f"configs/lightningdit.py:{size}/1", "train") for size in ("B", "L", "1p0B", "1p6B")),
  ("configs/lightningdit_xl_64ep.py", "sample"),
  ("configs/vavae_f16d32.py", "encode"),
  ("configs/vavae_f16d32.py", "train"),  # last: these take ten minutes each on two cores
)
HEADER = ("recipe", "what", "slice", "settings", "GiB a device", "of", "gathered, reduced GiB")


def _gib(size: float) -> str:
  return f"{size / 2**30:.2f}" if size else ""


def shown(settings: Settings) -> str:
  """Changes to a configuration as flags."""
  return " ".join(f"--config.{key}={value}" for key, value in settings.items()) or "as given"


def show(topology: str, what: str, found: list[Plan], mfu: float, largest: int = 0) -> None:
  """Prints the plans of one configuration on one slice, with the `largest` kernels of the last."""
  chosen = found[-1]
  if len(found) > 1:
    tried = [
      (shown(p.settings), "yes" if p.fits else "no", _gib(p.needed), f"{p.compile_seconds:.0f}")
      for p in found
    ]
    console.table("Tried", ("settings", "fits", "GiB", "compiled in s"), tried)
  console.table(f"{what} on {topology}", ("", ""), _rows(chosen, mfu))
  if largest:
    cells = [
      (x.name, f"{x.runs:,}", f"{x.bytes / 2**20:,.1f}", _gib(x.runs * x.bytes), x.operation)
      for x in chosen.kernels[:largest]
    ]
    header = ("kernel", "runs", "MiB", "GiB", "operation")
    console.table("Kernels that move the most bytes", header, cells)
  if not chosen.fits and len(found) == 1:
    console.say("--search looks for settings that fit.")


def _rows(chosen: Plan, mfu: float) -> list[tuple[str, str]]:
  verdict = "fits" if chosen.fits else "DOES NOT FIT"
  rows = [
    (
      "verdict",
      f"{verdict}, says the compiler; all parts {_gib(chosen.needed) or '?'} GiB, a device has "
      f"{_gib(chosen.available)}",
    ),
    ("settings", shown(chosen.settings)),
    ("mesh, data x fsdp", chosen.mesh),
  ]
  rows += [(f"  {name}", f"{_gib(size) or '0.00'} GiB") for name, size in chosen.parts.items()]
  rows += [
    (kind, f"{t.runs} runs of {t.ops} operations, {_gib(t.bytes)} GiB")
    for kind, t in chosen.traffic.items()
  ]
  work = f"{chosen.flops / 1e12:.2f} TFLOP a device and run"
  rows.append(("work", f"{work}, {chosen.computed / 1e12:.2f} with recomputation"))
  if chosen.kernels:
    launched = sum(x.runs for x in chosen.kernels)
    milliseconds = 1e3 * chosen.moved / chosen.bandwidth
    text = f"{launched:,} runs move {_gib(chosen.moved)} GiB: {milliseconds:.1f} ms"
    rows.append(("kernels", f"{text} at {chosen.bandwidth / 1e12:g} TB/s"))
  if chosen.fits:
    rows.append((f"at {mfu:.0%} of the peak", f"{chosen.images_per_second:,.0f} images/s"))
    rows.append(("in total", f"{chosen.hours:,.1f} hours"))
  return [*rows, ("compiled in", f"{chosen.compile_seconds:.0f} s")]


def make_table(output: Path, mfu: float) -> list[dict[str, Any]]:
  """Plans of every published recipe on every slice.

  The JSON file `output` is written after each; the plans that it has already are kept.
  """
  rows = read_note(output, rows=list)["rows"] if output.is_file() else []
  done = {(row["config"], row["what"], row["topology"]) for row in rows}
  wanted = [
    (spec, what, f"{chip}:{sides}")
    for spec, what in PUBLISHED
    for chip, shapes in slices.SLICES.items()
    for sides in shapes
  ]
  for spec, what, topology in console.tracked(wanted, "plans", len(wanted)):
    if (spec, what, topology) not in done:
      found = _search_apart(spec, what, topology, mfu)
      rows.append({"config": spec, "what": what, "topology": topology, **found})
      write_json(output, {**circumstances(), "mfu": mfu, "rows": rows})
  output.with_suffix(".md").write_text(markdown_of(rows))
  return rows


def _search_apart(spec: str, what: str, topology: str, mfu: float) -> dict[str, Any]:
  """The last plan of a search, in a process of its own since the TPU compiler can crash."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plans.json"
    words = ["--search", f"--config={spec}", f"--what={what}", f"--topology={topology}"]
    words += [f"--mfu={mfu}", f"--output={file}"]
    done = subprocess.run(
      [sys.executable, "-m", "launch.lab.plan", *words], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
      return json.loads(file.read_text())["plans"][-1]
  if done.returncode < 0:
    return {"error": f"the compiler crashed (signal {-done.returncode})"}
  return {"error": done.stderr.strip().splitlines()[-1].removeprefix("error: ")}


def markdown_of(rows: list[dict[str, Any]]) -> str:
  """The table of docs/lab/tpu.md."""
  cells = []
  for row in rows:
    name = row["config"].removeprefix("configs/").replace(".py", "")
    head = [name, row["what"], row["topology"]]
    if "error" in row:
      cells.append([*head, row["error"], *[""] * 4])
      continue
    changes = shown(row["settings"]).replace("--config.", "")
    moved = [row["traffic"].get(kind, {}).get("bytes", 0) / 2**30 for kind in hlo.KINDS[:2]]
    memory = [f"{row[key] / 2**30:.1f}" for key in ("needed", "available")]
    head.append(changes if row["fits"] else "no setting that was tried fits")
    hours = f"{row['hours']:,.1f}" if row["fits"] else ""
    cells.append([*head, *memory, ", ".join(f"{x:.1f}" for x in moved), hours])
  return "\n".join(markdown.table((*HEADER, "hours"), cells)) + "\n"
