"""The table of `launch.lab.beyond`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

import lightningdit_jax.training
from configs.lab import beyond, dilemma
from launch.engine import flops
from launch.engine.writers import read_metrics
from launch.evaluation.features import SECOND
from launch.lab.beyond import graph, rows
from launch.lab.jobs import Record
from launch.lab.markdown import Region, table
from lightningdit_jax import sampling

REGION = Region(
  "<!-- results: written by launch.lab.beyond -->",
  "<!-- end of the results -->",
  "Beyond the paper, at small size",
)
NOT_RUN = "-"


def write(config: FrozenConfigDict, workdir: Path, page: Path, command: str) -> None:
  """Writes the results so far; a dash stands for those that have not been run as configured.

  `page` is a new page, or one whose results are replaced (InputError if it has no place for them).
  """
  REGION.check(page)
  REGION.write(page, [*_Page(config, workdir).lines(), *_made(config, workdir, command)])


class _Page:
  def __init__(self, config: FrozenConfigDict, workdir: Path):
    self.config, self.workdir = config, workdir
    self.made = graph.Beyond(config, workdir)
    self.jobs = graph.jobs_of(config, workdir)
    self.done = graph.done_of(self.jobs, workdir)
    self.combined = self.made.winners(self.done) if config.combined else ""
    self.name = f"FD-{dilemma.judge(self.made.config.size).name}"
    self.second = f"{SECOND}{self.made.key}2"

  def lines(self) -> Iterator[str]:
    config, name, model = self.config, self.name, beyond.diffusion(self.config.size)
    seeds = ", ".join(map(str, config.seeds))
    yield (
      f"{name} of {config.num_samples:,} samples after so many steps of {model.batch_size} "
      f"pictures, lower is better; ± is the spread over the seeds {seeds} of the "
      f"diffusion model, a LightningDiT of width {model.model.hidden_size} and depth "
      f"{model.model.depth} on the latents {config.tokenizer}. The rate is constant, so every "
      "column is the end of a training. Equal time is of the kept checkpoint, in brackets, whose "
      f"seconds are nearest to those of the baseline's {config.steps[-1]:,} steps. Maps begin with "
      "the baseline's last weights, and their figures, after fewer steps more, stand in the last "
      f"column. {name}2 is a second judge's; costs are counted from the shapes of matrix "
      "products, guidance as if it were on at all times. "
      f"Samples are drawn by {model.sample.method} at {model.sample.num_steps} times, by flows and "
      "maps in the steps that their rows name."
    )
    yield ""
    names = [*config.rows, *([self.combined] if self.combined else [])]
    steps = [f"{step:,}" for step in config.steps]
    head = ["option", *steps, "equal time", f"{name}2", "ms a step", "training (GFLOP a picture)"]
    yield from table([*head, "sampling (GFLOP a picture)"], map(self._row, names))
    yield ""
    yield "Class accuracy (%), the share of samples in which the judge sees their label's class:"
    yield ""
    yield from table(["option", *steps], map(self._accuracies, names))
    yield ""
    for job, text in (
      (graph.GAUSSIANS, "One Gaussian for each class, fitted to the latents and not trained"),
      ("real", "Real pictures that no training used"),
    ):
      figures = self._read(job)
      if self.made.key in figures:
        accuracy = figures.get("class_accuracy")
        told = f", class accuracy {100 * accuracy:.1f} %" if accuracy is not None else ""
        yield f"- {text}: {figures[self.made.key]:.3f}{told}."
    yield ""
    if self.combined:
      won = self.combined.replace("+", ", ")
      yield (
        "The last row combines the options, but for maps, that are better than the baseline by "
        f"more than its seeds differ, the best first, as far as they go together: {won}."
      )
      yield ""

  def _row(self, name: str) -> list[str]:
    key, steps, seeds = self.made.key, self.config.steps, self.config.seeds
    row = [_shown(name), *(self._figure(name, step, key) for step in steps)]
    trained = [graph.training_of(name, seed) for seed in seeds]
    seconds = [graph.seconds_of(self.workdir / x) for x in trained if x in self.done]
    equal = NOT_RUN
    if len(seconds) == len(seeds) and self._baseline_is_done() and not rows.row_of(name).refines:
      chosen = [self.made.equal_step(name, seed) for seed in seeds]
      found = [self._point(name, *each) for each in zip(seeds, chosen, strict=True)]
      if all(found):
        told = "/".join(f"{step:,}" for step in dict.fromkeys(chosen))
        equal = f"{_spread([x[key] for x in found], 3)} ({told})"
    row += [equal, self._figure(name, steps[-1], self.second)]
    milliseconds = [1e3 * max(x.values()) / max(x) for x in seconds]
    costs = [x for job in trained if job in self.done for x in _training_cost(self.workdir / job)]
    sampled = sampling_cost(rows.diffusion_of(self.config, name), rows.row_of(name).guide)
    return [*row, _spread(milliseconds, 1), _mean(costs, 2), f"{sampled / 1e9:.2f}"]

  def _accuracies(self, name: str) -> list[str]:
    found = (self._values(name, step, "class_accuracy") for step in self.config.steps)
    return [_shown(name), *(_spread([100 * x for x in values], 1) for values in found)]

  def _baseline_is_done(self) -> bool:
    return {graph.training_of(beyond.BASELINE, x) for x in self.config.seeds} <= self.done

  def _figure(self, name: str, step: int, key: str) -> str:
    return _spread(self._values(name, step, key), 3)

  def _values(self, name: str, step: int, key: str) -> list[float]:
    if (drawn := self.made.checkpoints(name).get(step)) is None:
      return []
    found = [self._point(name, seed, drawn) for seed in self.config.seeds]
    return [each[key] for each in found if key in each]

  def _point(self, name: str, seed: int, step: int) -> dict[str, Any]:
    """The figures of samples of a checkpoint; empty if there are none."""
    job = graph.figures_of(name, seed)
    for each in {job, f"{job}/equal_time"} & self.done:
      if found := self.made.points(each).get(step):
        return found
    return {}

  def _read(self, job: str) -> dict[str, Any]:
    path = self.workdir / f"{job}.json"
    return json.loads(path.read_text())["figures"] if job in self.done else {}


def sampling_cost(config: FrozenConfigDict, guide: bool) -> float:
  """FLOPs of the matrix products of one sample by `config.sample`; with `guide` of autoguidance."""
  init = functools.partial(lightningdit_jax.training.init_state, config)
  params = jax.eval_shape(init, jax.random.key(0)).params

  def draw(params: Any, index_B: jax.Array) -> jax.Array:
    other = (config, params) if guide else None
    return sampling.sample_latents(
      config, params, index_B, index_B, seed=0, sample=config.sample, guide=other
    )

  traced = jax.make_jaxpr(draw)(params, jax.ShapeDtypeStruct((1,), jnp.int32))
  return flops.count(traced)


def _training_cost(workdir: Path) -> list[float]:
  """GFLOP of a picture in training, by the last line of its log."""
  lines = [x for x in read_metrics(workdir) if "model_tflops_per_second" in x]
  return [1e3 * x["model_tflops_per_second"] / x["images_per_second"] for x in lines[-1:]]


def _shown(name: str) -> str:
  return name.replace("+", " + ")


def _mean(values: Sequence[float], digits: int) -> str:
  return f"{np.mean(values):.{digits}f}" if values else NOT_RUN


def _spread(values: Sequence[float], digits: int) -> str:
  spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
  return _mean(values, digits) + spread


def _made(config: FrozenConfigDict, workdir: Path, command: str) -> list[str]:
  jobs = graph.jobs_of(config, workdir)
  record = Record(workdir, jobs)
  hours = sum(record.seconds(job) for job in jobs) / 3600
  return [
    "How this was made:",
    "",
    "```",
    command,
    "```",
    "",
    f"Made by {record.made(jobs)}. All jobs together took {hours:.1f} hours of one worker, those "
    "of judges and latents included.",
    "",
  ]
