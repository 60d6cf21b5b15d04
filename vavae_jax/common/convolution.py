"""Convolutions as the compilers of CPUs and TPUs take them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vavae_jax.common.sharding import platform


def convolve(
  x_BhwD: jax.Array,
  kernel_pqDF: jax.Array,
  strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  *,
  precision: Any = None,
  **options: Any,
) -> jax.Array:
  """As jax.lax.conv_general_dilated, for `nnx.Conv(conv_general_dilated=convolve)`.

  On CPUs XLA convolves in plain loops, 20 to 50 times as slow, where the map before or behind a
  convolution is smaller than its kernel (backward they change places). There the pixels that each
  output sees are laid side by side for a product.
  """
  sides, sizes = x_BhwD.shape[1:-1], kernel_pqDF.shape[:-2]
  if isinstance(padding, str):
    padding = jax.lax.padtype_to_pads(sides, sizes, strides, padding)
  counts = [
    (side + sum(pads) - size) // stride + 1
    for side, pads, size, stride in zip(sides, padding, sizes, strides, strict=True)
  ]
  small = any(min(pair) < size for *pair, size in zip(sides, counts, sizes, strict=True))
  spread = {*options.get("lhs_dilation", ()), *options.get("rhs_dilation", ())}
  if platform() != "cpu" or not small or {options.get("feature_group_count", 1), *spread} > {1}:
    return jax.lax.conv_general_dilated(
      x_BhwD, kernel_pqDF, strides, padding, precision=precision, **options
    )
  x_BhwD = jnp.pad(x_BhwD, ((0, 0), *padding, (0, 0)))
  seen = [
    x_BhwD[:, *(slice(at, at + n * s, s) for at, n, s in zip(place, counts, strides, strict=True))]
    for place in itertools.product(*map(range, sizes))
  ]
  kernel = kernel_pqDF.reshape(-1, kernel_pqDF.shape[-1])
  return jnp.matmul(jnp.concatenate(seen, -1), kernel, precision=precision)


@jax.custom_vjp
def apart(x: jax.Array) -> jax.Array:
  """x; in training no sum over it, such as a norm's, joins the fusion that makes it, nor its
  gradient's.

  libtpu 0.0.42 crashes (signal 11) for v6e and tpu7x where a sum joins a convolution of a dilated
  map. Without gradients it does not.
  """
  return x


def _grad(_: None, grad: jax.Array) -> tuple[jax.Array]:
  return (jax.lax.optimization_barrier(grad),)


apart.defvjp(lambda x: (jax.lax.optimization_barrier(x), None), _grad)
