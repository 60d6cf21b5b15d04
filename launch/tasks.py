"""The table of tasks: the module that trains each, and how its configuration is resolved.

Not in `launch/engine`, which imports no model. `engine.loop.Task` says what a module has to offer.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
import lightningdit_jax.training
import vavae_jax.classification
import vavae_jax.training
from launch.engine import configuration
from vavae_jax import stages
from vavae_jax.common.errors import InputError
from vavae_jax.data import selection

TASKS: dict[str, Any] = {
  "tokenizer": vavae_jax.training,
  "diffusion": lightningdit_jax.training,
  "classifier": vavae_jax.classification,
}


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
  return configuration.resolve(config, configs.base.KEYS[config.task])


def resolve(config: ConfigDict, num_images: int | None = None) -> FrozenConfigDict:
  """`frozen`, and the epochs of a tokenizer's stages turned into steps.

  An epoch has `num_images` pictures; None: as many as the configuration's source has.

  Raises:
    InputError: see `frozen`; or the source or the stages do not fit.
  """
  resolved = frozen(config)
  if config.task != "tokenizer":
    return resolved
  if num_images is None:
    num_images = len(selection.training_pictures(resolved)[1])
  return stages.with_steps(resolved, num_images)
