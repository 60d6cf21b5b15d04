"""The measurements of the jobs of `launch.lab.dilemma`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict

from configs.lab import dilemma
from launch.engine.writers import curve, read_metrics
from launch.evaluation.features import SECOND
from launch.lab.dilemma import graph
from launch.lab.jobs import Job, Record


class Space(NamedTuple):
  """Measurements of one kind of tokenizer, over its seeds, and of diffusion models on its latents.

  Lists have a value for each seed that has been run.
  """

  variant: str
  shape: str  # "fPdZ"
  kl: str  # the weight
  width: int  # of the diffusion models
  figures: dict[str, list[float]]  # of reconstruction and uniformity, by tokenizer
  gaussian: dict[str, list[float]]  # of samples of a Gaussian for each class, by tokenizer
  steps: dict[int, dict[str, list[float]]]  # figures of samples after so many steps, by model

  @property
  def name(self) -> str:
    """As the configuration's."""
    return f"{self.variant}/{self.shape}/kl{self.kl}/w{self.width}"

  def last(self, figure: str) -> list[float]:
    """A figure of the last samples."""
    return self.steps[max(self.steps)].get(figure, []) if self.steps else []


class Results:
  """Measurements of the jobs of an experiment that are done as they are defined now."""

  def __init__(self, config: FrozenConfigDict, workdir: Path, jobs: Sequence[Job]):
    self.config, self.workdir, self.jobs = config, workdir, jobs
    self.record = Record(workdir, jobs)
    self.name = f"FD-{dilemma.judge(config.size).name}"
    self.key = self.name.lower().replace("-", "_")
    self.second_key = f"{SECOND}{self.key}2"
    self._done = {job.name for job in jobs if self.record.is_done(job)}

  def read(self, job: str) -> dict[str, Any]:
    """The results of a job; empty if there are none."""
    path = self.workdir / f"{job}.json"
    return json.loads(path.read_text()) if job in self._done else {}

  def logged(self, job: str, name: str) -> float | None:
    """The last value that a training has logged."""
    if job not in self._done:
      return None
    points = curve(read_metrics(self.workdir / job), name)
    return points[-1][1] if points else None

  def sheet(self, space: str) -> Path | None:
    """The picture of the last samples of a space, of the first seeds."""
    name = f"curve/{space}/seed{self.config.tokenizer_seeds[0]}.{self.config.seeds[0]}"
    sheets = self.read(name).get("sheets")
    path = (self.workdir / name).parent / sheets[-1] if sheets else None
    return path if path and path.is_file() else None

  def spaces(self) -> list[Space]:
    """All spaces of the experiment."""
    return [self._space(name) for name in (*self.config.spaces, *self.config.more_spaces)]

  def _space(self, space: str) -> Space:
    variant, shape, kl, width = space.split("/")
    firsts = [f"{graph.tokenizer_of(space)}/seed{seed}" for seed in self.config.tokenizer_seeds]
    runs = [
      f"{space}/seed{first}.{seed}"
      for first in self.config.tokenizer_seeds
      for seed in self.config.seeds
    ]
    figures: dict[str, list[float]] = {}
    for first in firsts:
      found = self.read(f"reconstruction/{first}").get("figures", {})
      found |= self.read(f"uniformity/{first}").get("figures", {})
      cosine = self.logged(f"tokenizer/{first}", "reconstruction/teacher_cosine")
      _gather(figures, found | ({} if cosine is None else {"teacher_cosine": cosine}))
    gaussian: dict[str, list[float]] = {}
    for first in firsts:
      _gather(gaussian, self.read(f"gaussian/{first}").get("figures", {}))
    steps: dict[int, dict[str, list[float]]] = {}
    for run in runs:
      for point in self.read(f"curve/{run}").get("points", []):
        _gather(steps.setdefault(point["step"], {}), point)
    return Space(variant, shape, kl[2:], int(width[1:]), figures, gaussian, steps)


def _gather(lists: dict[str, list[float]], figures: dict[str, float | None]) -> None:
  for name, value in figures.items():
    if value is not None:
      lists.setdefault(name, []).append(value)


def mean(values: Sequence[float]) -> float | None:
  """None of no values."""
  return float(np.mean(values)) if values else None
