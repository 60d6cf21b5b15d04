"""What the jobs of `launch.lab.equivalence training` have found, for its page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.lab.equivalence.pieces import Settings, losses_of
from launch.lab.jobs import Job, Record
from lightningdit_jax import validation
from vavae_jax.weights.state_dicts import read_content

SIDES = ("theirs", "ours")
# Fed trainings that are compared with the reference's.
FED = ("ours", "threads", "to_ours", "to_theirs")
LAST = 500  # steps whose loss is averaged
Series = Sequence[tuple[int, float]]
Tensors = Mapping[str, np.ndarray]


class Results:
  """What the jobs have written; parts that are not there yet are left out."""

  def __init__(self, settings: Settings, jobs: Sequence[Job]):
    self.settings, self.jobs, self.root = settings, jobs, settings.root
    self.record = Record(self.root, jobs)
    self._done = {job.name for job in jobs if self.record.is_done(job)}

  def has(self, name: str) -> bool:
    """Whether a job is done."""
    return name in self._done

  def note(self, name: str) -> Any:
    """The JSON that a job has written."""
    (job,) = (job for job in self.jobs if job.name == name)
    return json.loads(job.output.read_text())

  def seeds(self, side: str) -> list[int]:
    """Those whose training is done."""
    return [x for x in self.settings.experiment.seeds if self.has(f"{side}/seed{x}")]

  def losses(self, side: str) -> np.ndarray:
    """[seeds, lines] of the training losses."""
    found = [dict(losses_of(self.root / f"{side}/seed{x}")) for x in self.seeds(side)]
    return np.array([list(each.values()) for each in found])

  def judged(self, training: str, side: str) -> Any:
    """The figures of a training's weights by a side, or None."""
    name = f"judged/{training.replace('/', '_')}_by_{side}"
    return self.note(name) if self.has(name) else None

  def samples(self, training: str, side: str) -> Tensors:
    """The samples of a training's weights by a side, "plain" and "guided"."""
    path = self.root / f"judged/{training.replace('/', '_')}_by_{side}.npz"
    with np.load(path) as file:
      return {name: file[name] for name in file.files}

  def parameters(self, fed: str, step: int) -> dict[str, np.ndarray]:
    """Those of a fed training after a step, by the reference's names."""
    with np.load(self.root / "fed" / fed / f"{step}.npz") as file:
      return {name: file[name] for name in file.files if name != "pos_embed"}


def distances(found: Results) -> dict[str, list[tuple[int, float]]]:
  """By `FED` name and "moved", the norm of the difference of all parameters to the reference's own
  fed training, or of that one's to the initial ones, in units of the norm.
  """
  if not found.has("fed/theirs"):
    return {}
  steps = found.settings.snapshots
  series: dict[str, list[tuple[int, float]]] = {"moved": []}
  first = read_content(found.root / "initial.pt")
  for step in steps:
    right = found.parameters("theirs", step)
    series["moved"].append((step, relative(right, first)))
    for name in FED:
      file = found.root / "fed" / name / f"{step}.npz"
      if found.has(f"fed/{name}") and file.is_file():
        both = found.parameters(name, step), right
        series.setdefault(name, []).append((step, relative(*both)))
  return series


def relative(left: Tensors, right: Tensors) -> float:
  """The norm of the difference of all tensors of `left`, in units of that of `right`."""

  def norm(arrays: Iterable[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays)))

  return norm(x - right[name] for name, x in left.items()) / norm(right[name] for name in left)


def figures(found: Results) -> dict[str, dict[str, np.ndarray]]:
  """By figure and side, the value of each seed by its own side's code."""
  rows: dict[str, dict[str, np.ndarray]] = {}
  for side in SIDES:
    seeds = [x for x in found.seeds(side) if found.judged(f"{side}/seed{x}", side)]
    judged = [found.judged(f"{side}/seed{x}", side) for x in seeds]
    losses = found.losses(side)
    if not len(losses):
      continue
    lines = max(1, LAST // found.settings.config.log_every_steps)
    named = {"training loss": losses.mean(1)}
    named[f"training loss, last {LAST} steps"] = losses[:, -lines:].mean(1)
    rows |= {name: rows.get(name, {}) | {side: values} for name, values in named.items()}
    if not judged:
      continue
    named, mse = {}, np.array([each["mse"] for each in judged])
    named["validation loss"] = mse.mean(1)
    for i, t in enumerate(validation.times(found.settings.config)):
      named[f"validation loss, t = {t:.4f}"] = mse[:, i]
    named["validation cosine loss"] = np.array([np.mean(each["cosine"]) for each in judged])
    named["norm of the average"] = np.array([each["norm"] for each in judged])
    for name, kind in (("FD", "plain"), ("FD, guided", "guided")):
      named[name] = np.array([each[kind] for each in judged])
    rows |= {name: rows.get(name, {}) | {side: values} for name, values in named.items()}
  return rows
