"""The matrices and norms of all layers, and what a block keeps for its backward pass.

`dense` is x [..., in] times kernel [in, out], with the kernel's gradient made in the kernel's own
layout. JAX's transpose of a matrix product makes that gradient as [out, in] and turns it, for which
XLA on CPUs has only slow loops: 85 instead of 150 GFLOP/s forward and backward at 768 x 4096 on two
cores. GPUs and TPUs do not mind either way. A primitive of its own and not `jax.custom_vjp`, which
would forbid forward mode (`jax.jvp`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from flax import nnx
from jax.interpreters import ad, batching, mlir

from vavae_jax.common.sharding import platform


class _Dense(jax.extend.core.Primitive):
  def flops(self, x: tuple[int, ...], kernel: tuple[int, ...]) -> float:
    """2 a multiply-add, by the shapes of x and kernel."""
    return 2.0 * math.prod(x) * kernel[1]


dense_p = _Dense("dense")


def dense(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [..., in] times kernel [in, out], rounded to the dtype of x -> [..., out] of the same."""
  return dense_p.bind(x, kernel)


class Linear(nnx.Linear):
  """x W + b, multiplied by `dense` in the layer's dtype; or with the results that it prefers."""

  bias: nnx.Param[jax.Array]

  def __call__(self, x: jax.Array, apart: bool = False) -> jax.Array:
    """With `apart`, for a result that a kernel of its own takes, the bias's gradient is a product
    with ones on TPUs: XLA fuses no sum into such a kernel.
    """
    x, kernel, bias = self._weights(x)
    return self._times(x, kernel) + (spread(bias, x.shape[:-1]) if apart else bias)

  def halves(self, x: jax.Array) -> list[jax.Array]:
    """The first and the second half of the result's columns, by a product each on TPUs: there the
    sums for the bias's gradient are fused into what makes the halves' gradients.
    """
    if platform() != "tpu":
      return jnp.split(self(x), 2, axis=-1)
    x, kernel, bias = self._weights(x)
    columns = zip(jnp.split(kernel, 2, axis=-1), jnp.split(bias, 2), strict=True)
    return [self._times(x, w) + b for w, b in columns]

  def _weights(self, x: jax.Array) -> tuple[jax.Array, ...]:
    bias, wide = self.bias[...], self.preferred_element_type
    x, narrow = self.promote_dtype((x, bias), dtype=self.dtype)
    return x, self.kernel[...], narrow if wide is None else bias.astype(wide)

  def _times(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
    wide = self.preferred_element_type
    return dense(x, kernel) if wide is None else _product(x, kernel, wide)


XAVIER = nnx.initializers.xavier_uniform()


@dataclasses.dataclass(frozen=True)
class Layers:
  """Makes the layers that everything below consists of; matrices multiply in `dtype`."""

  use_rmsnorm: bool
  dtype: jax.typing.DTypeLike
  rngs: nnx.Rngs
  results: jax.typing.DTypeLike | None = None  # of products; None: `dtype`

  def linear(self, in_features: int, out_features: int, init: nnx.Initializer = XAVIER) -> Linear:
    """A matrix and a zero bias."""
    return Linear(
      in_features,
      out_features,
      kernel_init=init,
      dtype=self.dtype,
      preferred_element_type=self.results,
      rngs=self.rngs,
    )

  def norm(self, size: int) -> nnx.Module:
    """The norm before a sublayer, float32; a LayerNorm has no weights here, adaLN provides them."""
    if self.use_rmsnorm:
      return nnx.RMSNorm(size, epsilon=1e-6, dtype=jnp.float32, rngs=self.rngs)
    return self._layer_norm(size, epsilon=1e-6, use_scale=False, use_bias=False)

  def qk_norm(self, size: int) -> nnx.Module:
    """The norm of queries or of keys, float32; a LayerNorm has weights and another epsilon here."""
    return self.norm(size) if self.use_rmsnorm else self._layer_norm(size, epsilon=1e-5)

  def _layer_norm(self, size: int, **kwargs: Any) -> nnx.LayerNorm:
    # The fast variance is E[x^2] - E[x]^2, which cancels.
    kwargs |= {"use_fast_variance": False, "dtype": jnp.float32, "rngs": self.rngs}
    return nnx.LayerNorm(size, **kwargs)


def _product(
  x: jax.Array, kernel: jax.Array, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
  dimensions, kernel = (((x.ndim - 1,), (0,)), ((), ())), kernel.astype(x.dtype)
  return jax.lax.dot_general(x, kernel, dimensions, preferred_element_type=dtype)


def _gradient_of_x(cotangent: jax.Array, x: Any, kernel: jax.Array) -> jax.Array:
  del x
  kernel = kernel.astype(cotangent.dtype)
  return jax.lax.dot_general(cotangent, kernel, (((cotangent.ndim - 1,), (1,)), ((), ())))


def _gradient_of_kernel(cotangent: jax.Array, x: jax.Array, kernel: Any) -> jax.Array:
  # A product over leading axes turns its first factor; here the narrower one.
  leading = tuple(range(x.ndim - 1))
  dimensions, dtype = ((leading, leading), ((), ())), kernel.aval.dtype  # perhaps float32
  if dtype != x.dtype and platform() == "cpu":  # where no product of bfloat16 arrays is that
    cotangent, x = cotangent.astype(dtype), x.astype(dtype)
  wide = None if dtype == x.dtype else dtype
  if kernel.aval.shape[0] > kernel.aval.shape[1]:
    return jax.lax.dot_general(cotangent, x, dimensions, preferred_element_type=wide).T
  return jax.lax.dot_general(x, cotangent, dimensions, preferred_element_type=wide)


def _batched(arguments: Any, axes: Any) -> tuple[jax.Array, int]:
  return jax.vmap(_product, axes)(*arguments), 0


dense_p.def_impl(jax.jit(_product))
dense_p.def_abstract_eval(lambda *arguments: jax.typeof(jax.eval_shape(_product, *arguments)))
mlir.register_lowering(dense_p, mlir.lower_fun(_product, multiple_results=False))
ad.defbilinear(dense_p, _gradient_of_x, _gradient_of_kernel)
batching.primitive_batchers[dense_p] = _batched


spread_p = jax.extend.core.Primitive("spread")
column_sums_p = jax.extend.core.Primitive("column_sums")


def spread(row: jax.Array, places: tuple[int, ...]) -> jax.Array:
  """row [out] -> [*places, out]; the gradient on TPUs by a product with ones.

  Alone XLA's sum over 16,384 rows of 3,456 took 0.73 ms by the estimate for v6e, the product 0.08.
  """
  return spread_p.bind(row, places=places)


@functools.partial(jax.jit, static_argnames="places", inline=True)
def _spread(row: jax.Array, *, places: tuple[int, ...]) -> jax.Array:
  return jnp.broadcast_to(row, (*places, *row.shape))


@functools.partial(jax.jit, inline=True)
def _column_sums(x: jax.Array) -> jax.Array:
  return jax.lax.reduce_sum(x, tuple(range(x.ndim - 1)))


def _column_sums_by_product(x: jax.Array) -> jax.Array:
  # Eight rows: XLA turns a product with one into the sum that this is to avoid.
  return _product(jnp.ones((8, math.prod(x.shape[:-1])), x.dtype), x.reshape(-1, x.shape[-1]))[0]


def _define(primitive: jax.extend.core.Primitive, function: Callable[..., jax.Array]) -> None:
  """All but the derivatives of a primitive that is a jitted function of one array."""

  def shape_of(x: Any, **params: Any) -> Any:
    return jax.typeof(jax.eval_shape(functools.partial(function, **params), x))

  def batched(x: Any, axes: Any, **params: Any) -> tuple[jax.Array, int]:
    return jax.vmap(functools.partial(function, **params), axes)(*x), 0

  primitive.def_impl(function)
  primitive.def_abstract_eval(shape_of)
  mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
  batching.primitive_batchers[primitive] = batched


_define(spread_p, _spread)
_define(column_sums_p, _column_sums)
_by_product = mlir.lower_fun(_column_sums_by_product, multiple_results=False)
mlir.register_lowering(column_sums_p, _by_product, platform="tpu")
ad.deflinear2(spread_p, lambda cotangent, row, places: [column_sums_p.bind(cotangent)])
ad.deflinear2(column_sums_p, lambda cotangent, x: [spread(cotangent, x.aval.shape[:-1])])


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
    "linear_call",
    "mul",
    "name",
    "neg",
    "reshape",
    "select_n",
    "sharding_constraint",
    "slice",
    "split",
    "spread",
    "squeeze",
    "sub",
    "transpose",
  }
)


ATTENDED = "attended"  # the name of the attention's result

# What the backward pass finds stored; it computes the rest again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "attended": jax.checkpoint_policies.save_only_these_names(ATTENDED),
  "dense": lambda primitive, *_, **__: primitive is dense_p,
  "dots": lambda primitive, *_, **__: primitive in (dense_p, jax.lax.dot_general_p),
  "costly": lambda primitive, *_, **__: primitive.name not in CHEAP,
}
