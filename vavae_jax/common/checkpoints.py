"""Reads the checkpoints of a training's workdir; `launch.engine.checkpoint` writes them.

The only file that imports orbax. A checkpoint is compared with its manifest before it is used.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import FrozenConfigDict

from vavae_jax.common import manifest, mesh
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import Place, is_url
from vavae_jax.common.functional import check_finite
from vavae_jax.common.optimizer import ema_name

_STEP = re.compile("0|[1-9][0-9]*")

# Orbax logs the traceback of a failure in the background, twice, and raises it as well.
logging.get_absl_logger().addFilter(
  lambda record: not (record.exc_info and "orbax" in record.pathname)
)


@functools.cache
def orbax() -> Any:
  """Imported when needed: it takes half a second, for which no --help should wait."""
  import orbax.checkpoint

  return orbax.checkpoint


def steps_of(workdir: Path) -> list[int]:
  """The steps of a workdir's checkpoints, ascending; they may be damaged."""
  return steps_in(folder_of(workdir))


def folder_of(workdir: Path) -> Place:
  """Where a workdir's checkpoints lie; InputError for a name that cannot hold any."""
  if is_url(workdir):
    return Place(workdir) / "checkpoints"
  whole = str(Path(workdir).absolute())
  # TensorStore reads these otherwise, or not at all.
  if "\\" in whole or ":/" in f"{whole}/" or whole.encode(errors="replace").decode() != whole:
    raise InputError(
      f"{whole} cannot hold checkpoints: a path with a backslash, with a folder whose name ends in "
      "a colon, or not in UTF-8 is not possible. Rename the folder, or choose another one."
    )
  return Place(whole) / "checkpoints"


def steps_in(folder: Place) -> list[int]:
  """The steps of the checkpoints in a folder, ascending."""
  if not folder.is_dir():
    return []
  return sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name))


def restore_item(
  workdir: Path,
  item: str,
  like: Any,
  step: int | None = None,
  say: Callable[[str], None] = print,
) -> tuple[Any, int]:
  """Reads one item of a checkpoint, the newest undamaged one if `step` is None; (item, step).

  `item` is "params", or "ema_" and the name of one; `like` has `jax.ShapeDtypeStruct` with
  shardings, or None for an entry that is to be as the checkpoint has it; `say` is told of damaged
  checkpoints.
  """
  folder = folder_of(workdir)
  steps = steps_in(folder)
  if not steps or (step is not None and step not in steps):
    wanted = "no checkpoint" if step is None else f"no checkpoint of step {step}"
    raise InputError(
      f"{folder} holds {wanted} (there: {steps or 'none'}); train first with python -m launch.train"
    )
  for chosen in reversed(steps) if step is None else [step]:
    path = folder / str(chosen)
    if not (wrong := manifest.damage(path, item)):
      break
    say(f"warning: the checkpoint {path} is damaged: {wrong}")
  else:
    raise InputError(
      f"{folder} has no other checkpoint that is sound; train on, or copy one there."
    )
  if not (path / item).is_dir():
    raise InputError(f"The checkpoint {path} has no {item}.")
  with orbax().StandardCheckpointer() as checkpointer:
    if unknown := [name for name, tree in like.items() if tree is None]:
      there = checkpointer.metadata(path / item).item_metadata.tree
      where = jax.tree.leaves(like)[0].sharding
      shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), there)
      like = {**like, **{name: shapes[name] for name in unknown}}
    restored = checkpointer.restore(path / item, like)
  check_finite(restored, f"{item} of the checkpoint {path}")
  return restored, chosen


def load_weights(
  workdir: Path,
  config: FrozenConfigDict,
  init_state: Callable[[FrozenConfigDict, Any], Any],
  step: int | None = None,
  ema: float | None = None,
  say: Callable[[str], None] = print,
) -> tuple[Any, int, float]:
  """What inference needs of a training: its averaged parameters on every device, step and decay.

  Args:
    init_state: of the training's task.
    step: of the checkpoint; the newest if None.
    ema: decay of the wanted average, 0 for the parameters themselves; None: the first one of
      `config.optimizer.ema_decays`, or where there is none the parameters.

  Raises:
    InputError: there is no such checkpoint or average, or the configuration makes no model.
  """
  try:
    state = jax.eval_shape(functools.partial(init_state, config), jax.random.key(0))
  except (AttributeError, KeyError, TypeError) as error:
    raise InputError(
      f"{workdir}: its config.json does not describe a model of this version ({error}); bring back "
      "the file as it was."
    ) from error
  decays = config.optimizer.ema_decays
  if ema is None:
    ema = decays[0] if decays else 0.0
  elif ema and ema not in decays:
    raise InputError(
      f"{workdir} keeps no average of decay {ema}, only {decays or 'none'}; 0 stands for the "
      "parameters themselves."
    )
  item = f"ema_{ema_name(ema)}" if ema else "params"
  everywhere = mesh.replicated(mesh.make_mesh())
  like = jax.tree.map(lambda x: x.update(sharding=everywhere), state.params)
  params, step = restore_item(workdir, item, like, step, say)
  return params, step, ema
