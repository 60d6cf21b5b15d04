"""The one training loop: step, log, evaluate, save, resume. It knows no model.

A task is a module with the functions of the protocol below. The loop jits its step with donated
state, reads metrics one step late so that the device never waits for the host, folds the step into
the key so that a resumed run repeats the uninterrupted one, and ends on a signal with everything
saved.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict, FrozenConfigDict

from launch.engine import configuration, console, hardware, processes, writers
from launch.engine.checkpoint import Checkpoints
from launch.engine.evaluators import Evaluator, best_step, due, evaluate, not_recorded
from launch.engine.log import Log, Metrics, Told
from launch.engine.ownership import owned
from launch.engine.prefetch import Prefetched
from launch.engine.step import Step, jit_init
from launch.engine.stopping import Signals
from vavae_jax.common import functional, mesh
from vavae_jax.common.errors import InputError

if TYPE_CHECKING:
  import grain  # which takes half a second

Adopt = Callable[[Any], Any]  # from a fresh state to one with given weights


class Task(Protocol):
  """The functions of a training module; `state` is a dataclass with `step`, `params` and `ema`, a
  dict from names to trees like `params`.
  """

  def check(self, config: FrozenConfigDict) -> None:
    """Raises InputError for mistakes in the configuration or its data."""

  def init_state(self, config: FrozenConfigDict, key: jax.Array) -> Any:
    """A fresh state, jittable."""

  def load_frozen(self, config: FrozenConfigDict) -> Any:
    """Pytree of host arrays that the step needs and never trains."""

  def phase(self, config: FrozenConfigDict, step: int) -> Hashable:
    """The static part of the update that makes `step`; the loop compiles once for each value."""

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

  def data_source(self, config: FrozenConfigDict) -> str:
    """Where the training data are, for messages."""

  def train_data(
    self, config: FrozenConfigDict, rows: np.ndarray | None, start: int
  ) -> grain.IterDataset:
    """Endless batches after the first `start`, of each these rows, None: all: pytrees of host
    arrays [len(rows), ...]. A row is a function of its number and its batch's, so that a run
    resumes, on any number of processes, by its step.
    """

  def evaluators(self, config: FrozenConfigDict) -> dict[str, Evaluator]:
    """Those of `evaluators.Evaluator` by their names; they run at their steps and at the last one,
    after the checkpoint of the step is safe. Of several processes all run them alike.
    """


class Prepared(NamedTuple):
  """What is known of a training once its long preparations are done."""

  config: FrozenConfigDict
  evaluators: dict[str, Evaluator]  # beside the task's own
  notes: Mapping[str, Mapping[str, Any]]  # JSON files to write beside config.json, by their names


def run(
  task: Task,
  config: FrozenConfigDict,
  workdir: Path,
  *,
  name: str = "train",
  prepare: Callable[[], Prepared] | None = None,
  unset: Iterable[str] = (),
  initial_weights: Callable[[], Adopt | None] | None = None,
  may_change: Iterable[str] = (),
  with_changes: bool = False,
  told: Told | None = None,
) -> Any:
  """Trains until `config.num_steps`, from the newest checkpoint of `workdir` if it has one; else
  from `initial_weights`, or where there are none from random ones.

  Args:
    task: a module that fits `Task`.
    name: shown by the progress bar.
    prepare: may copy and compute for hours; runs once the workdir is this training's, and all that
      can be compared before was.
    unset: keys of `config` that `prepare` sets.
    initial_weights: reads weights and returns the function that puts them into a fresh state, or
      None where there are none to read.
    may_change: keys that a run may change when it goes on, beside those of every task.
    with_changes: go on with other changes too, of keys that leave model and state as they are.
    told: is called with each line of the log.

  Raises:
    InputError: configuration, data, workdir or disk do not fit, found before anything compiles.
    NotFinite: a metric or the new state is not finite and `config.non_finite` is "stop", or it is
      "skip" and more than `config.max_skipped_steps` steps in a row were skipped.
    console.Interrupted: a signal came; a checkpoint of the last step was written.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(owned(workdir))
    devices = check(config)
    configuration.check_workdir(workdir, config, {*may_change, *unset}, with_changes=with_changes)
    config, more_evaluators, notes = prepare() if prepare else Prepared(config, {}, {})
    task.check(config)
    init = functools.partial(task.init_state, config)
    key_init, key_steps = jax.random.split(jax.random.key(config.seed))
    abstract = jax.eval_shape(init, key_init)
    shardings = mesh.parameter_shardings(abstract, devices)
    changes = _changes(task, config, workdir, abstract, may_change, with_changes)
    checkpoints, start = _checkpoints(config, workdir, abstract)
    adopt = initial_weights() if initial_weights and not start else None
    configuration.note_changes(workdir, start, changes)
    configuration.claim_workdir(workdir, config, notes)
    data = task.train_data(config, mesh.own_rows(config.batch_size, devices), start)
    stack.enter_context(jax.set_mesh(devices))
    fresh = functools.partial(_fresh, init, key_init, shardings, adopt, workdir)
    wanted = jax.tree.map(lambda x, place: x.update(sharding=place), abstract, shardings)
    state, noted = checkpoints.restore(start, wanted) if start else (fresh(), {})
    evaluators = {**task.evaluators(config), **more_evaluators}
    missing = not_recorded(evaluators, workdir, start, config.num_steps) if start else []
    if start >= config.num_steps and not missing:
      console.say(f"{name}: {workdir} already has all {start} steps")
      checkpoints.close()
      return state
    frozen = jax.device_put(task.load_frozen(config), mesh.replicated(devices))
    step_fn = Step(task.train_step, config, shardings)
    writer = writers.Writer(workdir, config, start, active=jax.process_index() == 0)
    signals = stack.enter_context(Signals(config.report_waits_after, task.data_source(config)))
    bar = stack.enter_context(console.Bar(name, config.num_steps, start))
    put = functools.partial(mesh.to_global, mesh=devices)
    batches = stack.enter_context(Prefetched(data, put, signals.waiting, processes.several()))
    stack.enter_context(contextlib.closing(writer))
    stack.enter_context(contextlib.closing(checkpoints))
    with signals.at_once():
      evaluate(evaluators, missing, writer, start, state, signals.go_on)
    log = Log(writer, bar, config, start, hardware.peak_flops(devices), noted, checkpoints, told)

    def save(wait: bool = True) -> None:
      with log.paused():
        checkpoints.save(state, config.to_dict(), log.state(), wait)

    with _saving(save):
      for step in range(start + 1, config.num_steps + 1):
        with log.waiting():
          batch = next(batches)
        signals.go_on(step)
        phase = task.phase(config, step)
        key = jax.random.fold_in(key_steps, step)
        if compiles := phase not in step_fn.flops:
          with signals.at_once(save):
            step_fn.prepare(phase, state, frozen, batch, key)
        with log.held():
          state, metrics = step_fn(phase, state, frozen, batch, key)
        last = step == config.num_steps
        if step % config.log_every_steps == 0 or last:
          metrics |= step_fn.norms(state)
        log.step(step, metrics, step_fn.flops[phase], compiles)
        signals.done()
        names = due(evaluators, step, config.num_steps)
        if last or _is_due(config, step, judged=bool(names)):
          save(wait=False)
        if names:
          with log.paused(), signals.at_once(save):
            evaluate(evaluators, names, writer, step, state, signals.go_on)
  return state


def _is_due(config: FrozenConfigDict, step: int, *, judged: bool) -> bool:
  """Whether a checkpoint of this step is due: every so many, or one that might stay for good.

  An evaluator's figures, whose names have a slash, choose among the steps where it runs.
  """
  every = (config.save_every_steps, config.keep_every_steps)
  chosen = judged and "/" in config.keep_best
  return chosen or any(count and step % count == 0 for count in every)


@contextlib.contextmanager
def _saving(save: Callable[[], None]) -> Iterator[None]:
  """Saves where a signal stops all processes at the same place."""
  try:
    yield
  except console.Interrupted as error:
    if error.together:
      save()
    raise


def _changes(
  task: Task,
  config: FrozenConfigDict,
  workdir: Path,
  abstract: Any,
  may_change: Iterable[str],
  with_changes: bool,
) -> dict[str, Any]:
  """As `configuration.check_workdir`; InputError too if a change alters the arrays of the state."""
  changes = configuration.check_workdir(workdir, config, may_change, with_changes=with_changes)
  if not changes:
    return {}
  before = FrozenConfigDict(ConfigDict(configuration.read_noted(workdir / configuration.NAME)))
  there = jax.eval_shape(functools.partial(task.init_state, before), jax.random.key(0))
  if jax.tree.flatten(there) != jax.tree.flatten(abstract):
    raise InputError(
      f"The state in {workdir} does not fit with the changes of {', '.join(changes)}: some of them "
      "change which arrays there are; leave these as they were, or give a new --workdir."
    )
  for name, (old, new) in changes.items():
    console.say(f"config.{name} is {new!r} from here on; it was {old!r}")
  return changes


def _fresh(
  init: Callable[[Any], Any], key: Any, shardings: Any, adopt: Adopt | None, workdir: Path
) -> Any:
  """The state that a training begins with, with the weights that `adopt` puts into it; a file of
  the workdir describes it.
  """
  state = jit_init(init, shardings)(key)
  if adopt:
    state = jax.device_put(adopt(state), shardings)
    functional.check_finite(state.params, "config.init_from")
  table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
  if jax.process_index() == 0:
    (workdir / "parameters.txt").write_text(table + "\n")
  total = sum(x.size for x in jax.tree.leaves(state.params))
  console.say(f"{total / 1e6:.2f} M parameters, listed in {workdir / 'parameters.txt'}")
  return state


def _checkpoints(config: FrozenConfigDict, workdir: Path, abstract: Any) -> tuple[Checkpoints, int]:
  """(Those of a workdir, the step of the newest); InputError where the disk cannot hold more."""
  checkpoints = Checkpoints(
    workdir,
    keep=config.keep_checkpoints,
    keep_every=config.keep_every_steps,
    best=functools.partial(best_step, workdir, config.keep_best),
  )
  start = checkpoints.sound_step() or 0
  if start < config.num_steps:
    checkpoints.check_space(abstract)
  return checkpoints, start


def check(config: FrozenConfigDict) -> jax.sharding.Mesh:
  """Checks the part of a configuration that all tasks share; returns its mesh."""
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  mesh.check_batch_size(config.batch_size, devices)
  decay = config.optimizer.decay_steps if "optimizer" in config else 0
  if 0 < decay < config.num_steps:
    raise InputError(
      f"config.optimizer.decay_steps is {decay}, but config.num_steps is {config.num_steps}: the "
      "learning rate would be 0 from there on, and nothing would be learnt. Set decay_steps "
      f"to {config.num_steps}, or to 0 for no decay; where a run goes on, with "
      "--resume_with_changes."
    )
  writers.check(config.log_to)
  return devices
