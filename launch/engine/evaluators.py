"""Evaluators of a training: when they run, what they write, and which checkpoint is the best."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from launch.engine import console
from launch.engine.writers import Writer, curve, read_metrics

# (every how many steps; 0: never, state -> {name: float or uint8 picture [H, W, 3]}).
Evaluator = tuple[int, Callable[[Any], dict[str, Any]]]
_TOOK = "took_seconds"


def due(evaluators: dict[str, Evaluator], step: int, num_steps: int) -> list[str]:
  """The names of the evaluators that run after `step`."""
  return [
    name
    for name, (every, _) in evaluators.items()
    if every and (step % every == 0 or step == num_steps)
  ]


def not_recorded(
  evaluators: dict[str, Evaluator], workdir: Path, step: int, num_steps: int
) -> list[str]:
  """Which of the evaluators due at `step` did not finish; the same on all processes."""
  there = {name for line in read_metrics(workdir) if line["step"] == step for name in line}
  names = due(evaluators, step, num_steps)
  missing = np.array([f"{name}/{_TOOK}" not in there for name in names], bool)
  if jax.process_count() > 1:  # the first one writes, perhaps to a disk of its own
    missing = multihost_utils.broadcast_one_to_all(missing)
  return [name for name, is_missing in zip(names, missing, strict=True) if is_missing]


def evaluate(
  evaluators: dict[str, Evaluator], name: str, writer: Writer, step: int, state: Any
) -> None:
  """Runs one; pictures are written first, since the line with its seconds marks it finished."""
  began = time.monotonic()
  results = evaluators[name][1](state)
  for key, value in results.items():
    if np.ndim(value) == 3:
      writer.picture(step, f"{name}/{key}", value)
  scalars = {key: value for key, value in results.items() if np.ndim(value) == 0}
  scalars[_TOOK] = time.monotonic() - began
  writer.scalars(step, {f"{name}/{key}": value for key, value in scalars.items()})


def best_step(workdir: Path, metric: str, steps: list[int]) -> int | None:
  """The step among these where a metric was lowest; highest where "-" stands before its name."""
  if not metric:
    return None
  name, sign = (metric[1:], -1) if metric.startswith("-") else (metric, 1)
  lines = read_metrics(workdir)
  values = {step: sign * value for step, value in curve(lines, name) if step in steps}
  written = {key for line in lines for key in line}
  known = sorted(key for key in written - {"step"} if not key.endswith(f"/{_TOOK}"))
  evaluated = len(known) < len(written) - 1
  if name not in known and (evaluated or ("/" not in name and known)):
    console.say(
      f"warning: config.keep_best is {metric!r}, but no such metric was written; there are: "
      f"{', '.join(known)}"
    )
  return min(values, key=lambda step: values[step], default=None)
