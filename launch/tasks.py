"""The table of tasks: the module that trains each, and how its configuration is resolved.

Not in `launch/engine`, which imports no model. `engine.loop.Task` says what a module has to offer;
here also `figures(config)`, the names of the numbers that its evaluators give.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
import lightningdit_jax.training
import vavae_jax.classification
import vavae_jax.training
from launch.engine import configuration
from launch.engine.checkpoint import read_config
from vavae_jax import stages
from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import Key, check
from vavae_jax.data import selection

TASKS: dict[str, Any] = {
  "tokenizer": vavae_jax.training,
  "diffusion": lightningdit_jax.training,
  "classifier": vavae_jax.classification,
}

# What launch.train adds where config.evaluate_samples draws some.
SAMPLES_FIGURE = "samples/fd_efficientnet"


def of(config: ConfigDict) -> Any:
  """The module of `config.task`; InputError where there is none of that name."""
  if config.get("task") not in TASKS:
    raise InputError(f"config.task is {config.get('task')!r}; choose one of {sorted(TASKS)}.")
  return TASKS[config.task]


def frozen(config: ConfigDict) -> FrozenConfigDict:
  """The configuration of a training, every key checked against `configs.base`; reads no data.

  Raises:
    InputError: unknown task or key, a missing key, or a value that is not possible.
  """
  of(config)
  resolved = configuration.resolve(config, configs.base.KEYS[config.task])
  _check_best(resolved)
  return resolved


def _check_best(config: FrozenConfigDict) -> None:
  """Raises InputError where `config.keep_best` is a figure that no evaluation here gives.

  Losses of training, whose names have no slash, are known to their steps alone.
  """
  name = config.keep_best.removeprefix("-")
  known = []
  if config.evaluate_every_steps:
    known = TASKS[config.task].figures(config)
    known += [SAMPLES_FIGURE] if config.get("evaluate_samples") else []
    known += ["probe/fd_efficientnet", "probe/loss"] if config.get("evaluate_probe") else []
  if "/" in name and name not in known:
    raise InputError(
      f"config.keep_best is {config.keep_best!r}, which no evaluation of this training gives; "
      f"there are: {', '.join(known) or 'none'}."
    )


def noted(workdir: Path) -> FrozenConfigDict:
  """The configuration that a training's workdir notes; one of an earlier version has fewer keys.

  Raises:
    InputError: it is no such workdir, or a value is not possible, so that it was damaged.
  """
  config = ConfigDict(read_config(workdir))
  of(config)
  path, known = workdir / configuration.NAME, configs.base.KEYS[config.task]
  if wrong := sorted(_misplaced(config, known)):
    raise InputError(
      f"{path} is damaged: a section is no section, or a value is one ({', '.join(wrong)}); bring "
      "back the file as it was."
    )
  keys, given = (dict(configuration.flat(tree)) for tree in (known, config.to_dict()))
  keys["teacher.name"] = Key("")  # somebody's own need not be registered to use what it taught
  check(keys, {name: given[name] for name in given.keys() & keys.keys()}, f"{path}: config.")
  return FrozenConfigDict(config)


def _misplaced(
  given: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterator[str]:
  """Names of sections that are no sections, and of values that are some."""
  for name in given.keys() & known.keys():
    deeper = [isinstance(tree[name], Mapping | ConfigDict) for tree in (given, known)]
    if deeper[0] != deeper[1]:
      yield prefix + name
    elif all(deeper):
      yield from _misplaced(given[name], known[name], f"{prefix}{name}.")


def resolve(
  config: ConfigDict, num_images: int | None = None, sizes: stages.Sizes | None = None
) -> FrozenConfigDict:
  """`frozen`, and the epochs of a tokenizer's stages turned into steps.

  An epoch has `num_images` pictures; None: as many as the configuration's source has. For `sizes`
  see `stages.with_steps`.

  Raises:
    InputError: see `frozen`; or the source or the stages do not fit.
  """
  resolved = frozen(config)
  if config.task != "tokenizer":
    return resolved
  if num_images is None:
    num_images = len(selection.training_pictures(resolved)[1])
  return stages.with_steps(resolved, num_images, sizes)
