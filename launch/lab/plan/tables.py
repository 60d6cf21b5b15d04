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
from launch.lab.plan.times import Chip, Times
from vavae_jax.common.files import read_note, write_json

# Every published recipe, and the sizes of LightningDiT.
PUBLISHED = (
  *((f"configs/lightningdit_{name}.py", "train") for name in ("xl_64ep", "xl_800ep", "sdvae")),
  *((f"configs/lightningdit.py:{size}/1", "train") for size in ("B", "L", "1p0B", "1p6B")),
  ("configs/lightningdit_xl_64ep.py", "sample"),
  ("configs/vavae_f16d32.py", "encode"),
  ("configs/vavae_f16d32.py", "train"),  # last: these take ten minutes each on two cores
)
SOURCES = ("source", "ms", "share", "roofline ms", "GiB", "TFLOP", "runs")
OPERATIONS = ("operation", "ms", "roofline ms", "runs", "MiB", "GFLOP", "source", "where")
HEADER = ("recipe", "what", "slice", "settings", "GiB a device", "of", "gathered, reduced GiB")


def _gib(size: float) -> str:
  return f"{size / 2**30:.2f}" if size else ""


def shown(settings: Settings) -> str:
  """Changes to a configuration as flags."""
  return " ".join(f"--config.{key}={value}" for key, value in settings.items()) or "as given"


def show(topology: str, what: str, found: list[Plan], chip: Chip, largest: int = 0) -> None:
  """Prints the plans of one configuration on one slice, and of the last where its time goes.

  That is by source and, of the `largest` operations, by operation.
  """
  chosen = found[-1]
  if len(found) > 1:
    tried = [
      (shown(p.settings), "yes" if p.fits else "no", _gib(p.needed), f"{p.compile_seconds:.0f}")
      for p in found
    ]
    console.table("Tried", ("settings", "fits", "GiB", "compiled in s"), tried)
  console.table(f"{what} on {topology}", ("", ""), _rows(chosen, chip))
  if chosen.sources:
    console.table("By source, estimated", SOURCES, _sources(chosen))
  if largest:
    console.table("By operation, estimated", OPERATIONS, _operations(chosen, chip, largest))
  if not chosen.fits and len(found) == 1:
    console.say("--search looks for settings that fit.")


def _rows(chosen: Plan, chip: Chip) -> list[tuple[str, str]]:
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
  if chosen.operations:
    launched = sum(x.runs for x in chosen.operations)
    milliseconds = 1e3 * chosen.moved / chip.bandwidth
    text = f"{launched:,} runs move {_gib(chosen.moved)} GiB: {milliseconds:.1f} ms"
    rows.append(("operations", f"{text} at {chip.bandwidth / 1e12:g} TB/s"))
  if chosen.seconds:
    rows += _times(chosen, chosen.seconds)
  return [*rows, ("compiled in", f"{chosen.compile_seconds:.0f} s")]


def _times(chosen: Plan, seconds: Times) -> list[tuple[str, str]]:
  lines = {
    "compiler's estimate": seconds.compiler,
    "  Pallas kernels, as they declare": seconds.declared,
    "  collectives at the links' rate": seconds.network,
    "roofline": seconds.roofline,
    "ideal": seconds.ideal,
  }
  rows = [(name, f"{1e3 * value:,.1f} ms") for name, value in lines.items() if value]
  if seconds.compiler:
    reached = f"estimated; {seconds.ideal / seconds.estimate:.0%} of the peak"
  else:
    reached = "at the most; the compiler for GPUs gives no estimate"
  return [
    *rows,
    ("images/s", f"{chosen.images_per_second:,.0f}, {reached}"),
    ("in total", f"{chosen.hours:,.2f} hours"),
  ]


def _sources(chosen: Plan) -> list[tuple[str, ...]]:
  whole = sum(part.seconds for part in chosen.sources)
  return [
    (
      part.group,
      f"{1e3 * part.seconds:,.2f}",
      f"{part.seconds / whole:.1%}",
      f"{1e3 * part.roofline:,.2f}",
      f"{part.bytes / 2**30:,.1f}",
      f"{part.flops / 1e12:.2f}",
      f"{part.runs:,}",
    )
    for part in chosen.sources
  ]


def _operations(chosen: Plan, chip: Chip, largest: int) -> list[tuple[str, ...]]:
  found = sorted(chosen.operations, key=lambda x: -x.runs * chip.seconds(x))
  return [
    (
      f"{x.name} (declared)" if x.declared else x.name,
      f"{1e3 * x.runs * chip.seconds(x):,.2f}",
      f"{1e3 * x.runs * chip.roofline(x):,.2f}",
      f"{x.runs:,}",
      f"{x.bytes / 2**20:,.1f}",
      f"{x.flops / 1e9:,.2f}",
      x.group,
      x.source,
    )
    for x in found[:largest]
  ]


def make_table(output: Path) -> list[dict[str, Any]]:
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
      found = _search_apart(spec, what, topology)
      rows.append({"config": spec, "what": what, "topology": topology, **found})
      write_json(output, {**circumstances(), "rows": rows})
  output.with_suffix(".md").write_text(markdown_of(rows))
  return rows


def _search_apart(spec: str, what: str, topology: str) -> dict[str, Any]:
  """The last plan of a search, in a process of its own since the TPU compiler can crash."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plans.json"
    words = ["--search", f"--config={spec}", f"--what={what}", f"--topology={topology}"]
    words += [f"--output={file}"]
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
