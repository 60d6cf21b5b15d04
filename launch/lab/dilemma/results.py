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
from launch.lab.jobs import Job, Record


def seeds_of(config: FrozenConfigDict, variant: str) -> tuple[int, ...]:
  """The seeds of the diffusion models on a tokenizer's latents."""
  return config.seeds if variant in dilemma.MAIN else config.ablation_seeds


class Space(NamedTuple):
  """Measurements of one tokenizer and of the diffusion models on its latents."""

  variant: str
  width: int  # channels
  figures: dict[str, float]  # of reconstruction and uniformity
  distances: list[float]  # of each seed's samples
  guided: list[float]  # likewise, with guidance
  mse: list[float]  # validation losses of the seeds
  steps: list[tuple[int, float]]  # (step, distance) of the first seed

  @property
  def distance(self) -> float | None:
    """The mean over the seeds."""
    return float(np.mean(self.distances)) if self.distances else None


class Results:
  """Measurements of the jobs of an experiment that are done as they are defined now."""

  def __init__(self, config: FrozenConfigDict, workdir: Path, jobs: Sequence[Job]):
    self.config, self.workdir, self.jobs = config, workdir, jobs
    self.record = Record(workdir, jobs)
    self.name = f"FD-{dilemma.judge(config.size).name}"
    self.widest = max(config.widths)
    self._key = self.name.lower().replace("-", "_")
    self._done = {job.name for job in jobs if self.record.is_done(job)}

  def read(self, job: str) -> dict[str, Any]:
    """The results of a job; empty if there are none."""
    path = self.workdir / f"{job}.json"
    return json.loads(path.read_text()) if job in self._done else {}

  def figure(self, job: str, name: str) -> float | None:
    """The last value that a training has logged."""
    if job not in self._done:
      return None
    points = curve(read_metrics(self.workdir / job), name)
    return points[-1][1] if points else None

  def space(self, variant: str, width: int) -> Space:
    """A tokenizer with all its diffusion models."""
    return self._of(variant, width, [f"seed{seed}" for seed in seeds_of(self.config, variant)])

  def longer(self, variant: str) -> Space:
    """A tokenizer of the widest latents with its diffusion model of more steps."""
    steps = dilemma.diffusion(self.config.size, self.widest, long=True).num_steps
    found = self._of(variant, self.widest, [dilemma.LONG])
    return found._replace(variant=f"{variant}, {steps:,} steps")

  def sheet(self, kind: str, space: Space) -> Path | None:
    """The picture of the samples of a space, of the first seed."""
    name = f"{kind}/{space.variant}/d{space.width}/seed{self.config.seeds[0]}"
    path = self.workdir / f"{name}.png"
    return path if name in self._done and path.is_file() else None

  def _of(self, variant: str, width: int, names: Sequence[str]) -> Space:
    space = f"{variant}/d{width}"
    runs = [f"{space}/{name}" for name in names]

    def distances(kind: str) -> list[float]:
      found = [self.read(f"{kind}/{run}") for run in runs]
      return [x["figures"][self._key] for x in found if x]

    uniformity = self.read(f"uniformity/{space}")
    spread = uniformity.get("standard_deviation_over_runs", {})
    figures = self.read(f"reconstruction/{space}").get("figures", {})
    figures |= uniformity.get("figures", {}) | {f"{k}_std": v for k, v in spread.items()}
    cosine = self.figure(f"tokenizer/{space}", "reconstruction/teacher_cosine")
    if cosine is not None:
      figures["teacher_cosine"] = cosine
    losses = [self.figure(f"diffusion/{run}", "validation/mse") for run in runs]
    points = self.read(f"curve/{runs[0]}").get("points", [])
    return Space(
      variant,
      width,
      {name: value for name, value in figures.items() if value is not None},
      distances("samples"),
      distances("guided"),
      [loss for loss in losses if loss is not None],
      [(point["step"], point[self._key]) for point in points],
    )
