"""Evaluators of a training: when they run, what they write, and which checkpoint is the best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from launch.engine import console, processes
from launch.engine.writers import Writer, curve, read_metrics

Results = dict[str, Any]  # {name: float or uint8 picture [H, W, 3]}
# (every how many steps; 0: never, state -> results). A long one gives an iterator that yields None
# after each piece of its work, where it may be left, then the results, which are written before it
# goes on to tidy up.
Evaluator = tuple[int, Callable[[Any], Results | Iterator[Results | None]]]
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

  def missing() -> list[str]:
    there = {name for line in read_metrics(workdir) if line["step"] == step for name in line}
    return [name for name in due(evaluators, step, num_steps) if f"{name}/{_TOOK}" not in there]

  return processes.first_does(missing)  # it writes, perhaps to a disk of its own


def evaluate(
  evaluators: dict[str, Evaluator],
  names: list[str],
  writer: Writer,
  step: int,
  state: Any,
  go_on: Callable[[int, int, int], None],
) -> None:
  """Runs those named and writes their results; `go_on` is called before each piece of the work with
  the step, the evaluator's place, from 1 on, and the number of its pieces that are done.
  """
  for place, name in enumerate(names, 1):
    go_on(step, place, 0)
    began = time.monotonic()
    results = evaluators[name][1](state)
    for piece, found in enumerate([results] if isinstance(results, dict) else results, 1):
      if found is None:
        go_on(step, place, piece)
      else:
        _write(writer, step, name, found, time.monotonic() - began)


def _write(writer: Writer, step: int, name: str, results: Results, seconds: float) -> None:
  """Pictures are written first, since the line with the seconds marks the evaluation finished."""
  for key, value in results.items():
    if np.ndim(value) == 3:
      writer.picture(step, f"{name}/{key}", value)
  scalars = {key: value for key, value in results.items() if np.ndim(value) == 0}
  scalars[_TOOK] = seconds
  writer.scalars(step, {f"{name}/{key}": value for key, value in scalars.items()})
  writer.flush()  # it decides which checkpoint is the best, and whether this is done again


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
