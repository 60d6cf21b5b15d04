"""The tokenizer's training under the reference's names: state, losses and gradients.

The reference is the LightningModule of `vavae/ldm/models/autoencoder.py` with the losses of
`contperceptual.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from vavae_jax import convert as vae
from vavae_jax import update
from vavae_jax.common import functional
from vavae_jax.common.optimizer import make_optimizer
from vavae_jax.stages import Phase
from vavae_jax.teachers import teacher_from_torch
from vavae_jax.warm_start import PROJECTION, from_state_dict
from vavae_jax.weights.torch_weights import StateDict

# Prefixes of the networks in the reference's LightningModule.
_TEACHER, _LPIPS, _JUDGE = "foundation_model.model.", "loss.perceptual_loss.", "loss.discriminator."
# The reference's names of logged values -> ours.
LOGGED = {
  "total_loss": "loss",
  "kl_loss": "kl",
  "nll_loss": "nll",
  "d_weight": "disc_weight",
  "g_loss": "g_loss",
  "vf_loss": "vf",
  "vf_weight": "vf_weight",
  "disc_loss": "d_loss",
  "logits_real": "logits_real",
  "logits_fake": "logits_fake",
}


def run(
  config: FrozenConfigDict,
  steps: int,
  state_dict: Mapping[str, np.ndarray],
  inputs: Mapping[str, np.ndarray],
) -> dict[str, Any]:
  """Steps of both optimizers, in float32, of a training with one stage.

  Args:
    state_dict: of the reference's LightningModule, with the loss and the teacher.
    inputs: "image_I" uint8 [B,3,H,W] and "noise_I" [B,Z,h,w] for each step I.

  Returns:
    "loss/I_NAME" for values that the reference logs, "gradient/NAME" of the first step,
    "parameter/NAME" after the last one.
  """
  networks = {
    "teacher": teacher_from_torch("dinov2_vitl14", _under(_TEACHER, state_dict)),
    "perceptual": vae.lpips_from_torch(_under(_LPIPS, state_dict)),
  }
  graphs, frozen = zip(*(nnx.split(network) for network in networks.values()), strict=True)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: update.State, frozen: Any, batch: Any, noise: jax.Array) -> Any:
    merged = map(nnx.merge, graphs, frozen)
    named = dict(zip(networks, merged, strict=True))
    return update.update(config, Phase(0, gan=True), state, named, batch, noise)

  state = training_state(config, state_dict)
  before = jax.device_get(state.discriminator_statistics)
  out: dict[str, Any] = {}
  for i in range(steps):
    arrays = (inputs[f"{name}_{i}"] for name in ("image", "noise"))
    image, noise = (jnp.asarray(np.moveaxis(array, 1, -1)) for array in arrays)
    state, metrics = step(state, frozen, {"image": image}, noise)
    out |= {f"loss/{i}_{theirs}": metrics[ours] for theirs, ours in LOGGED.items()}
    if i == 0:
      out |= _prefixed("gradient/", first_gradients(config, state, before))
  after = jax.device_get((state.params, state.discriminator, state.discriminator_statistics))
  return out | _prefixed("parameter/", training_names(config, *after))


def training_state(config: FrozenConfigDict, state_dict: Mapping[str, np.ndarray]) -> update.State:
  """The state before the first step, from the weights of the reference's LightningModule."""
  others = ("loss.", "foundation_model.")
  own = {name: x for name, x in state_dict.items() if not name.startswith(others)}
  params = jax.tree.map(jnp.asarray, from_state_dict(own, config.model))
  judge = vae.discriminator_from_torch(_under(_JUDGE, state_dict))
  weights, statistics = (
    jax.tree.map(jnp.asarray, nnx.to_pure_dict(part))
    for part in nnx.split(judge, nnx.Param, nnx.BatchStat)[1:]
  )
  optimizer = make_optimizer(config.optimizer)
  return update.State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema={},
    optimizer=optimizer.init(params),
    discriminator=weights,
    discriminator_statistics=statistics,
    discriminator_optimizer=optimizer.init(weights),
  )


def first_gradients(config: FrozenConfigDict, state: update.State, statistics: Any) -> StateDict:
  """The gradients of the first step by the reference's names, from Adam's moments after it."""
  moments = (state.optimizer, state.discriminator_optimizer)
  mu, judge_mu = (jax.device_get(optax.tree.get(x, "mu")) for x in moments)
  named = training_names(config, mu, judge_mu, statistics)
  share = 1 - config.optimizer.b1
  return {name: x / share for name, x in named.items() if "running_" not in name}


def training_names(
  config: FrozenConfigDict, params: Any, discriminator: Any, statistics: Any
) -> StateDict:
  """Trees like a training's parameters, under the names of the reference's LightningModule."""
  graph = functional.graph_of(update.build_autoencoder(config))
  judge = functional.graph_of(update.build_discriminator(config))
  named = vae.autoencoder_to_torch(nnx.merge(graph, params["autoencoder"]))
  projection = params["projection"]
  named[f"{PROJECTION}weight"] = np.asarray(projection["kernel"]).T[:, :, None, None]
  if "bias" in projection:
    named[f"{PROJECTION}bias"] = np.asarray(projection["bias"])
  merged = vae.discriminator_to_torch(nnx.merge(judge, discriminator, statistics))
  counters = "num_batches_tracked"
  return named | _prefixed(_JUDGE, {k: x for k, x in merged.items() if not k.endswith(counters)})


def _under(prefix: str, tensors: Mapping[str, np.ndarray]) -> StateDict:
  return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def _prefixed(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
  return {prefix + name: x for name, x in tensors.items()}
