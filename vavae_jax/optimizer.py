"""The optimizer of both trainings: Adam(W) with an optional warm-up, cosine decay and clipping."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import FrozenConfigDict

from vavae_jax.errors import InputError


def learning_rate(config: FrozenConfigDict) -> optax.Schedule:
  """The schedule: linear warm-up, then constant, or cosine to zero at `decay_steps` if that is set.

  Args:
    config: `learning_rate`, `warmup_steps`, `decay_steps`.

  Returns:
    A function of the step.

  Raises:
    InputError: the warm-up does not end before the decay.
  """
  if 0 < config.decay_steps <= config.warmup_steps:
    raise InputError(
      f"config.optimizer.decay_steps is {config.decay_steps}, but the warm-up alone takes "
      f"{config.warmup_steps} steps; lower warmup_steps, or set decay_steps to 0 for no decay."
    )
  if config.decay_steps:
    return optax.warmup_cosine_decay_schedule(
      0.0 if config.warmup_steps else config.learning_rate,
      config.learning_rate,
      config.warmup_steps,
      config.decay_steps,
    )
  return optax.linear_schedule(
    0.0 if config.warmup_steps else config.learning_rate,
    config.learning_rate,
    max(config.warmup_steps, 1),
  )


def make_optimizer(config: FrozenConfigDict, start: int = 0) -> optax.GradientTransformation:
  """AdamW as configured; eps 1e-8, float32 moments.

  Args:
    config: `learning_rate`, `b1`, `b2`, `weight_decay`, `warmup_steps`, `decay_steps`, `clip_norm`.
    start: step of the schedule at which the first update is made.

  Returns:
    An optax transformation of gradients into updates.
  """
  schedule = learning_rate(config)
  adam = optax.adamw(
    lambda count: schedule(count + start),
    b1=config.b1,
    b2=config.b2,
    weight_decay=config.weight_decay,
  )
  if config.clip_norm:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)
  return adam


def update_ema(ema: Any, params: Any, decay: float) -> Any:
  """One step of the moving average, from step 0 and without debiasing; None stays None.

  Args:
    ema: the average so far, or None where there is none.
    params: the new parameters.
    decay: share of the old average that stays.

  Returns:
    The new average.
  """
  return None if ema is None else optax.incremental_update(params, ema, 1 - decay)


def start_ema(params: Any, decay: float) -> Any:
  """A copy of the parameters to average into, or None where `decay` is 0."""
  return jax.tree.map(jnp.copy, params) if decay else None
