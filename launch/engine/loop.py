"""The one training loop: step, log, evaluate, save, resume. It knows no model.

A task is a module with the functions of the protocol below. The loop jits its step with donated
state, reads metrics one step late so that the device never waits for the host, folds the step into
the key so that a resumed run repeats the uninterrupted one, and ends on a signal with everything
saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import parameter_overview
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

from launch.engine import console, hardware, mesh
from launch.engine.checkpoint import Checkpoints
from launch.engine.configuration import check_workdir, claim_workdir
from launch.engine.prefetch import Prefetched
from launch.engine.stopping import Signals
from launch.engine.writers import Writer, curve, read_metrics
from vavae_jax.common.errors import InputError

if TYPE_CHECKING:
  import grain  # which takes half a second

Metrics = dict[str, Any]
Evaluator = tuple[int, Callable[[Any], dict[str, Any]]]
NON_FINITE = ("stop", "skip")
COUNTS = (
  "num_steps",
  "log_every_steps",
  "save_every_steps",
  "keep_checkpoints",
  "max_skipped_steps",
)


class Task(Protocol):
  """What a training module offers; `state` is a dataclass with `step`, `params` and `ema`, a dict
  from names to trees like `params`.
  """

  def check(self, config: FrozenConfigDict) -> None:
    """Raises InputError for anything wrong with the configuration or its data."""

  def init_state(self, config: FrozenConfigDict, key: jax.Array) -> Any:
    """A fresh state, jittable."""

  def load_frozen(self, config: FrozenConfigDict) -> Any:
    """Pytree of what the step needs and never trains (host arrays)."""

  def phase(self, config: FrozenConfigDict, step: int) -> Hashable:
    """What is static about the update that makes `step`; the loop compiles once for each value."""

  def flops_per_step(self, config: FrozenConfigDict) -> float:
    """FLOPs of the model in one step, by count; 0 where nobody has counted."""

  def train_step(
    self,
    config: FrozenConfigDict,
    phase: Any,
    state: Any,
    frozen: Any,
    batch: Any,
    key: jax.Array,
  ) -> tuple[Any, Metrics]:
    """One update, pure and jittable; metrics are scalars and have "loss"."""

  def train_data(
    self, config: FrozenConfigDict, process_index: int, process_count: int, start: int
  ) -> grain.IterDataset:
    """Endless batches of this process after the first `start`: pytrees of host arrays
    [B / process_count, ...]. A batch is a function of its number, so that a run resumes, on any
    number of processes, by its step.
    """

  def evaluators(self, config: FrozenConfigDict) -> dict[str, Evaluator]:
    """`{name: (every_steps, fn(state) -> {name: float or uint8 picture [H, W, 3]})}`; they run at
    those steps and at the last one, after the checkpoint of the step is safe.
    """


def run(
  task: Task,
  config: FrozenConfigDict,
  workdir: Path,
  *,
  name: str = "train",
  more_evaluators: dict[str, Evaluator] | None = None,
  initial_weights: Callable[[], Callable[[Any], Any]] | None = None,
) -> Any:
  """Trains until `config.num_steps`, from the newest checkpoint of `workdir` if it has one; else
  from `initial_weights`, or where there are none from random ones.

  Args:
    task: a module that fits `Task`.
    config: the whole configuration, frozen.
    workdir: metrics, checkpoints and the configuration go there.
    name: what the progress bar says.
    more_evaluators: beside the task's own.
    initial_weights: reads weights and returns the function that puts them into a fresh state.

  Returns:
    The final state, on the devices.

  Raises:
    InputError: configuration, data, workdir or disk do not fit, found before anything compiles.
    FloatingPointError: a metric is not finite and `config.non_finite` is "stop", or it is "skip"
      and more than `config.max_skipped_steps` steps were skipped one after the other.
    console.Interrupted: SIGTERM or SIGINT came; a checkpoint of the last step was written.
  """
  devices = check(config)
  task.check(config)
  init = functools.partial(task.init_state, config)
  abstract = jax.eval_shape(init, jax.random.key(config.seed))
  shardings = mesh.parameter_shardings(abstract, devices)
  check_workdir(workdir, config)
  checkpoints = Checkpoints(
    workdir,
    keep=config.keep_checkpoints,
    keep_every=config.keep_every_steps,
    best=functools.partial(_best_step, workdir, config.keep_best),
  )
  start = checkpoints.sound_step() or 0
  told: dict[str, Any] = {}
  if start < config.num_steps:
    checkpoints.check_space(abstract)
  adopt = initial_weights() if initial_weights and not start else None
  claim_workdir(workdir, config)

  key_init, key_steps = jax.random.split(jax.random.key(config.seed))
  data = task.train_data(config, jax.process_index(), jax.process_count(), start)
  with jax.set_mesh(devices):
    if start:
      like = jax.tree.map(_with_sharding, abstract, shardings)
      state, told = checkpoints.restore(start, like)
    else:
      state = jit_init(init, shardings)(key_init)
      if adopt:
        state = jax.device_put(adopt(state), shardings)
      _describe(state.params, workdir, name)
    evaluators = {**task.evaluators(config), **(more_evaluators or {})}
    missing = _not_recorded(evaluators, workdir, start, config.num_steps) if start else []
    if start >= config.num_steps and not missing:
      console.say(f"{name}: {workdir} already has all {start} steps")
      checkpoints.close()
      return state
    frozen = jax.device_put(task.load_frozen(config), mesh.replicated(devices))
    step_fn = jit_step(task.train_step, config, shardings)
    norms = jax.jit(_norms)
    writer = Writer(workdir, resume_step=start, active=jax.process_index() == 0)
    peak = hardware.peak_flops(devices)
    log = _Log(writer, config, start, task.flops_per_step(config), peak, told)
    compiled = set()
    with (
      Signals() as signals,
      console.Bar(name, config.num_steps, start) as bar,
      Prefetched(data, lambda batch: mesh.to_global(batch, devices)) as batches,
    ):
      try:
        with signals.at_once():
          for evaluator in missing:
            _evaluate(writer, start, evaluator, evaluators[evaluator][1], state)
        log.restart()
        for step in range(start + 1, config.num_steps + 1):
          waiting = time.monotonic()
          batch = next(batches)
          log.waited += time.monotonic() - waiting
          phase = task.phase(config, step)
          key = jax.random.fold_in(key_steps, step)
          state, metrics = step_fn(phase, state, frozen, batch, key)
          last = step == config.num_steps
          if step % config.log_every_steps == 0 or last:
            metrics |= norms(state)
          log.step(step, metrics, bar)
          if phase not in compiled:
            compiled.add(phase)
            log.leave_out(bar)
          stop = signals.stop_after(step, last)
          if step % config.save_every_steps == 0 or last or stop:
            log.flush(bar)
            with log.paused():
              checkpoints.save(state, config.to_dict(), log.state())
          if stop:
            raise console.Interrupted(stop, together=True)
          for evaluator in _due(evaluators, step, config.num_steps):
            log.flush(bar)
            try:
              with log.paused(), signals.at_once():
                _evaluate(writer, step, evaluator, evaluators[evaluator][1], state)
            except console.Interrupted:
              checkpoints.save(state, config.to_dict(), log.state())
              raise
      finally:
        checkpoints.close()
        writer.close()
      if signals.received:  # while the last checkpoint was being written
        raise console.Interrupted(signals.received)
  return state


def check(config: FrozenConfigDict) -> jax.sharding.Mesh:
  """Checks what every training's configuration has, whatever the task; returns its mesh."""
  for field in COUNTS:
    if config[field] < 1:
      raise InputError(f"config.{field} is {config[field]}, but it must be at least 1.")
  if config.non_finite not in NON_FINITE:
    raise InputError(f"config.non_finite is {config.non_finite!r}; choose one of {NON_FINITE}.")
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  mesh.check_batch_size(config.batch_size, devices)
  return devices


def jit_init(init: Callable[[jax.Array], Any], shardings: Any = None) -> Callable[..., Any]:
  """`init` (key -> state) compiled to run once; to make it fast takes a CPU's compiler too long."""
  lazy = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  return jax.jit(init, out_shardings=shardings, compiler_options=lazy)


def jit_step(train_step: Callable[..., Any], config: FrozenConfigDict, shardings: Any) -> Any:
  """A task's step as the loop runs it.

  Args:
    train_step: the task's.
    config: the whole configuration.
    shardings: of the state.

  Returns:
    A jitted function of (phase, state, frozen, batch, key) that takes the state's memory.
  """
  return jax.jit(
    functools.partial(_guarded_step, train_step, config),
    static_argnums=0,
    donate_argnums=1,
    out_shardings=(shardings, None),
  )


def _describe(params: Any, workdir: Path, name: str) -> None:
  table = parameter_overview.get_parameter_overview(params, include_stats=False)
  if jax.process_index() == 0:
    (workdir / "parameters.txt").write_text(table + "\n")
  total = sum(x.size for x in jax.tree.leaves(params))
  console.say(f"{name}: {total / 1e6:.2f} M parameters, listed in {workdir / 'parameters.txt'}")


def _with_sharding(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _guarded_step(
  train_step: Callable[..., tuple[Any, Metrics]],
  config: FrozenConfigDict,
  phase: Hashable,
  state: Any,
  frozen: Any,
  batch: Any,
  key: jax.Array,
) -> tuple[Any, Metrics]:
  """The task's step; with "skip", one with a metric that is not finite leaves all but the count.

  All metrics: a finite loss can have gradients that are not.
  """
  new, metrics = train_step(config, phase, state, frozen, batch, key)
  if config.non_finite == "skip":
    finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    new = dataclasses.replace(kept, step=new.step)
    metrics = {**metrics, "skipped": 1.0 - finite}
  return new, metrics


def _norms(state: Any) -> Metrics:
  """Of the parameters and their averages: for the log alone, so not part of every step."""
  trees = {"param": state.params, **{f"ema_{name}": tree for name, tree in state.ema.items()}}
  return {f"{name}_norm": optax.tree.norm(tree) for name, tree in trees.items()}


class _Log:
  """Means of the metrics between two log lines, each step's read when the next is under way."""

  def __init__(
    self,
    writer: Writer,
    config: FrozenConfigDict,
    step: int,
    flops_per_step: float,
    peak_flops: float,
    told: dict[str, Any],
  ):
    """Args:
    writer: of the lines.
    config: of the training.
    step: where it begins.
    flops_per_step: of the model; 0: not counted.
    peak_flops: of the devices; 0: not known.
    told: what `state` gave at that step, or {}.
    """
    self._writer, self._config = writer, config
    self._flops, self._peak = flops_per_step, peak_flops
    self._skipped, self._in_a_row = told.get("skipped", 0), told.get("in_a_row", 0)
    self._pending: tuple[int, Metrics] | None = None
    self._window: list[dict[str, float]] = told.get("window", [])
    self._last_step = step
    self.restart()

  def state(self) -> dict[str, Any]:
    """What goes into a checkpoint, so that the lines after it are those of an undisturbed run."""
    # A copy, since it is written in the background while the window goes on.
    window = list(self._window)
    return {"skipped": self._skipped, "in_a_row": self._in_a_row, "window": window}

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """What happens inside does not count as time of training."""
    began = time.monotonic()
    yield
    self._began += time.monotonic() - began

  def restart(self) -> None:
    """What went before does not count, neither steps nor time."""
    self._began, self._began_step, self.waited = time.monotonic(), self._last_step, 0.0

  def leave_out(self, bar: console.Bar) -> None:
    """The step just taken, which compiled, does not count for the speed."""
    self.restart()
    self.flush(bar)
    self.restart()

  def step(self, step: int, metrics: Metrics, bar: console.Bar) -> None:
    """Takes a step's metrics, still being computed, and reads those of the step before."""
    self.flush(bar)
    self._pending, self._last_step = (step, metrics), step

  def flush(self, bar: console.Bar) -> None:
    """Reads the pending metrics and writes a line where one is due."""
    if self._pending is None:
      return
    step, metrics = self._pending
    self._pending = None
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if self._config.non_finite == "stop" and broken:
      raise FloatingPointError(
        f"{', '.join(broken)} at step {step}; the last checkpoint is from before. Go on with "
        'config.non_finite="skip"; or train anew, in another workdir, with a lower '
        "config.optimizer.learning_rate or with config.optimizer.clip_norm=1.0."
      )
    if values.pop("skipped", 0.0):
      self._count_skipped(step, broken)
    else:
      self._window.append(values)
      self._in_a_row = 0
    bar.update(step, loss=values["loss"])
    if step % self._config.log_every_steps == 0 or step == self._config.num_steps:
      # Phases of a training have metrics of their own: each mean is over the steps that have it.
      columns: dict[str, list[float]] = {}
      for line in self._window:
        for name, value in line.items():
          columns.setdefault(name, []).append(value)
      means = {name: float(np.mean(column)) for name, column in columns.items()}
      if self._config.non_finite == "skip":
        means["skipped_steps"] = self._skipped
      self._writer.scalars(step, {**means, **self._speed(step)})
      self._window = []
      self.restart()

  def _speed(self, step: int) -> dict[str, float]:
    """Since the last line, or nothing where no step since then was of use."""
    seconds, steps = time.monotonic() - self._began, step - self._began_step
    if not steps:
      return {}
    speed = {
      "steps_per_second": steps / seconds,
      "images_per_second": steps * self._config.batch_size / seconds,
      "data_wait_fraction": self.waited / seconds,
    }
    if self._flops:
      speed["model_tflops_per_second"] = self._flops * steps / seconds / 1e12
      if self._peak:
        speed["mfu"] = self._flops * steps / seconds / self._peak
    return speed

  def _count_skipped(self, step: int, broken: list[str]) -> None:
    self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
    console.say(f"step {step} was skipped: {', '.join(broken)}")
    if self._in_a_row > self._config.max_skipped_steps:
      raise FloatingPointError(
        f"{self._in_a_row} steps one after the other were not finite, until step {step}: "
        f"{', '.join(broken)}. The weights before them are in the last checkpoint; train on from "
        "them in another workdir, by config.init_from, with a lower learning rate or clipping."
      )


def _due(evaluators: dict[str, Evaluator], step: int, num_steps: int) -> list[str]:
  """The names of the evaluators that run after `step`."""
  return [
    name
    for name, (every, _) in evaluators.items()
    if every and (step % every == 0 or step == num_steps)
  ]


def _not_recorded(
  evaluators: dict[str, Evaluator], workdir: Path, step: int, num_steps: int
) -> list[str]:
  """Which of the evaluators due at `step` did not come to their end; the same on all processes."""
  there = {name for line in read_metrics(workdir) if line["step"] == step for name in line}
  due = _due(evaluators, step, num_steps)
  missing = np.array([f"{name}/took_seconds" not in there for name in due], bool)
  if jax.process_count() > 1:  # the first one writes, perhaps to a disk of its own
    missing = multihost_utils.broadcast_one_to_all(missing)
  return [name for name, is_missing in zip(due, missing, strict=True) if is_missing]


def _evaluate(
  writer: Writer, step: int, evaluator: str, evaluate: Callable[[Any], Metrics], state: Any
) -> None:
  """Pictures first: a line with the seconds that it took says that an evaluator is through."""
  began = time.monotonic()
  results = evaluate(state)
  for name, value in results.items():
    if np.ndim(value) == 3:
      writer.picture(step, f"{evaluator}/{name}", value)
  scalars = {name: value for name, value in results.items() if np.ndim(value) == 0}
  scalars["took_seconds"] = time.monotonic() - began
  writer.scalars(step, {f"{evaluator}/{name}": value for name, value in scalars.items()})


def _best_step(workdir: Path, metric: str, steps: list[int]) -> int | None:
  """The step among these where a metric was lowest; highest where "-" stands before its name."""
  if not metric:
    return None
  name, sign = (metric[1:], -1) if metric.startswith("-") else (metric, 1)
  lines = read_metrics(workdir)
  values = {step: sign * value for step, value in curve(lines, name) if step in steps}
  known = {key for line in lines for key in line if not key.endswith("/took_seconds")}
  if any(key.endswith("/took_seconds") for line in lines for key in line) and name not in known:
    console.say(
      f"warning: config.keep_best is {metric!r}, but no such metric was written; there are: "
      f"{', '.join(sorted(known - {'step'}))}"
    )
  return min(values, key=lambda step: values[step], default=None)
