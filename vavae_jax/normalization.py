"""GroupNorm, alone or with swish, that reads its input as seldom as it can: for TPUs.

XLA fuses the sums here into the convolutions that make the input and its gradient, and the rest
into those that take the results. So they are one pass, E[x^2] - E[x]^2, which errs by about
2^-22 (1 + mean^2 / variance) of the variance: less than products of bfloat16, TPUs' default, up to
a mean of 90 deviations. Beyond 2,000 nothing of the variance is left: it counts as 2^-22 mean^2, so
that results become small, where a number near 0 by chance would make them huge. Centring on one of
the input's values would be exact, but that has to be there before the sums, in one pass more.

Sums are of channels, and then of groups, since an array [..., groups, channels of a group] has its
channels spread over lanes. The backward pass keeps the input and the statistics and computes what
lies between again.

Source: Wu & He, arXiv 1803.08494.
"""

from __future__ import annotations

import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from vavae_jax.common.sharding import platform

_ROUNDING = 2**-22  # of E[x^2], as far as it shows in the variance
Statistics = tuple[jax.Array, jax.Array]  # mean and 1 / deviation, [B, 1, 1, D]


def normalized(norm: nnx.GroupNorm | None, x_BhwD: jax.Array, *, swish: bool = False) -> jax.Array:
  """norm(x), then swish if wanted; float32, and on TPUs by `group_norm`. None leaves x as it is."""
  if norm is None:
    return x_BhwD
  if platform() == "tpu":
    scale_D, bias_D = (jnp.asarray(cast(nnx.Param, a)[...]) for a in (norm.scale, norm.bias))
    return group_norm(x_BhwD, scale_D, bias_D, norm.num_groups, norm.epsilon, swish)
  y_BhwD = norm(x_BhwD)
  return nnx.swish(y_BhwD) if swish else y_BhwD


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def group_norm(
  x_BhwD: jax.Array,
  scale_D: jax.Array,
  bias_D: jax.Array,
  groups: int,
  epsilon: float,
  swish: bool,
) -> jax.Array:
  """GroupNorm over positions and D / `groups` channels each, then swish if wanted.

  All is computed in float32, also of other inputs; `epsilon` is added to the variance.
  """
  return _forward(x_BhwD, scale_D, bias_D, groups, epsilon, swish)[0]


def _forward(
  x_BhwD: jax.Array,
  scale_D: jax.Array,
  bias_D: jax.Array,
  groups: int,
  epsilon: float,
  swish: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array, Statistics]]:
  statistics = _statistics(x_BhwD, groups, epsilon)
  y_BhwD = _normal(x_BhwD, statistics) * scale_D + bias_D
  if swish:
    y_BhwD *= jax.nn.sigmoid(y_BhwD)
  return y_BhwD, (x_BhwD, scale_D, bias_D, statistics)


def _backward(
  groups: int,
  epsilon: float,
  swish: bool,
  kept: tuple[jax.Array, jax.Array, jax.Array, Statistics],
  cotangent_BhwD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  del epsilon
  x_BhwD, scale_D, bias_D, statistics = kept
  normal_BhwD = _normal(x_BhwD, statistics)
  slope_BhwD = cotangent_BhwD
  if swish:
    y_BhwD = normal_BhwD * scale_D + bias_D
    gate_BhwD = jax.nn.sigmoid(y_BhwD)
    slope_BhwD *= gate_BhwD * (1 + y_BhwD * (1 - gate_BhwD))
  sums = [jnp.sum(a, (1, 2), keepdims=True) for a in (slope_BhwD, slope_BhwD * normal_BhwD)]
  count = x_BhwD[0].size / groups
  level_B11D, tilt_B11D = (_of_groups(a * scale_D, groups) / count for a in sums)
  pulled_BhwD = slope_BhwD * scale_D - level_B11D - normal_BhwD * tilt_B11D
  bias_grad_D, scale_grad_D = (jnp.sum(a, (0, 1, 2)) for a in sums)
  return (statistics[1] * pulled_BhwD).astype(x_BhwD.dtype), scale_grad_D, bias_grad_D


group_norm.defvjp(_forward, _backward)


def _normal(x_BhwD: jax.Array, statistics: Statistics) -> jax.Array:
  mean_B11D, inverse_B11D = statistics
  return (x_BhwD.astype(jnp.float32) - mean_B11D) * inverse_B11D


def _statistics(x_BhwD: jax.Array, groups: int, epsilon: float) -> Statistics:
  """Of each channel those of its group; the variance is E[x^2] - E[x]^2, or what rounds off it."""
  x_BhwD = x_BhwD.astype(jnp.float32)
  count = x_BhwD[0].size / groups
  sums = (jnp.sum(a, (1, 2), keepdims=True) for a in (x_BhwD, jnp.square(x_BhwD)))
  mean_B11D, square_B11D = (_of_groups(a, groups) / count for a in sums)
  far_B11D = jnp.square(mean_B11D)
  variance_B11D = jnp.maximum(square_B11D - far_B11D, _ROUNDING * far_B11D)
  return mean_B11D, jax.lax.rsqrt(variance_B11D + epsilon)


def _of_groups(sums_B11D: jax.Array, groups: int) -> jax.Array:
  """The sum of each channel's group, for each channel."""
  sums_B11gd = sums_B11D.reshape(*sums_B11D.shape[:3], groups, -1)
  return jnp.broadcast_to(sums_B11gd.sum(-1, keepdims=True), sums_B11gd.shape).reshape(
    sums_B11D.shape
  )
