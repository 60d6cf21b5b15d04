"""The training log: means of the metrics between two lines, and how fast the steps were."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from launch.engine import console
from launch.engine.checkpoint import Checkpoints
from launch.engine.stragglers import Stragglers
from launch.engine.writers import Writer
from vavae_jax.common.errors import InputError

Metrics = dict[str, Any]
Told = Callable[[int, dict[str, float]], None]  # gets the step and the means of each line
MILDER = (
  "--resume_with_changes and a lower config.optimizer.learning_rate or "
  "config.optimizer.clip_norm=1.0"
)


class NotFinite(InputError, FloatingPointError):
  """A training computed numbers that are not finite; nothing of them was saved."""


class Log:
  """Reads each step's metrics when the next step is under way, so that no device waits."""

  def __init__(
    self,
    writer: Writer,
    bar: console.Bar,
    config: FrozenConfigDict,
    step: int,
    peak_flops: float,
    noted: dict[str, Any],
    checkpoints: Checkpoints,
    told: Told | None = None,
  ):
    """Begins at `step`, with what `state` gave there as `noted`, or {}; peak_flops 0: not known."""
    self._checkpoints, self._told = checkpoints, told
    self._writer, self._bar, self._config, self._peak = writer, bar, config, peak_flops
    self._skipped, self._in_a_row = noted.get("skipped", 0), noted.get("in_a_row", 0)
    self._pending: tuple[int, Metrics] | None = None
    self._window: list[dict[str, float]] = noted.get("window", [])
    self._last_step = step
    self._stragglers = Stragglers()
    self.restart()

  def state(self) -> dict[str, Any]:
    """What a checkpoint keeps, so that the lines after it are those of an undisturbed run."""
    # A copy, since it is written in the background while the window goes on.
    window = list(self._window)
    return {"skipped": self._skipped, "in_a_row": self._in_a_row, "window": window}

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """The time inside counts as waiting for data."""
    began = time.monotonic()
    yield
    self._waited += time.monotonic() - began

  @contextlib.contextmanager
  def held(self) -> Iterator[None]:
    """The time inside counts as that of steps: their computation, and waiting for other processes
    to begin them.
    """
    began = time.monotonic()
    yield
    self._held += time.monotonic() - began

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """The time inside does not count as training; what was made before it is read first."""
    self.flush()
    began = time.monotonic()
    yield
    self._began += time.monotonic() - began

  def restart(self) -> None:
    """Speeds are measured from here on."""
    self._began, self._began_step = time.monotonic(), self._last_step
    self._waited = self._flops = self._held = 0.0

  def step(self, step: int, metrics: Metrics, flops: float, compiled: bool) -> None:
    """Takes a step's metrics, still being computed, and reads those of the step before.

    A step that compiled does not count for the speed, and its own metrics are waited for.
    """
    self.flush()
    self._pending, self._last_step = (step, metrics), step
    self._flops += flops
    if compiled:
      self.restart()
      self.flush()
      self.restart()

  def flush(self) -> None:
    """Reads the pending metrics and writes a line where one is due.

    Raises:
      NotFinite: a number is not; see `loop.run`.
    """
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    with self.held():
      values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    finite = values.pop("finite")
    broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if not (finite or broken):
      broken = ["the new weights, averages or optimizer state are not finite"]
    if self._config.non_finite == "stop" and broken:
      raise NotFinite(
        f"{', '.join(broken)} at step {step}; {self._saved()}. Go on with "
        f'config.non_finite="skip", or with {MILDER}.'
      )
    if not finite:
      self._count_skipped(step, broken)
    else:
      self._window.append(values)
      self._in_a_row = 0
    self._bar.update(step, loss=values["loss"])
    if step % self._config.log_every_steps == 0 or step == self._config.num_steps:
      means = self._means()
      self._writer.scalars(step, {**means, **self._speed(step)})
      if self._told:
        self._told(step, means)
      self._window = []
      self.restart()

  def _means(self) -> dict[str, float]:
    """Phases of a training have metrics of their own: each mean is over the steps that have it."""
    columns: dict[str, list[float]] = {}
    for line in self._window:
      for name, value in line.items():
        columns.setdefault(name, []).append(value)
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    if self._config.non_finite == "skip":
      means["skipped_steps"] = self._skipped
    return means

  def _speed(self, step: int) -> dict[str, float]:
    """Since the last line; nothing where no step since then counts."""
    seconds, steps = time.monotonic() - self._began, step - self._began_step
    if not steps:
      return {}
    speed = {
      "steps_per_second": steps / seconds,
      "images_per_second": steps * self._config.batch_size / seconds,
      "data_wait_fraction": self._waited / seconds,
      "model_tflops_per_second": self._flops / seconds / 1e12,
    }
    if self._peak:
      speed["mfu"] = self._flops / seconds / self._peak
    return speed | self._stragglers.tell(seconds, self._waited, self._held)

  def _count_skipped(self, step: int, broken: list[str]) -> None:
    self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
    console.say(f"step {step} was skipped: {', '.join(broken)}")
    if self._in_a_row > self._config.max_skipped_steps:
      raise NotFinite(
        f"{self._in_a_row} steps in a row were not finite, until step {step}: "
        f"{', '.join(broken)}; {self._saved()}. Go on with {MILDER}."
      )

  def _saved(self) -> str:
    step = self._checkpoints.newest
    return "there is no checkpoint yet" if step is None else f"the last one saved is step {step}"
