"""States of a diffusion training, from the reference's checkpoints to ours and back.

A checkpoint of its `train.py` has the weights, their average, and AdamW's moments by the numbers of
parameters; buffers have none.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from lightningdit_jax import convert, warm_start
from lightningdit_jax.model import build_model
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import State, ema_name, start
from vavae_jax.weights.state_dicts import read_content
from vavae_jax.weights.torch_weights import StateDict

_BUFFERS = "feat_rope."
_COMPUTED = ("pos_embed", _BUFFERS)
# The reference's names of Adam's moments -> optax's.
MOMENTS = {"exp_avg": "mu", "exp_avg_sq": "nu"}


def read(path: Path, step: int, config: FrozenConfigDict) -> State:
  """Our state with all that a checkpoint of the reference holds, after `step` steps.

  Raises:
    InputError: it lacks a part, or is of another model.
  """
  content = read_content(path)
  if missing := [name for name in ("model", "ema", "opt") if name not in content]:
    raise InputError(f"{path} has no {', '.join(missing)}; give a checkpoint of its train.py.")
  names = [name for name in content["model"] if not name.startswith(_BUFFERS)]
  moments = {names[i]: values for i, values in content["opt"]["state"].items()}
  trees = {
    ours: params_of({name: x[theirs] for name, x in moments.items()}, config)
    for theirs, ours in MOMENTS.items()
  }
  state = start(config.optimizer, params_of(content["model"], config))
  count = jnp.asarray(step, jnp.int32)
  optimizer = optax.tree.set(state.optimizer, count=count, **trees)
  averages = {ema_name(decay): params_of(content["ema"], config) for decay in _decays(config)}
  state = dataclasses.replace(state, step=count, ema=averages, optimizer=optimizer)
  return jax.tree.map(jnp.copy, state)  # the count is in it more than once, and is to be donated


def write(path: Path, state: State, config: FrozenConfigDict) -> None:
  """Writes our state for `torch/whole_training.py` to go on from."""
  (decay,) = _decays(config)
  trees = {"model": state.params, "ema": state.ema[ema_name(decay)]}
  trees |= {theirs: optax.tree.get(state.optimizer, ours) for theirs, ours in MOMENTS.items()}
  named: dict[str, Any] = {
    f"{part}/{name}": x
    for part, tree in trees.items()
    for name, x in named_of(tree, config).items()
  }
  np.savez(path, step=np.asarray(state.step), **named)


def params_of(state_dict: StateDict, config: FrozenConfigDict) -> Any:
  """A tree like a training's parameters, on the device."""
  return jax.tree.map(jnp.asarray, warm_start.from_state_dict(state_dict, config.model))


def named_of(tree: Any, config: FrozenConfigDict) -> dict[str, Any]:
  """A tree like a training's parameters by the reference's names, without what is no parameter."""
  graph = functional.graph_of(build_model(config))
  tensors = convert.to_torch(nnx.merge(graph, jax.device_get(tree)))
  return {name: x for name, x in tensors.items() if not name.startswith(_COMPUTED)}


def _decays(config: FrozenConfigDict) -> tuple[float, ...]:
  if len(config.optimizer.ema_decays) != 1:
    raise InputError("The reference has one average: give one of config.optimizer.ema_decays.")
  return config.optimizer.ema_decays
