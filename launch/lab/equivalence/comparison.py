"""Runs a model on both sides and compares their arrays: rows, a summary, sections of a page."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.engine import console
from launch.lab.equivalence.cases import TRAINED, Arrays, Case, Settings, make_case
from launch.lab.torch_process import SCRIPTS, TorchProcess
from launch.report.charts import Curve, line_chart
from launch.report.html import Section, table
from launch.weights.recognition import recognise
from vavae_jax.common.errors import InputError
from vavae_jax.weights.state_dicts import read_content, read_state_dict
from vavae_jax.weights.torch_writer import write_torch_file

NEEDS = (
  "torch, timm, einops, numpy, pillow; for fid_inception also torch-fidelity (pip install "
  "--no-deps)"
)
# The largest difference allowed, in units of the largest number of the reference's array. Rounding
# in float32 grows with depth; Adam divides by the root of squares that may be tiny.
TOLERANCES = {
  **dict.fromkeys(("layer", "output", "mean", "logvar", "loss"), 1e-4),
  **dict.fromkeys(("gradient", "parameter", "trajectory"), 1e-3),
}
BFLOAT16_TOLERANCE = 0.1
# Of models with kinks: the root mean square that ties of max pools and hinges cause.
KINKED_TOLERANCE = 5e-3
KINKED_GROUPS = ("gradient", "parameter")
HEADER = ("what", "n", "relative", "rms", "where", "limit", "holds")


@dataclasses.dataclass(frozen=True)
class Row:
  """The difference between an array of ours and the reference's."""

  group: str  # a key of `TOLERANCES`
  name: str  # the reference's
  dtype: str  # of matrix products
  max_abs: float
  relative: float  # the largest difference in units of the reference's largest number
  rms: float  # norm of all differences in units of the norm of the reference's array
  tolerance: float  # upper limit of `judged`
  kinked: bool = False  # see `cases.Case`

  @property
  def holds(self) -> bool:
    """Whether the difference is within the limit; a NaN is not."""
    return self.judged <= self.tolerance

  @property
  def judged(self) -> float:
    """The difference that the limit is for."""
    return self.rms if self.kinked and self.group in KINKED_GROUPS else self.relative

  def to_dict(self) -> dict[str, Any]:
    """For JSON, which has no NaN."""
    fields = dataclasses.asdict(self) | {"holds": self.holds}
    odd = {k: str(v) for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
    return fields | odd


def summary(rows: list[Row]) -> list[list[str]]:
  """For each dtype and group the number of arrays, and the difference and name of the worst."""
  groups: dict[str, list[Row]] = {}
  for row in rows:
    groups.setdefault(f"{row.dtype} {row.group}", []).append(row)
  lines = []
  for name, of_group in groups.items():
    # A NaN is the worst.
    worst = max(of_group, key=lambda row: np.nan_to_num(row.judged / row.tolerance, nan=np.inf))
    numbers = [f"{worst.relative:.1e}", f"{worst.rms:.1e}", worst.name, f"{worst.tolerance:.0e}"]
    holds = "yes" if all(row.holds for row in of_group) else "NO"
    lines.append([name, str(len(of_group)), *numbers, holds])
  return lines


def sections(rows: list[Row], about: Mapping[str, Any]) -> list[Section]:
  """Of the page: a chart of the difference by layer, the summary, every array, how it was made."""
  layers: dict[str, list[tuple[int, float]]] = {}
  for row in rows:
    if row.group == "layer":
      points = layers.setdefault(row.dtype, [])
      points.append((len(points), row.relative))
  curve = Curve("Difference by layer", "largest relative", layers, log_y=True, x_label="layer")
  every = [
    [row.dtype, row.group, row.name, *(f"{x:.3e}" for x in (row.max_abs, row.relative, row.rms))]
    for row in rows
  ]
  header = ("dtype", "what", "name", "abs", "relative", "rms")
  facts = [[name, str(value)] for name, value in about.items()]
  return [
    Section("Layers", "", [line_chart(curve)]),
    Section("Summary", "The worst array of each kind.", [table(HEADER, summary(rows))]),
    Section("Every array", "", [table(header, every)]),
    Section("Run", "", [table(("what", "value"), facts)]),
  ]


def compare(settings: Settings) -> tuple[list[Row], dict[str, str]]:
  """Runs both sides; returns rows in the order of computation, and facts about the PyTorch side.

  Raises InputError without a checkout or PyTorch, or for weights of another model.
  """
  settings.checkouts.check()
  case = make_case(settings)
  dtypes = [dtype for dtype in case.dtypes if dtype in settings.dtypes]
  if not dtypes:
    raise InputError(
      f"{settings.model} is compared in {', '.join(case.dtypes)}, not in "
      f"{', '.join(settings.dtypes)}; leave --dtypes away."
    )
  rows: list[Row] = []
  about: dict[str, str] = {}
  with tempfile.TemporaryDirectory() as folder:
    files = ("inputs.npz", "outputs.npz", "weights.pt")
    paths = {file.partition(".")[0]: f"{folder}/{file}" for file in files}
    np.savez(paths["inputs"], **case.inputs)
    if settings.checkpoint:
      about |= _write_weights(settings, case, paths["weights"])
    for dtype in dtypes:
      checkout = str(settings.reference.absolute())
      job = case.job | paths | {"checkout": checkout, "seed": settings.seed, "dtype": dtype}
      console.say(f"the reference in PyTorch, {dtype}")
      with TorchProcess(settings.torch_python, SCRIPTS / "layers.py", job, NEEDS) as process:
        about |= process.about
      console.say(f"this project, {dtype}")
      ours = case.run(read_state_dict(paths["weights"]), dtype)
      with np.load(paths["outputs"]) as theirs:
        rows += _rows(ours, theirs, dtype, case)
  return rows, about


def _write_weights(settings: Settings, case: Case, path: str) -> dict[str, str]:
  """Writes the weights of --checkpoint for the PyTorch side; returns what they are."""
  if settings.model in TRAINED:  # together with the loss and the teacher, which none recognises
    write_torch_file(path, read_state_dict(settings.checkpoint))
    return {}
  found = recognise(read_content(settings.checkpoint))
  what = f"{found.kind} {found.name}".strip()
  if case.weights not in (what, found.kind):
    raise InputError(
      f"{settings.checkpoint} is a {what}, and --model={settings.model} needs a {case.weights}."
    )
  write_torch_file(path, found.tensors)
  return {"weights": f"{settings.checkpoint}: {what}"}


def _rows(ours: Arrays, theirs: Mapping[str, np.ndarray], dtype: str, case: Case) -> list[Row]:
  """Pairs the arrays; a layer of the reference also has a name behind its number."""
  keys = {"/".join(k.split("/")[:2]) if k.startswith("layer/") else k: k for k in theirs}
  if missing := sorted(ours.keys() ^ keys.keys()):
    raise InputError(
      f"The two sides compute different things: {', '.join(missing[:8])} is on one of them only. "
      "If the other side has no torchdiffeq, give --trajectory=0."
    )
  rows = []
  for key, full in keys.items():
    if full.endswith(case.rounding):
      continue
    actual, expected = np.asarray(ours[key], np.float32), theirs[full]
    if actual.shape != expected.shape:
      raise InputError(f"{full} has shape {expected.shape} there and {actual.shape} here.")
    difference = actual - expected
    max_abs = float(np.abs(difference).max())
    relative = max_abs / max(float(np.abs(expected).max()), 1e-30)
    rms = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected)), 1e-30)
    group, _, name = full.partition("/")
    tolerance = TOLERANCES[group] if dtype == "float32" else BFLOAT16_TOLERANCE
    if case.kinked and group in KINKED_GROUPS:
      tolerance = KINKED_TOLERANCE
    rows.append(Row(group, name, dtype, max_abs, relative, rms, tolerance, case.kinked))
  return rows
