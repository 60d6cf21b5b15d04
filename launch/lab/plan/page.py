"""The page of TPU slices: recipes on each, and published speeds beside estimates."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import jax

from launch.engine import console
from launch.engine.circumstances import circumstances, commit
from launch.lab import markdown
from launch.lab.plan import calibration, slices, tables
from vavae_jax.common.files import read_note, write_json

REGION = markdown.Region(
  "<!-- plans: written by launch.lab.plan -->", "<!-- end of the plans -->", "TPU slices"
)
XL = "configs/lightningdit_xl_64ep.py"
VAVAE = "configs/vavae_f16d32.py"
# The rest of the published sizes; the recipes of 800 epochs and on the SD-VAE have XL/1's step.
OTHERS = tuple(f"configs/lightningdit.py:{size}/1" for size in ("B", "L", "1p0B", "1p6B"))
# What goes beyond the paper; the last takes a core up to an hour for each slice.
BEYOND = tuple(
  f"configs/{name}"
  for name in (
    *("lightningdit_xl_internal_guidance.py", "lightningdit_xl_dmf.py", "tread.py"),
    *("autoguidance.py:guide", "no_pod.py", "vtp.py", "eqvae.py:vavae"),
  )
)
ASKED = ("v5e", "v5p", "v6e")
HEADER = (
  *("recipe", "what", "slice", "settings", "GiB a device", "of", "estimate, ms", "roofline, ms"),
  *("ideal, ms", "of the ideal", "images/s", "hours"),
)
HELD = ("run", "slice", "published", "compiler", "times as long", "roofline", "times as long")
Row = dict[str, Any]


def wanted() -> list[tuple[str, str, str]]:
  """(configuration or published run, what, slice), what a reader most wants first."""
  pods, hosts = ([f"{chip}:{x[i]}" for chip, x in slices.SLICES.items()] for i in (0, 1))
  return [
    *((XL, "train", pod) for pod in pods),
    *((key, "published", run.topology) for key, run in calibration.RUNS.items()),
    *((XL, "fid50k", pod) for pod in pods),
    *((VAVAE, what, pod) for what in ("train", "encode") for pod in pods),
    *((XL, "train", host) for host in hosts),
    *((other, "train", pod) for other in OTHERS for pod in pods),
    *((other, "train", pod) for other in BEYOND for pod in pods if pod.startswith(ASKED)),
  ]


def make(output: Path, page: Path | None, workers: int = 1) -> None:
  """Plans all that is wanted, `workers` at once; what `output` has already is kept.

  The JSON file `output`, and of a page its region, are written after each. A row names the commit
  at which it was made, and jax; one that failed for want of something here is made again.
  """
  there = read_note(output, rows=list, jax=str) if output.is_file() else {"rows": []}
  rows = [{"jax": there["jax"], **row} for row in there["rows"] if not row.get("again")]
  about = circumstances()
  if page:
    REGION.check(page)
  order = {name: place for place, name in enumerate(wanted())}
  rows = [row for row in rows if _name(row) in order]
  missing = [name for name in order if name not in map(_name, rows)]
  with ThreadPoolExecutor(workers) as pool:
    running = {pool.submit(_apart, *name): name for name in missing}
    try:
      for done in console.tracked(as_completed(running), "plans", len(running)):
        name = dict(zip(("config", "what", "topology"), running[done], strict=True))
        rows = sorted([*rows, name | done.result()], key=lambda row: order[_name(row)])
        write_json(output, {**about, "rows": rows})
        if page:
          REGION.write(page, lines_of(rows, about))
    finally:
      pool.shutdown(cancel_futures=True)
  if page and not missing:
    REGION.write(page, lines_of(rows, read_note(output)))


def _name(row: Row) -> tuple[str, str, str]:
  return row["config"], row["what"], row["topology"]


def _apart(spec: str, what: str, topology: str) -> Row:
  """A plan by a process of its own, since the TPU compiler can crash."""
  made: Row = {"commit": commit(), "jax": jax.__version__}
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plans.json"
    words = [f"--topology={topology}", f"--output={file}"]
    if what == "published":
      words.append(f"--published={spec}")
    else:
      words += ["--search", f"--config={spec}", f"--what={what}"]
    done = subprocess.run(
      [sys.executable, "-m", "launch.lab.plan", *words], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
      found = json.loads(file.read_text())
      return made | {"plans": [_slim(plan) for plan in found["plans"]]}
  if done.returncode == -signal.SIGKILL:  # the system's for want of memory
    return made | {"error": "killed, as is done for want of memory", "again": True}
  if done.returncode < 0:
    return made | {"error": f"the compiler crashed (signal {-done.returncode})"}
  lines = done.stderr.strip().splitlines()
  # Messages of XLA go on below the line that names the error.
  told = [line for line in lines if re.match(r"error: |[\w.]+Error: ", line)]
  more = {"again": True} if done.returncode == 2 else {}  # such as libtpu, which is not installed
  return made | {"error": (told or lines)[-1].removeprefix("error: ")} | more


def _slim(plan: Row) -> Row:
  return {name: value for name, value in plan.items() if name != "operations"}


def lines_of(rows: list[Row], about: dict[str, str]) -> list[str]:
  """The lines of the page's region; a column has the commits of the rows where they differ."""
  plans = [row for row in rows if row["what"] != "published"]
  held = [row for row in rows if row["what"] == "published"]
  commits = {row["commit"] for row in rows}
  several = len(commits) > 1
  versions = ", ".join(sorted({row.get("jax", about["jax"]) for row in rows}))
  made = "each row at the commit that it names" if several else f"commit {commits.pop()}"

  def table(header: tuple[str, ...], lines: Iterable[tuple[Row, list[str]]]) -> list[str]:
    more = ("commit",) if several else ()
    cells = ([*cells, *([row["commit"]] if several else [])] for row, cells in lines)
    return [*markdown.table((*header, *more), cells), ""]

  return [
    f"Compiled with jax {versions}, {made}, {about['date']}: `{about['command']}`.",
    "",
    *table(HEADER, ((row, cells) for row in plans for cells in _cells(row))),
    *_by_source([row for row in plans if row["config"] == XL and row["what"] == "train"]),
    "### Published speeds and what is estimated for them",
    "",
    *table(HELD, ((row, _held(row)) for row in held)),
  ]


def _cells(row: Row) -> Iterable[list[str]]:
  name = row["config"].removeprefix("configs/").replace(".py", "")
  if "error" in row:
    yield [name, row["what"], row["topology"], row["error"], *[""] * 8]
    return
  for plan in row["plans"] if row["what"] == "fid50k" else row["plans"][-1:]:
    changes = tables.shown(plan["settings"]).replace("--config.", "")
    yield [
      *(name, plan.get("what", row["what"]), row["topology"]),
      changes if plan["fits"] else "no setting that was tried fits",
      *(f"{plan[key] / 2**30:.1f}" if plan[key] else "" for key in ("needed", "available")),
      *_speeds(plan),
    ]


def _speeds(plan: Row) -> list[str]:
  seconds = plan["seconds"]
  if not seconds:
    return [""] * 6
  estimate = seconds["compiler"] + seconds["kernels"] + seconds["network"]
  times = (estimate, seconds["roofline"], seconds["ideal"])
  return [
    *(f"{1e3 * value:,.1f}" for value in times),
    f"{seconds['ideal'] / estimate:.0%}",
    f"{plan['images_per_second']:,.0f}",
    f"{plan['hours']:,.2f}",
  ]


def _by_source(rows: list[Row]) -> list[str]:
  """Where the time of one recipe goes, by slice."""
  plans = {row["topology"]: row["plans"][-1] for row in rows if "plans" in row}
  found = {
    pod: {part["group"]: part["seconds"] for part in plan["sources"]}
    | {"collectives": plan["seconds"]["network"]}  # where older rows have 0
    for pod, plan in plans.items()
    if plan["fits"]
  }
  if not found:
    return []
  groups = sorted(
    {group for parts in found.values() for group in parts},
    key=lambda group: -max(parts.get(group, 0.0) for parts in found.values()),
  )
  cells = [
    [group, *(f"{1e3 * parts.get(group, 0.0):,.1f}" for parts in found.values())]
    for group in groups
  ]
  title = "### Where the time of a training step of XL/1 goes, in estimated ms"
  return [title, "", *markdown.table(("source", *found), cells), ""]


def _held(row: Row) -> list[str]:
  if "error" in row:
    return [row["config"], row["topology"], row["error"], *[""] * 4]
  (held,) = row["plans"]
  return [
    f"[{held['name']}]({held['address']})",
    row["topology"],
    f"{held['published']:.0f} TFLOP/s",
    *(
      text
      for rate in (held["estimated"], held["roofline"])
      for text in (f"{rate:.0f}", f"{held['published'] / rate:.2f}")
    ),
  ]
