"""Decoupled MeanFlow: a trained flow learns whole steps, so that a few of them make a sample.

The first `Options.dmf_depth` blocks see the time t at which a step begins, the others and the final
layer the time s >= t at which it ends. Where both are t this is the flow itself, whose weights are
thus where training begins. The mean velocity u of a step, x(s) = x(t) + (s - t) u(x(t), t, s),
fulfils

  u = v + (s - t) du/dt,    d/dt along the flow: x moves by its velocity v, t by 1, s stays.

The right side is the target, by a Jacobian-vector product without gradient. Half of the loss is of
such steps, half of the flow at single times, both in v led away from what the model says without
label, so that samples need no guidance.

Time runs from data to noise there: their t is 1 - t here, and velocities have the other sign.

Here the loss of a sample has its own log variance; there, by shapes that broadcast, it is the mean
over those of all samples of a GPU.

Source: Lee, Yu and Shin, arXiv 2510.24474, `loss.py` and `models/dmft.py` of kyungmnlee/dmf; Geng
et al., MeanFlow, arXiv 2505.13447.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import FrozenConfigDict

from lightningdit_jax import platforms, transport
from lightningdit_jax.model import LightningDiT, build_model
from vavae_jax.common import functional

CAUCHY = 0.01  # errors far below this share of their scale weigh alike


class Steps(NamedTuple):
  """What training draws of each latent beside a point of the flow."""

  noise_BhwZ: jax.Array
  t_B: jax.Array  # where a step begins
  end_B: jax.Array  # and ends, not before


class Networks(NamedTuple):
  """A model for gradients; the same weights without; and these where forward mode is possible."""

  learning: Any
  fixed: Any
  forward: Any


def drawn(config: FrozenConfigDict, key: jax.Array, shape: tuple[int, ...]) -> Steps:
  """Noise and times for latents of this shape [B, h, w, Z], by the step's key."""
  key_noise, *keys = jax.random.split(jax.random.fold_in(key, 4), 3)  # `routing` has 3
  mus = (config.transport.map_mu, config.transport.map_end_mu)
  times = [
    transport.sample_time(key, shape[0], shifted_mu=mu) for key, mu in zip(keys, mus, strict=True)
  ]
  return Steps(jax.random.normal(key_noise, shape), jnp.minimum(*times), jnp.maximum(*times))


def networks(config: FrozenConfigDict, params: Any) -> Networks:
  """A training's model with these parameters; fused attention has no forward mode."""

  def forward(rngs: nnx.Rngs) -> LightningDiT:
    return LightningDiT(**platforms.fitted(config) | {"attention": "xla"}, rngs=rngs)

  graph, fixed = functional.graph_of(build_model(config)), jax.lax.stop_gradient(params)
  apart = functional.graph_of(forward)
  return Networks(*map(nnx.merge, (graph, graph, apart), (params, fixed, fixed)))


def losses(
  config: FrozenConfigDict,
  models: Networks,
  latent_BhwZ: jax.Array,
  noise_BhwZ: jax.Array,
  t_B: jax.Array,
  label_B: jax.Array,
  steps: Steps,
) -> dict[str, jax.Array]:
  """Per-sample losses [B] of the linear path's velocity: "cauchy", that of training, and the mean
  squared errors in it, "mse" at the times t of the flow and "map_mse" of the steps.
  """
  settings, null = config.transport, config.model.num_classes

  def target(x: jax.Array, noise: jax.Array, t_B: jax.Array, labelled: jax.Array) -> jax.Array:
    """The velocity to be learnt, led away from what the model says without label."""
    velocity = latent_BhwZ - noise
    if not settings.map_guidance:
      return velocity
    towards = labelled - models.fixed(x, t_B, jnp.full_like(label_B, null))
    on_B = (t_B >= settings.map_guidance_start) & (label_B != null)
    return velocity + jnp.where(_aligned(on_B), settings.map_guidance * towards, 0)

  x = transport.interpolate(latent_BhwZ, noise_BhwZ, t_B)
  v = models.learning(x, t_B, label_B)
  flow_B = _error(v, target(x, noise_BhwZ, t_B, jax.lax.stop_gradient(v)))

  noise, t, end = steps
  x = transport.interpolate(latent_BhwZ, noise, t)
  v = target(x, noise, t, models.fixed(x, t, label_B))
  along = (v, jnp.ones_like(t))
  _, du_dt = jax.jvp(lambda x, t: models.forward(x, t, label_B, end_B=end), (x, t), along)
  map_B = _error(models.learning(x, t, label_B, end_B=end), v + _aligned(end - t) * du_dt)

  def cauchy(error_B: jax.Array, *times: jax.Array) -> jax.Array:
    log_variance_B = models.learning.log_variance(*times)
    return jnp.log(jnp.exp(-log_variance_B) * error_B + CAUCHY) + log_variance_B

  loss_B = 0.5 * (cauchy(flow_B, t_B, t_B) + cauchy(map_B, t, end))
  return {"cauchy": loss_B, "mse": flow_B, "map_mse": map_B}


def towards(model: Any, end: jax.Array | None) -> Any:
  """The function of (x, t [B], label) that gives the mean velocity until the time `end`, a scalar;
  the model itself where there is no model, or no end.
  """
  if model is None or end is None:
    return model
  predict: Callable[..., jax.Array] = model
  return lambda x, t_B, label_B: predict(x, t_B, label_B, end_B=jnp.broadcast_to(end, t_B.shape))


def _aligned(x_B: jax.Array) -> jax.Array:
  return x_B[:, None, None, None]


def _error(a_BhwZ: jax.Array, b_BhwZ: jax.Array) -> jax.Array:
  return jnp.mean((a_BhwZ - b_BhwZ) ** 2, axis=(1, 2, 3))
