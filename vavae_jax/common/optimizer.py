"""What both trainings do with gradients: parts of a batch, clipping, Adam(W), moving averages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from vavae_jax.common import muon
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import pin_batch

S = TypeVar("S", bound="State")


def learning_rate(config: FrozenConfigDict) -> optax.Schedule:
  """The schedule: linear warm-up, then constant, or cosine to zero at `decay_steps` if that is set.

  InputError if the warm-up does not end before the decay.
  """
  if 0 < config.decay_steps <= config.warmup_steps:
    raise InputError(
      f"config.optimizer.decay_steps is {config.decay_steps}, but the warm-up alone takes "
      f"{config.warmup_steps} steps; lower warmup_steps, or set decay_steps to 0 for no decay."
    )
  peak, warmup = config.learning_rate, config.warmup_steps
  start = 0.0 if warmup else peak
  if config.decay_steps:
    return optax.warmup_cosine_decay_schedule(start, peak, warmup, config.decay_steps)
  return optax.linear_schedule(start, peak, max(warmup, 1))


def make_optimizer(
  config: FrozenConfigDict, step: jax.Array | None = None
) -> optax.GradientTransformation:
  """AdamW as `config.optimizer` says, with Muon for blocks' matrices if that says so; eps 1e-8,
  float32 moments.

  `step` is that of the schedule, if it is not the number of updates made before.
  """
  schedule = learning_rate(config)

  def rate(count: jax.Array) -> jax.typing.ArrayLike:
    return schedule(count if step is None else step)

  adam = optax.adamw(rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay)
  if config.get("muon"):  # a diffusion model's key
    adam = muon.beside(adam, rate, config.weight_decay)
  if not config.clip_norm:
    return adam
  clip = optax.clip_by_global_norm(config.clip_norm)

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return adam.update(clip.update(grads, optax.EmptyState())[0], state, params)

  # No chain, whose state would differ from Adam's: a training may begin to clip where it goes on.
  return optax.GradientTransformation(adam.init, update)


@flax.struct.dataclass
class State:
  """All that the training of a network changes."""

  step: jax.Array  # int32 scalar, updates done
  params: Any
  ema: Any  # moving averages of params by `ema_name`
  optimizer: Any  # Adam's moments of params


def start(config: FrozenConfigDict, params: Any) -> State:
  """The state before the first step."""
  emas = start_emas(params, config.ema_decays)
  return State(jnp.zeros((), jnp.int32), params, emas, make_optimizer(config).init(params))


def step(
  config: FrozenConfigDict, state: S, grads: Any, mask: Callable[[Any], Any] = lambda x: x
) -> S:
  """The state after a step by these gradients; `mask` is applied to the updates of params."""
  updates, optimizer = make_optimizer(config).update(grads, state.optimizer, state.params)
  params = optax.apply_updates(state.params, mask(updates))
  ema = update_emas(state.ema, params)
  return dataclasses.replace(
    state, step=state.step + 1, params=params, ema=ema, optimizer=optimizer
  )


def start_emas(params: Any, decays: Sequence[float]) -> dict[str, Any]:
  """Copies of the parameters to average into, one for each decay, by `ema_name`."""
  return {ema_name(decay): jax.tree.map(jnp.copy, params) for decay in decays}


def update_emas(emas: dict[str, Any], params: Any) -> dict[str, Any]:
  """One step of each moving average, from step 0 and without debiasing."""
  return {
    name: optax.incremental_update(params, ema, 1 - float(name)) for name, ema in emas.items()
  }


def ema_name(decay: float) -> str:
  """The name of a decay's average in a state and in checkpoints: "0.9999"."""
  return repr(float(decay))


def averaged(config: FrozenConfigDict, state: Any) -> Any:
  """The parameters that inference uses: the average of the first decay, or if there is none the
  parameters themselves.
  """
  return state.ema[ema_name(config.ema_decays[0])] if config.ema_decays else state.params


def mean_gradients(
  loss_fn: Callable[[Any, Any], tuple[jax.Array, Any]], params: Any, batch: Any, count: int
) -> tuple[Any, Any]:
  """Gradients of a mean over a batch, taken in `count` parts one after the other to save memory.

  `loss_fn` maps (params, batch) to (mean over the batch, pytree of scalars that are such means
  too); the batch is a pytree of arrays [B, ...], B a multiple of `count`. Returns (gradients, the
  pytree of scalars).
  """
  gradients_of = jax.grad(loss_fn, has_aux=True)
  if count == 1:
    return gradients_of(params, batch)

  def split(x: jax.Array) -> jax.Array:
    # Every count-th record: a part lies on all devices as the batch does, and nothing moves.
    return jnp.swapaxes(x.reshape(len(x) // count, count, *x.shape[1:]), 0, 1)

  def add_part(total: Any, part: Any) -> tuple[Any, None]:
    part = jax.tree.map(pin_batch, part)
    return jax.tree.map(jnp.add, total, gradients_of(params, part)), None

  parts = jax.tree.map(split, batch)
  first = jax.eval_shape(gradients_of, params, jax.tree.map(lambda x: x[0], parts))
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
  total, _ = jax.lax.scan(add_part, zeros, parts)
  return jax.tree.map(lambda x: x / count, total)
