"""Checkpoints {params, ema, training state, config, log}, each whole or not at all.

Parameters and each EMA are items of their own, so that encoding and sampling restore one without
the rest: `vavae_jax.common.checkpoints`. The step says where the data go on. A killed save leaves a
temporary folder that counts for nothing; a saved step is never overwritten. Files are compared with
their manifest before use: damage is reported, and the checkpoint before it serves.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from launch.engine import console, processes
from launch.engine.configuration import NAME, changes_of, read_noted
from vavae_jax.common import manifest
from vavae_jax.common.checkpoints import folder_of, orbax, steps_in, steps_of
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import (
  Place,
  as_oserror,
  check_free,
  hidden,
  is_url,
  write_json,
)
from vavae_jax.common.functional import check_finite

# The step of converted weights; a training's first checkpoint is of a later one.
_CONVERTED = "0"
_DAMAGED = "damaged-"
_UNFINISHED = ".orbax-checkpoint-tmp"


class Checkpoints:
  """The checkpoints of one training; all its processes open them."""

  def __init__(
    self,
    workdir: Path,
    *,
    keep: int = 2,
    keep_every: int = 0,
    best: Callable[[list[int]], int | None] = lambda steps: None,
  ):
    """Checkpoints lie in the workdir's folder `checkpoints`, one folder a step.

    The latest `keep` of them stay, those at multiples of `keep_every` (0: none), and the one whose
    step `best` chooses.
    """
    self.folder = folder_of(workdir)
    if (self.folder / _CONVERTED / "params").is_dir():
      raise InputError(
        f"{workdir} holds converted weights, not a training that could go on; give a new --workdir "
        f"and begin from these with --config.init_from={workdir}."
      )
    self._keep, self._keep_every, self._best = keep, keep_every, best
    self.newest: int | None = None  # the last one's step; it may still be being written
    self._writer = orbax().AsyncCheckpointer(
      orbax().CompositeCheckpointHandler(),
      async_options=orbax().options.AsyncOptions(post_finalization_callback=self._seal),
    )

  def sound_step(self) -> int | None:
    """The newest undamaged checkpoint; None where there is no checkpoint.

    Damaged ones are reported and renamed to `damaged-STEP`, to make room for their step.

    Raises:
      InputError: there are checkpoints, but every one is damaged.
    """
    self.newest = processes.first_does(self._sound_step)
    return self.newest

  def _sound_step(self) -> int | None:
    if not self.folder.is_dir():
      return None
    for path in self.folder.glob(f"*{_UNFINISHED}"):
      path.rmtree()
    damaged = False
    for step in reversed(steps_in(self.folder)):
      path = self.folder / str(step)
      if not (wrong := manifest.damage(path)):
        return step
      if is_url(path) and not (path / manifest.MANIFEST).exists():
        path.rmtree()  # a save that was killed; in a bucket its folder has the final name
        continue
      aside = path.with_name(f"{_DAMAGED}{step}")
      if aside.exists():
        aside.rmtree()
      path.rename(aside)
      damaged = True
      console.say(f"warning: the checkpoint of step {step} is damaged ({wrong}); it is now {aside}")
    if damaged:
      raise InputError(
        f"All checkpoints in {self.folder} are damaged, as reported above, and were renamed. Copy "
        "a sound one there, give a new --workdir to begin anew, or delete the folder."
      )
    return None

  def check_space(self, state: Any) -> None:
    """Raises InputError when the disk has no room for all kept checkpoints of a state and one more.

    `state` is a pytree of arrays or shapes.
    """
    if is_url(self.folder):
      return
    self.folder.mkdir(parents=True, exist_ok=True)
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    needed = size * max(self._keep + 1 - len(steps_in(self.folder)), 1)
    check_free(
      self.folder,
      needed,
      f"for checkpoints of {size / 2**30:.2f} GiB each; free some space, choose another workdir, "
      "or lower config.keep_checkpoints",
    )

  def save(self, state: Any, config: dict, log: dict | None = None, wait: bool = False) -> None:
    """Starts writing a checkpoint in the background; `close` or the next save waits for it, or this
    one does if it shall `wait`.

    `state` is a task's; `config` and `log`, the state of the log between two lines, are for JSON.

    Raises:
      OSError: the disk is full, which a later call raises too for a save in the background. Earlier
        checkpoints are untouched.
    """
    step = int(state.step)
    with as_oserror(Path(str(self.folder))):
      self._finish()
      if not step or (self.folder / str(step)).exists():
        return  # a run that stops before its first step, or where it saves
      self.newest = step
      items = {name: orbax().args.StandardSave(tree) for name, tree in _items(state).items()}
      items["config"] = orbax().args.JsonSave(config)
      items["log"] = orbax().args.JsonSave(log or {})
      self._writer.save(self.folder / str(step), args=orbax().args.Composite(**items))
      if wait:
        self._finish()

  def _seal(self) -> None:
    """Runs in the first process when all have written, just before the folder gets its name."""
    unfinished = list(self.folder.glob(f"{self.newest}{_UNFINISHED}*"))
    # In a bucket nothing can be renamed: the folder has its name from the start.
    folder = unfinished[0] if unfinished else self.folder / str(self.newest)
    manifest.seal(folder, self.newest or 0)

  def _finish(self) -> None:
    """Waits for the save under way; then deletes what need not be kept."""
    self._writer.wait_until_finished()
    if jax.process_index() == 0:
      steps = steps_in(self.folder)
      stay = {*steps[-self._keep :], self._best(steps)}
      for step in steps:
        if step not in stay and not (self._keep_every and step % self._keep_every == 0):
          (self.folder / str(step)).rmtree()

  def restore(self, step: int, state: Any) -> tuple[Any, dict]:
    """Reads (the state, the saved `log`) of a checkpoint, on however many devices there are now.

    The argument `state` has `jax.ShapeDtypeStruct` with shardings.
    """
    restored = self._restored(step, _items(state))
    ema = {name: restored[f"ema_{name}"] for name in state.ema}
    state = dataclasses.replace(restored["training"], params=restored["params"], ema=ema)
    if int(state.step) != step:
      raise InputError(
        f"{self.folder / str(step)} holds the state of step {int(state.step)}: it is a copy under "
        "another name. Delete it."
      )
    check_finite(state, f"The checkpoint {self.folder / str(step)}")
    return state, restored["log"]

  def _restored(self, step: int, trees: dict[str, Any]) -> Any:
    items = {name: orbax().args.StandardRestore(tree) for name, tree in trees.items()}
    items["log"] = orbax().args.JsonRestore()
    try:
      return self._writer.restore(self.folder / str(step), args=orbax().args.Composite(**items))
    except ValueError as error:
      if "tree structures do not match" not in str(error):
        raise
    # Until 2026-11-26 clipping was the first of two parts of an optimizer's state.
    new = trees["training"]
    optimizers = [x.name for x in dataclasses.fields(new) if x.name.endswith("optimizer")]
    chained = dataclasses.replace(new, **{name: ((), getattr(new, name)) for name in optimizers})
    items["training"] = orbax().args.StandardRestore(chained)
    found = self._writer.restore(self.folder / str(step), args=orbax().args.Composite(**items))
    training = found["training"]
    own = {name: getattr(training, name)[1] for name in optimizers}
    return {**dict(found.items()), "training": dataclasses.replace(training, **own)}

  def close(self) -> None:
    """Waits for the save under way."""
    with as_oserror(Path(str(self.folder))):
      self._finish()
    self._writer.close()


def _items(state: Any) -> dict[str, Any]:
  emas = {f"ema_{name}": tree for name, tree in state.ema.items()}
  training = dataclasses.replace(state, params=None, ema=None)
  return {"params": state.params, "training": training, **emas}


def save_weights(workdir: Path, params: Any, config: dict) -> None:
  """Makes a workdir of weights alone, for encoding, sampling and evaluating; whole or not at all.

  There must be no such folder, or an empty one. `params` are as in a task's state.
  """
  workdir = Path(workdir).absolute()
  workdir.parent.mkdir(parents=True, exist_ok=True)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  check_free(workdir.parent, size, "for the weights; free some space, or choose another folder")
  partial = hidden(workdir, "partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    write_json(partial / "config.json", config)
    with as_oserror(workdir), orbax().StandardCheckpointer() as checkpointer:
      checkpointer.save(Place(partial / "checkpoints" / _CONVERTED / "params"), params)
    manifest.seal(Place(partial / "checkpoints" / _CONVERTED), int(_CONVERTED))
    partial.rename(workdir)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def read_config(workdir: Path) -> dict:
  """The configuration of a training; InputError where the folder is not a training's workdir."""
  path = workdir / "config.json"
  if not path.exists():
    raise InputError(
      f"{workdir} is not a training's workdir: it has no config.json; give the folder that "
      "python -m launch.train wrote with --workdir."
    )
  if "task" not in read_noted(path):  # diffusers' folders have a config.json too
    raise InputError(f"{workdir} is not a workdir of this project; give a file of weights in it.")
  return read_noted(path, task=str, seed=int, model=dict, optimizer=dict)


def batch_sizes(workdir: Path, now: int) -> list[tuple[int, int]]:
  """(after how many steps, the batch size from there on) of a run that goes on with `now`."""
  if not (workdir / NAME).exists():
    return [(0, now)]
  noted, latest = changes_of(workdir, "batch_size"), read_noted(workdir / NAME, batch_size=int)
  first = noted[0][1] if noted else latest["batch_size"]
  sizes = [(0, first)]
  for step, _, new in noted:  # from an older checkpoint what came after it did not happen
    sizes = [*(x for x in sizes if x[0] < step or not x[0]), (step, new)]
  if sizes[-1][1] != now:
    sizes.append((max(steps_of(workdir), default=0), now))
  return sizes


class Found(NamedTuple):
  """One checkpoint, as `survey` found it; `wrong` says how it is damaged, "" if not."""

  name: str
  items: tuple[str, ...]
  size: int
  wrong: str


def survey(workdir: Path) -> list[Found]:
  """All checkpoints of a workdir, each read and compared with its manifest, oldest first."""
  found = []
  for step in steps_of(workdir):
    path = folder_of(workdir) / str(step)
    items = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
    found.append(Found(str(step), tuple(items), manifest.size_of(path), manifest.damage(path)))
  return found
