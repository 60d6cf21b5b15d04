"""A stored baseline of ratios, and whether a measurement still has them.

A ratio is that of a rate to a matrix product's in the same run, or of our time to the reference's;
the bytes of a compiled program are kept, too. These hold on any machine of a kind, seconds do not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from launch.engine import command_line, console
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json

FLAGS = flags.FLAGS
Row = dict[str, Any]
# Ratio -> whether more of it is better.
RATIOS = {"share_of_matmul": True, "times_torch": True, "program_gib": False}
_NAMES = ("config", "device", "what", "attention", "dtype", "batch_size")


class Change(NamedTuple):
  """A ratio that two measurements have."""

  name: str  # of the measurement
  ratio: str  # one of `RATIOS`
  before: float
  now: float
  loss: float  # the share by which it is worse now; below 0 if it is better


def ratios_of(result: dict[str, Any]) -> list[Row]:
  """The rows of a result of `benchmark steps` that have a ratio or ran out of memory.

  "config" is the configuration as the command line gave it.
  """
  # The name of a CPU device does not say which processor it is, and ratios hold for no other.
  kind = f", {result['processor']}" if result["device"].endswith(" cpu") else ""
  about = {"config": result["asked"], "device": result["device"] + kind, "commit": result["commit"]}
  rows = []
  for row in result["rows"]:
    found = {name: float(f"{row[name]:.4g}") for name in RATIOS if row.get(name)}
    if row.get("out_of_memory"):
      found["program_gib"] = math.inf
    if found:
      rows.append({**about, **{k: row[k] for k in _NAMES if k in row}, **found})
  return rows


def read(path: Path) -> list[Row]:
  """The rows of a baseline; InputError if it is none."""
  try:
    rows = json.loads(path.read_text())["ratios"]
    if not all(isinstance(row, dict) and "config" in row for row in rows):
      raise ValueError("rows without a configuration")
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise InputError(f"{path} is not a baseline that --update wrote ({error}).") from error
  return rows


def update(path: Path, rows: list[Row]) -> None:
  """Puts rows into a baseline, new or not; one that ran out of memory replaces none."""
  kept = {_name(row): row for row in (read(path) if path.exists() else [])}
  kept |= {_name(row): row for row in rows if math.inf not in row.values()}
  write_json(path, {"ratios": [kept[name] for name in sorted(kept)]})


def changes(rows: list[Row], before: list[Row]) -> list[Change]:
  """The ratios that both have; for `rows` see `ratios_of`."""
  known = {_name(row): row for row in before}
  found = []
  for row in rows:
    old = known.get(_name(row), {})
    for ratio, more_is_better in RATIOS.items():
      if ratio in row and ratio in old:
        share = row[ratio] / old[ratio] if more_is_better else old[ratio] / row[ratio]
        found.append(Change(_name(row), ratio, old[ratio], row[ratio], 1 - share))
  return found


def define_flags() -> None:
  """Defines the flags of `settle`."""
  flags.DEFINE_string("compare", "", "A baseline of ratios, such as docs/lab/baseline.json.")
  text = "How much worse than the baseline a ratio may be."
  flags.DEFINE_float("tolerance", 0.15, text, lower_bound=0)
  command_line.define_output("update", None, "A baseline that receives these ratios.")


def check_flags() -> None:
  """Raises InputError before anything is measured, if --compare names no baseline."""
  if FLAGS.compare:
    read(Path(FLAGS.compare))


def settle(rows: list[Row]) -> None:
  """Does what --compare and --update say; raises InputError as `check` does."""
  if FLAGS.compare:
    check(rows, Path(FLAGS.compare), FLAGS.tolerance)
  if FLAGS.update:
    update(FLAGS.update, rows)
    console.say(f"ratios kept in {FLAGS.update}")


def check(rows: list[Row], path: Path, tolerance: float) -> None:
  """Shows changes against a baseline; InputError if one is worse by more than the tolerance.

  Also if the baseline has none of these measurements.
  """
  found = changes(rows, read(path))
  if not found:
    raise InputError(f"{path} has none of these measurements; --update={path} adds them.")
  cells = [
    (x.name, x.ratio, console.number(x.before), console.number(x.now), f"{-x.loss:+.1%}")
    for x in found
  ]
  console.table(f"against {path}", ("what", "ratio", "before", "now", "better by"), cells)
  worse = [change for change in found if change.loss > tolerance]
  if worse:
    losses = "; ".join(f"{x.ratio} of {x.name} by {x.loss:.1%}" for x in worse)
    raise InputError(f"Worse than {path} by more than {tolerance:.0%}: {losses}.")


def _name(row: Row) -> str:
  return ", ".join(str(row[key]) for key in _NAMES if key in row)
