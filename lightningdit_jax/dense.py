"""The matrix product of every layer, and which results a block keeps for its backward pass.

`dense` is x [..., in] times kernel [in, out], with the kernel's gradient made in the kernel's own
layout. JAX's transpose of a matrix product makes that gradient as [out, in] and turns it, for which
XLA on CPUs has only slow loops: 85 instead of 150 GFLOP/s forward and backward at 768 x 4096 on two
cores. GPUs and TPUs do not mind either way. A primitive of its own and not `jax.custom_vjp`, which
would forbid forward mode (`jax.jvp`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
from jax.interpreters import ad, batching, mlir


class _Dense(jax.extend.core.Primitive):
  def flops(self, x: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """2 a multiply-add, by the shapes of x and kernel."""
    return 2.0 * math.prod(x) * kernel[1]


dense_p = _Dense("dense")


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [..., in] times kernel [in, out], both of one dtype -> [..., out] of the same."""
  return dense_p.bind(x, kernel)


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **_: Any) -> jax.Array:
  """`dense` as `nnx.Linear` calls for it."""
  if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
    raise ValueError(f"nnx.Linear asks for {dimension_numbers}, which is not what `dense` does.")
  return dense(x, kernel)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def _gradient_of_x(cotangent: jax.Array, x: Any, kernel: jax.Array) -> jax.Array:
  del x
  return jax.lax.dot_general(cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ())))


def _gradient_of_kernel(cotangent: jax.Array, x: jax.Array, kernel: Any) -> jax.Array:
  # A product over leading axes turns its first factor; here the narrower one.
  leading = tuple(range(x.ndim - 1))
  dimension_numbers = ((leading, leading), ((), ()))
  if kernel.aval.shape[0] > kernel.aval.shape[1]:
    return jax.lax.dot_general(cotangent, x, dimension_numbers).T
  return jax.lax.dot_general(x, cotangent, dimension_numbers)


def _batched(arguments: Any, axes: Any) -> tuple[jax.Array, int]:
  return jax.vmap(_product, axes)(*arguments), 0


dense_p.def_impl(jax.jit(_product))
dense_p.def_abstract_eval(lambda *arguments: jax.typeof(jax.eval_shape(_product, *arguments)))
mlir.register_lowering(dense_p, mlir.lower_fun(_product, multiple_results=False))
ad.defbilinear(dense_p, _gradient_of_x, _gradient_of_kernel)
batching.primitive_batchers[dense_p] = _batched


# What the backward pass computes again in any case: no arithmetic worth the name, and memory moves
# slower. Casts and gathers are among them: a scan would keep a copy of every block's weights.
CHEAP = frozenset(
  {
    "add",
    "add_any",
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "integer_pow",
    "mul",
    "neg",
    "reshape",
    "select_n",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "sub",
    "transpose",
  }
)


def is_costly(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
  """The policy without `use_checkpoint`: keeps matrix products, sums and exponentials."""
  return primitive.name not in CHEAP


# What the backward pass finds stored where `use_checkpoint` is on; it computes the rest again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dense": lambda primitive, *_, **__: primitive is dense_p,
  "dots": lambda primitive, *_, **__: primitive in (dense_p, jax.lax.dot_general_p),
}
