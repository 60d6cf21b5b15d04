"""Checkpoints {params, ema, training state, config}, each whole or not at all.

The only file that imports orbax. Parameters and each EMA are items of their own, so that encoding
and sampling restore one without the rest. Where the data goes on is told by the step. A killed save
leaves a temporary folder that orbax ignores; a saved step is never overwritten.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vavae_jax.errors import InputError
from vavae_jax.files import write_json

# The step of weights that were not trained here; a training's first checkpoint is of a later one.
_CONVERTED = "0"


class Checkpoints:
  """The checkpoints of one workdir."""

  def __init__(self, workdir: Path, *, keep: int = 2):
    """Args:
    workdir: checkpoints lie in its folder `checkpoints`, one folder a step.
    keep: how many of the latest stay.
    """
    self.folder = Path(workdir).absolute() / "checkpoints"
    if (self.folder / _CONVERTED / "params").is_dir():
      raise InputError(
        f"{workdir} holds converted weights, not a training that could go on; give a new --workdir "
        f"and begin from these with --config.init_from={workdir}."
      )
    self._keep = keep
    self._manager = ocp.CheckpointManager(
      epath.Path(self.folder),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest_step(self) -> int | None:
    """The newest complete step, or None."""
    return self._manager.latest_step()

  def check_space(self, state: Any) -> None:
    """Raises InputError when the disk has no room for `keep` + 1 checkpoints of this size.

    Args:
      state: pytree of arrays or shapes; the one kept beside the newest during a save is counted.
    """
    size = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))
    stored = len(self._manager.all_steps())
    needed = size * max(self._keep + 1 - stored, 1)
    free = shutil.disk_usage(self.folder).free
    if free < needed:
      raise InputError(
        f"{self.folder} has {free / 2**30:.2f} GiB free, but {needed / 2**30:.2f} GiB are needed "
        f"for checkpoints of {size / 2**30:.2f} GiB each; free some space, choose another workdir, "
        "or lower config.keep_checkpoints."
      )

  def save(self, state: Any, config: dict) -> None:
    """Starts writing a checkpoint in the background; `close` or the next save waits for it.

    Args:
      state: a task's state: a dataclass with `step`, `params`, `ema` (name -> tree) and more.
      config: plain nested dict.
    """
    step = int(state.step)
    if self._manager.latest_step() == step:
      return
    items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
    items["config"] = ocp.args.JsonSave(config)
    if not self._manager.save(step, args=ocp.args.Composite(**items)):
      raise RuntimeError(f"The checkpoint of step {step} was not written to {self.folder}.")

  def restore(self, step: int, state: Any) -> Any:
    """Reads a checkpoint.

    Args:
      step: which one.
      state: the state as `jax.ShapeDtypeStruct` with shardings: what to make of the files, on
        however many devices there are now.

    Returns:
      The state as arrays.
    """
    items = {name: ocp.args.StandardRestore(tree) for name, tree in _items(state).items()}
    restored = self._manager.restore(step, args=ocp.args.Composite(**items))
    ema = {name: restored[f"ema_{name}"] for name in state.ema}
    return dataclasses.replace(restored["training"], params=restored["params"], ema=ema)

  def close(self) -> None:
    """Waits for what is being written."""
    self._manager.wait_until_finished()
    self._manager.close()


def _items(state: Any) -> dict[str, Any]:
  emas = {f"ema_{name}": tree for name, tree in state.ema.items()}
  training = dataclasses.replace(state, params=None, ema=None)
  return {"params": state.params, "training": training, **emas}


def restore_item(workdir: Path, item: str, like: Any, step: int | None = None) -> tuple[Any, int]:
  """One item of a checkpoint alone: the EMA for sampling, a tokenizer's parameters for encoding.

  Args:
    workdir: a training's workdir.
    item: "params", or "ema_" and the name of one.
    like: pytree of `jax.ShapeDtypeStruct` with shardings.
    step: which checkpoint; the newest if None.

  Returns:
    (pytree of arrays, step).

  Raises:
    InputError: there is no such checkpoint or item.
  """
  folder = Path(workdir).absolute() / "checkpoints"
  steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
  if not steps or (step is not None and step not in steps):
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise InputError(
      f"{folder} holds {wanted} (there: {steps or 'none'}); train first with python -m launch.train"
    )
  step = steps[-1] if step is None else step
  if not (folder / str(step) / item).is_dir():
    raise InputError(f"The checkpoint {folder / str(step)} has no {item}.")
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(epath.Path(folder / str(step) / item), like), step


def save_weights(workdir: Path, params: Any, config: dict) -> None:
  """Makes a workdir of weights alone, for encoding, sampling and evaluating; whole or not at all.

  Args:
    workdir: a folder that does not exist, or is empty.
    params: pytree of arrays, as a task's state has them.
    config: plain nested dict.

  Raises:
    InputError: the disk has no room for them.
  """
  workdir = Path(workdir).absolute()
  workdir.parent.mkdir(parents=True, exist_ok=True)
  size = sum(x.nbytes for x in jax.tree.leaves(params))
  if (free := shutil.disk_usage(workdir.parent).free) < size:
    raise InputError(
      f"{workdir.parent} has {free / 2**30:.2f} GiB free, but {size / 2**30:.2f} GiB are needed; "
      "free some space, or choose another folder."
    )
  partial = workdir.with_name(f".{workdir.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    write_json(partial / "config.json", config)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(epath.Path(partial / "checkpoints" / _CONVERTED / "params"), params)
    partial.rename(workdir)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def read_config(workdir: Path) -> dict:
  """The configuration that a workdir was trained with.

  Raises:
    InputError: the folder is not a training's workdir.
  """
  path = Path(workdir) / "config.json"
  if not path.is_file():
    raise InputError(
      f"{workdir} is not a training's workdir: it has no config.json; give the folder that "
      "python -m launch.train wrote with --workdir."
    )
  return json.loads(path.read_text())
