"""What a training begins with where `config.init_from` names it: a run, or a file of weights.

Weights are taken over, moments, moving averages and the tokenizer's discriminator start afresh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import FrozenConfigDict

import lightningdit_jax.warm_start
import vavae_jax.warm_start
from launch import restore
from launch.engine import console
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place
from vavae_jax.common.optimizer import start_emas
from vavae_jax.weights.state_dicts import SUFFIXES, read_state_dict

PARTS: dict[str, Any] = {
  "tokenizer": vavae_jax.warm_start,
  "diffusion": lightningdit_jax.warm_start,
}


def initial_weights(config: FrozenConfigDict) -> Callable[[Any], Any]:
  """Reads the weights of `config.init_from`.

  Args:
    config: of a training.

  Returns:
    A function from a fresh state to one with these weights, in the averages too.

  Raises:
    InputError: nothing there, nothing that can be read, or, when the function is called, weights of
      another architecture.
  """
  path = place(config.init_from)
  given = _params_of(path, config)

  def adopt(state: Any) -> Any:
    params, notes = PARTS[config.task].adapt(state.params, given)
    for note in notes:
      console.say(f"initial weights: {note}")
    console.say(f"initial weights: from {path}")
    emas = start_emas(params, config.optimizer.ema_decays)
    return dataclasses.replace(state, params=params, ema=emas)

  return adopt


def _params_of(path: Path, config: FrozenConfigDict) -> Any:
  if path.is_dir():
    # As in the reference the weights themselves, whose averages begin anew.
    return restore.load(path, config.task, ema=0.0).params
  if not path.is_file():
    raise InputError(
      f"config.init_from is {path}, which does not exist; give a training's workdir, or a file of "
      f"weights ({', '.join(SUFFIXES)})."
    )
  stored = read_state_dict(path)
  return PARTS[config.task].from_state_dict(stored, config.model)
