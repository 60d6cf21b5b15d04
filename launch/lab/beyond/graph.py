"""The jobs of `launch.lab.beyond`: those of the dilemma for judges and latents, then a row's each.

Jobs of a row are KIND/beyond/ROW/seedS, with /equal_time for figures at equal time. Some follow
from the results of others: the checkpoint of a row that had as much time as the baseline, and the
row of all options that win. So the list grows while jobs are done, and ends when it does not.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from configs.lab import beyond, dilemma
from configs.lab.beyond import BASELINE, Row
from launch.engine.writers import read_metrics
from launch.lab.beyond.rows import owner_of, row_of, shape_of, together
from launch.lab.dilemma import graph
from launch.lab.jobs import Job, Record

BEYOND = "beyond"  # in names, beside those of the dilemma
GAUSSIANS = f"gaussian/{BEYOND}"


def jobs_of(config: FrozenConfigDict, workdir: Path) -> list[Job]:
  """All jobs that can be known by now."""
  made = Beyond(config, workdir)
  jobs = _once(made.jobs())
  for name in made.rows:
    jobs = _once([*jobs, *made.at_equal_time(name, done_of(jobs, workdir))])
  if config.combined and (name := made.winners(done_of(jobs, workdir))):
    jobs = _once([*jobs, *made.of_rows([name])])
    jobs = _once([*jobs, *made.at_equal_time(name, done_of(jobs, workdir))])
  return jobs


def _once(jobs: Iterable[Job]) -> list[Job]:
  """Rows may share some."""
  return [*{job.name: job for job in jobs}.values()]


def done_of(jobs: Sequence[Job], workdir: Path) -> set[str]:
  """The names of the jobs that are done."""
  record = Record(workdir, jobs)
  return {job.name for job in jobs if record.is_done(job)}


class Beyond(graph.Graph):
  """Makes the jobs."""

  def __init__(self, config: FrozenConfigDict, root: Path):
    size = "tiny" if config.size == "tiny" else "cifar"
    given = ConfigDict(config.to_dict() | {"size": size})
    super().__init__(FrozenConfigDict(given), root)
    self.size, self.rows = config.size, config.rows
    self.key = f"fd_{dilemma.judge(size).name.lower()}"

  def jobs(self) -> Iterator[Job]:
    """Judges, controls, and every row by itself; all rows of a seed before the next one's, which
    find compiled what they need.
    """
    yield from self.of_judges()
    yield from self._tokenizer(self.config.tokenizer, 0)
    words = (f"--gaussians={self._latents()}", f"--num_samples={self.config.num_samples}")
    needs = (self._latents_job(),)
    yield self._judged("generation", GAUSSIANS, words, needs)
    yield from self.of_rows(self.rows)

  def of_rows(self, names: Iterable[str]) -> Iterator[Job]:
    """Trainings of rows, unless they have the baseline's, and figures of samples at all steps."""
    for seed in self.config.seeds:
      for name in names:
        row, owner = row_of(name), owner_of(name)
        if row.tokenizer:
          yield from self._changed_tokenizer(owner, row)
        yield self._training(owner, row, seed)
        yield self._figures(name, seed, [*self.checkpoints(name).values()])

  def checkpoints(self, name: str) -> dict[int, int]:
    """By column of the table, the step whose weights draw a row's samples."""
    row = row_of(name)
    return (
      {self.config.steps[-1]: self._last(row)} if row.refines else {x: x for x in self.config.steps}
    )

  def _last(self, row: Row) -> int:
    every = beyond.diffusion(self.size).keep_every_steps
    return max(round(self.config.steps[-1] * row.longer / every), 1) * every

  def at_equal_time(self, name: str, done: set[str]) -> Iterator[Job]:
    """Samples of the checkpoints that had the time that the baseline had at its end."""
    for seed in self.config.seeds if not row_of(name).refines else ():
      if {training_of(x, seed) for x in (name, BASELINE)} <= done:
        step = self.equal_step(name, seed)
        if step not in self.config.steps:
          yield self._figures(name, seed, [step], "/equal_time")

  def equal_step(self, name: str, seed: int) -> int:
    """The kept checkpoint of a row whose seconds are nearest to those of the baseline's training.

    Both must be done. Of rows that the baseline outruns it is the last that they have.
    """
    total = seconds_of(self.root / training_of(BASELINE, seed))[self.config.steps[-1]]
    every = beyond.diffusion(self.size).keep_every_steps
    own = seconds_of(self.root / training_of(name, seed))
    return min((x for x in own if x % every == 0), key=lambda step: abs(own[step] - total))

  def winners(self, done: set[str]) -> str:
    """The options that are better than the baseline by more than its seeds differ, the best first,
    as far as they go together, joined by +; "" for fewer than two, or before all rows are done.
    """
    if not {figures_of(name, seed) for name in self.rows for seed in self.config.seeds} <= done:
      return ""
    last = {name: self.distances(name) for name in self.rows}
    spread = np.std(last[BASELINE], ddof=1) if len(self.config.seeds) > 1 else 0.0
    limit = np.mean(last[BASELINE]) - spread
    won = [n for n in self.rows if not beyond.ROWS[n].control and np.mean(last[n]) < limit]
    found = together(self.config, sorted(won, key=lambda n: float(np.mean(last[n]))))
    return found if "+" in found else ""

  def distances(self, name: str) -> list[float]:
    """Of a row's last samples, one for each seed."""
    step = self.checkpoints(name)[self.config.steps[-1]]
    return [self.points(figures_of(name, seed))[step][self.key] for seed in self.config.seeds]

  def points(self, job: str) -> dict[int, dict[str, Any]]:
    """The figures of a job that is done, by the step of the checkpoint."""
    found = json.loads((self.root / f"{job}.json").read_text())
    return {point["step"]: point for point in found["points"]}

  def _latents_job(self, name: str = "") -> str:
    return f"latents/{name or self.config.tokenizer}/seed0"

  def _latents(self, name: str = "") -> Path:
    return self.root / self._latents_job(name)

  def _changed_tokenizer(self, name: str, row: Row) -> Iterator[Job]:
    """The tokenizer with a row's changes, and its latents."""
    variant, shape, kl = self.config.tokenizer.split("/")
    own = f"{BEYOND}/{name}/seed0"
    settings = (self.source, *(f"{key}={value}" for key, value in row.tokenizer.items()))
    part = f"tokenizer,{variant},{shape},{kl}"
    yield self._train(f"tokenizer/{own}", part, self.config.tokenizer_steps, settings, weight=2)
    output, trained = self.root / "latents" / own, self.root / "tokenizer" / own
    words = ("launch.encode", f"--workdir={trained}", f"--output={output}", "--batch_size=500")
    yield Job(f"latents/{own}", words, output, resumes=True, needs=(f"tokenizer/{own}",))

  def _training(self, name: str, row: Row, seed: int) -> Job:
    own = f"{BEYOND}/{name}" if row.tokenizer else ""
    argument = f"{self.size},diffusion,{shape_of(self.config)}"
    given = {"latents.path": self._latents(own), "seed": seed, "num_steps": self._last(row)}
    needs = [self._latents_job(own)]
    if row.refines:
      needs.append(training_of(BASELINE, seed))
      given["init_from"] = self.root / needs[-1]
    settings = [f"--config.{key}={value}" for key, value in (given | {**row.training}).items()]
    job, file = training_of(name, seed), os.path.relpath(beyond.__file__)
    words = ("launch.train", f"--config={file}:{argument}", *settings)
    output = self.root / job
    content = graph.content(beyond.get_config(argument))
    words += (f"--workdir={output}",)
    return Job(job, words, output, True, content, (*needs,), weight=20 * row.longer)

  def _figures(self, name: str, seed: int, steps: Sequence[int], suffix: str = "") -> Job:
    """What the judges say of samples of some checkpoints of a row's training."""
    row, training = row_of(name), training_of(name, seed)
    words = [f"--workdir={self.root / training}", f"--num_samples={self.config.num_samples}"]
    words += [f"--grid=step={','.join(map(str, steps))}"]
    words += [f"--{key}={value}" for key, value in row.sampling.items()]
    if row.guide:
      first = beyond.diffusion(self.size).keep_every_steps
      words += [f"--guide={self.root / training}", f"--grid=guide_step={first}"]
    job = self._judged("sweep", f"{figures_of(name, seed)}{suffix}", words, (training,))
    return dataclasses.replace(job, weight=5.0 * len(steps))


def training_of(name: str, seed: int) -> str:
  """The job of the training that a row samples."""
  return f"diffusion/{BEYOND}/{owner_of(name)}/seed{seed}"


def figures_of(name: str, seed: int) -> str:
  """The job of the figures of a row's samples after all steps of the table."""
  return f"figures/{BEYOND}/{name}/seed{seed}"


def seconds_of(workdir: Path) -> dict[int, float]:
  """The time that a training had taken at the steps of its log, without compiling and saving."""
  total, before, found = 0.0, 0, {}
  for line in read_metrics(workdir):
    if speed := line.get("steps_per_second"):
      total += (line["step"] - before) / speed
      before = line["step"]
      found[before] = total
  return found
