"""Where models want their arrays: activations spread over the batch, weights whole where used.

All functions look for the mesh that `jax.set_mesh` sets and constrain nothing where there is none,
so that a model runs unchanged in a notebook and on a pod. Left to itself, the partitioner was seen
to choose all-to-all plans that cost twice as much.
"""

from __future__ import annotations

from typing import TypeVar

import jax
from jax.custom_derivatives import linear_call
from jax.sharding import PartitionSpec

T = TypeVar("T")

BATCH_AXES = ("data", "fsdp")


def pin_batch(x: jax.Array) -> jax.Array:
  """Keeps the leading axis of an activation [B, ...] spread over all devices of the mesh."""
  return _constrain(x, PartitionSpec(BATCH_AXES))


def whole(x: jax.Array) -> jax.Array:
  """x, entire on every device of the mesh, so that each process can read it."""
  return _constrain(x, PartitionSpec())


def gather(weights: T, dtype: jax.typing.DTypeLike, unrounded: bool = False) -> T:
  """Makes sharded float32 weights whole on every device, ready for multiplication in `dtype`.

  The cast comes first, so that the all-gather moves the compute dtype's bytes. Vectors (norm
  scales, biases) stay float32: they weigh nothing, and a bfloat16 scale near 1 moves in steps of
  0.004, which hides most updates.

  With `unrounded`, matrices keep their dtype, and their gradients are not rounded to `dtype`.
  """

  def rounded(x: jax.Array) -> jax.Array:
    return whole(x.astype(dtype) if x.ndim >= 2 else x)

  def one(x: jax.Array) -> jax.Array:
    # A transpose of its own: the gradient's cast would come before devices add it up.
    return linear_call(lambda _, x: rounded(x).astype(x.dtype), lambda _, g: whole(g), (), x)

  return jax.tree.map(one if unrounded else rounded, weights)


def platform() -> str:
  """The platform of the mesh's devices, such as "gpu", or else of jax's default backend.

  A mesh of a described topology, without devices here, has one too.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device else jax.default_backend()


def rounds_products(on_platform: str) -> bool:
  """Whether the factors of float32 products are rounded to bfloat16: on TPUs, unless
  jax_default_matmul_precision says otherwise.
  """
  return on_platform == "tpu" and jax.default_matmul_precision.value is None


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  if set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
    return jax.lax.with_sharding_constraint(x, spec)
  return x
