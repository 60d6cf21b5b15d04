"""Self-attention: `attend` by XLA or cuDNN, and `fused`, a kernel of our own for TPUs (Pallas).

The kernel is for short sequences. XLA writes the float32 logits of all heads to memory and turns
queries, keys and values into other layouts and back. Here one program holds an image in VMEM: it
reads queries, keys and values as their product leaves them, norms and rotates them, and writes what
the next product reads; the backward pass makes the logits again.

Logits lie with keys along sublanes and queries along lanes. Sums over keys are then additions of
whole registers, and no matrix as large as the logits is turned: the gradients of keys and values
are plain products, and for outputs and queries only [E, N] is. A head's channels need not begin at
a multiple of 128 lanes: an aligned window around them is loaded and rolled.

Source: Dao, arXiv 2307.08691, for the backward pass; with all keys at once there is nothing to
rescale.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from lightningdit_jax.positions import Rope, quarter_turn
from vavae_jax.common.sharding import BATCH_AXES, platform

LANES = 128
SUBLANES = 16  # of a register of bfloat16, whose words hold two tokens
ROWS = 256  # queries whose logits are made at once
TOKENS = 1024  # whose logits with `ROWS` queries fit into VMEM

_Array = jax.Array


class Norm(NamedTuple):
  """How queries and keys are normed: by LayerNorm, or without centering by RMSNorm."""

  centers: bool
  epsilon: float


Norms = tuple[Norm, jax.Array]  # scale and bias of queries, then of keys: [4, E]


class _Sizes(NamedTuple):
  """What a kernel is compiled for."""

  heads: int
  size: int  # E
  tokens: int  # N, before it is filled up
  norm: Norm | None
  rotates: bool
  interpret: bool

  @property
  def width(self) -> int:
    return self.heads * self.size

  @property
  def at_once(self) -> int:
    """Heads whose instructions are interleaved: two take a tenth less time than one by one."""
    return 2 - self.heads % 2

  @property
  def window(self) -> int:
    """Lanes that hold any head, from a multiple of `LANES` on."""
    return min(LANES if LANES % self.size == 0 else 2 * LANES, self.width)


def _place(column: Any, total: int, sizes: _Sizes) -> tuple[Any, Any]:
  """Where the window of the head that begins at `column` begins, and the head within it."""
  begin = jnp.minimum(column // LANES * LANES, total - sizes.window)
  return pl.multiple_of(begin, LANES), column - begin


def _take(ref: Any, rows: Any, column: Any, sizes: _Sizes) -> _Array:
  """A head's channels of some tokens, [rows, LANES]; from E on there is something else."""
  begin, shift = _place(column, ref.shape[-1], sizes)
  words = pltpu.bitcast(ref[0, rows, pl.ds(begin, sizes.window)], jnp.int32)
  if sizes.window > LANES:
    first, second = words[:, :LANES], words[:, LANES:]
    words = jnp.where(_lanes(first.shape) < shift, second, first)
  if sizes.size < LANES:
    words = pltpu.roll(words, (-shift) % LANES, 1)
  return pltpu.bitcast(words, ref.dtype)


def _put(ref: Any, rows: Any, column: Any, x: _Array, sizes: _Sizes) -> None:
  """Writes the first E channels of [rows, LANES] where `_take` reads them."""
  begin, shift = _place(column, ref.shape[-1], sizes)
  at = (0, rows, pl.ds(begin, sizes.window))
  words = pltpu.bitcast(x.astype(ref.dtype), jnp.int32)
  if sizes.size < LANES:
    words = pltpu.roll(words, shift % LANES, 1)
    words = jnp.concatenate([words] * (sizes.window // LANES), axis=1)
    lane = _lanes(words.shape) - shift
    old = pltpu.bitcast(ref[at], jnp.int32)
    words = jnp.where((lane >= 0) & (lane < sizes.size), words, old)
  ref[at] = pltpu.bitcast(words, ref.dtype)


def _head_only(x: _Array, sizes: _Sizes) -> _Array:
  """[N, LANES] with zeros from E on."""
  return jnp.where(_lanes(x.shape) < sizes.size, x, jnp.zeros_like(x))


def _lanes(shape: tuple[int, ...]) -> _Array:
  return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _product(a: _Array, b: _Array, axes: tuple[int, int]) -> _Array:
  """Sums over an axis of each, in float32; factors of float32 are not rounded."""
  precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
  dims = (((axes[0],), (axes[1],)), ((), ()))
  return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _normed(x: _Array, scale: _Array, bias: _Array, sizes: _Sizes) -> _Array:
  """[N, LANES] -> the same, normed over its first E channels."""
  assert sizes.norm is not None
  if sizes.norm.centers:
    x = x - jnp.sum(x, axis=1, keepdims=True) / sizes.size
    x = _head_only(x, sizes)
  mean = jnp.sum(x * x, axis=1, keepdims=True) / sizes.size
  return x * (jax.lax.rsqrt(mean + sizes.norm.epsilon) * scale) + bias


class _Constants(NamedTuple):
  """References to what all programs read."""

  norms: Any = None  # scale and bias of queries, then of keys, [4, LANES]
  cos: Any = None  # [N, LANES], or [1, N, LANES] of an image of its own
  sin: Any = None
  turn: Any = None  # `quarter_turn`, [LANES, LANES]


def _read(
  ref: Any, rows: Any, column: Any, which: int, constants: _Constants, sizes: _Sizes
) -> tuple[_Array, Callable[[_Array], tuple[_Array, ...]]]:
  """Queries (`which` 0) or keys (1), normed and rotated; and what pulls their gradient back.

  That gives the gradient of what was read and, if it was normed, of the norm's scale and bias.
  """
  x = _take(ref, rows, column, sizes).astype(jnp.float32)
  if sizes.norm is not None or not sizes.rotates:  # tables are zero there
    x = _head_only(x, sizes)
  pulls: list[Callable[..., Any]] = []
  if sizes.norm is not None:
    weights = (constants.norms[2 * which + i : 2 * which + i + 1, :] for i in range(2))
    x, pull = jax.vjp(functools.partial(_normed, sizes=sizes), x, *weights)
    pulls.append(pull)
  if not sizes.rotates:
    return x, lambda g: pulls[0](g) if pulls else (g,)
  # In the dtype of the values it is exact but for the norm's digits, which go anyway.
  dtype = constants.turn.dtype
  at = (0,) * (len(constants.cos.shape) - 2) + (rows, slice(None))
  cos, sin, turn = constants.cos[at], constants.sin[at], constants.turn[...]

  def pull_back(g: _Array) -> tuple[_Array, ...]:
    g = g * cos + _product((g * sin).astype(dtype), turn, (1, 1))
    return pulls[0](g) if pulls else (g,)

  return x * cos + _product(x.astype(dtype), turn, (1, 0)) * sin, pull_back


def _weights(q: _Array, k: _Array, sizes: _Sizes) -> tuple[_Array, _Array]:
  """exp(logits) up to a factor, float32 [keys, queries], and one over its sums, [1, queries]."""
  logits = _product(k, q, (1, 1))
  if k.shape[0] > sizes.tokens:  # the rest fills up
    key = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    logits = jnp.where(key < sizes.tokens, logits, -jnp.inf)
  weight = jnp.exp2(logits - jnp.max(logits, axis=0, keepdims=True))
  return weight, 1.0 / jnp.sum(weight, axis=0, keepdims=True)


def _blocks(tokens: int, body: Callable[[Any], None]) -> None:
  """Runs `body` for each block of rows."""
  if tokens <= ROWS:
    body(slice(None))
  else:

    @pl.loop(0, tokens // ROWS)
    def _(i: _Array) -> None:
      body(pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS))


def _forward_kernel(sizes: _Sizes, qkv: Any, *refs: Any) -> None:
  constants, (out,) = _named(refs, sizes)
  dtype, tokens = qkv.dtype, qkv.shape[1]
  everywhere = slice(None)

  @pl.loop(0, sizes.heads, unroll=sizes.at_once)
  def _(head: _Array) -> None:
    at = head * sizes.size
    k = _read(qkv, everywhere, at + sizes.width, 1, constants, sizes)[0].astype(dtype)
    v = _take(qkv, everywhere, at + 2 * sizes.width, sizes)

    def block(rows: Any) -> None:
      q, _ = _read(qkv, rows, at, 0, constants, sizes)
      # The factor makes exp(x) of the logits 2^x.
      q = (q * (sizes.size**-0.5 / math.log(2))).astype(dtype)
      weight, over_sum = _weights(q, k, sizes)
      y = _product(v, weight.astype(dtype), (0, 0)) * over_sum
      _put(out, rows, at, y.T, sizes)

    _blocks(tokens, block)


def _backward_kernel(sizes: _Sizes, qkv: Any, *refs: Any) -> None:
  """Gradients of qkv, and of the norms' scales and biases, summed over an image."""
  constants, (dy, dqkv, *more) = _named(refs, sizes)
  *dnorms, dk_sum, dv_sum = more
  dtype, tokens = qkv.dtype, qkv.shape[1]
  everywhere = slice(None)
  for ref in dnorms:
    ref[...] = jnp.zeros_like(ref)

  def write(x: tuple[_Array, ...], rows: Any, column: Any, which: int) -> None:
    _put(dqkv, rows, column, x[0], sizes)
    for i, gradient in enumerate(x[1:]):
      dnorms[0][0, 2 * which + i : 2 * which + i + 1, :] += gradient

  @pl.loop(0, sizes.heads, unroll=sizes.at_once)
  def _(head: _Array) -> None:
    at = head * sizes.size
    k, pull_k = _read(qkv, everywhere, at + sizes.width, 1, constants, sizes)
    k = k.astype(dtype)
    v = _take(qkv, everywhere, at + 2 * sizes.width, sizes)
    several = tokens > ROWS
    if several:
      dk_sum[...] = jnp.zeros_like(dk_sum)
      dv_sum[...] = jnp.zeros_like(dv_sum)

    def block(rows: Any) -> None:
      q, pull_q = _read(qkv, rows, at, 0, constants, sizes)
      q = (q * (sizes.size**-0.5 / math.log(2))).astype(dtype)
      g = _head_only(_take(dy, rows, at, sizes).astype(jnp.float32), sizes).astype(dtype)
      weight, over_sum = _weights(q, k, sizes)
      weight = weight * over_sum
      dv = _product(weight.astype(dtype), g, (1, 0))
      dweight = _product(v, g, (1, 1))
      mean = jnp.sum(weight * dweight, axis=0, keepdims=True)
      dlogits = (weight * (dweight - mean)).astype(dtype)
      dk = _product(dlogits, q, (1, 0)) * math.log(2)
      dq = _product(k, dlogits, (0, 0)).T * sizes.size**-0.5
      write(pull_q(dq), rows, at, 0)
      if several:
        dk_sum[...] += dk
        dv_sum[...] += dv
      else:
        write(pull_k(dk), everywhere, at + sizes.width, 1)
        _put(dqkv, everywhere, at + 2 * sizes.width, dv, sizes)

    _blocks(tokens, block)
    if several:
      write(pull_k(dk_sum[...]), everywhere, at + sizes.width, 1)
      _put(dqkv, everywhere, at + 2 * sizes.width, dv_sum[...], sizes)


def _named(refs: Any, sizes: _Sizes) -> tuple[_Constants, Any]:
  """The constants by name, and the other references."""
  names = ["norms"] * (sizes.norm is not None) + ["cos", "sin", "turn"] * sizes.rotates
  return _Constants(**dict(zip(names, refs, strict=False))), refs[len(names) :]


def norms_of(q_norm: Any, k_norm: Any) -> Norms | None:
  """The norms of queries and keys as `fused` takes them; None where there are none."""
  if q_norm is None:
    return None
  centers = isinstance(q_norm, nnx.LayerNorm)
  weights = []
  for norm in (q_norm, k_norm):
    scale = norm.scale[...]
    weights += [scale, norm.bias[...] if centers else jnp.zeros_like(scale)]
  return Norm(centers, q_norm.epsilon), jnp.stack(weights)


def refusal(tokens: int, width: int, num_heads: int) -> str:
  """Why `fused` cannot run with these sizes on the mesh's devices; "" where it can."""
  size = width // num_heads
  if width % LANES or size > LANES:
    return (
      f"{num_heads} heads of {size} channels; it needs a multiple of {LANES}, at most {LANES} each"
    )
  if tokens > TOKENS:
    return f"{tokens} tokens, and it takes {TOKENS}"
  if platform() == "tpu":
    has, needs = pltpu.get_tpu_info().vmem_capacity_bytes, _memory(tokens, width, 2)
    if needs > has:
      return f"{needs >> 20} MiB in VMEM, and the chip has {has >> 20}"
  return ""


def _memory(tokens: int, width: int, itemsize: int) -> int:
  """Bytes of VMEM that the backward kernel takes: blocks twice, and what it computes."""
  blocks = 2 * 7 * tokens * width * itemsize
  # Two tables and the quarter turn, norms' weights and gradients in whole tiles.
  tables = 2 * (2 * tokens + LANES + 2 * SUBLANES) * LANES * 4
  # Logits, weights, their gradients and copies in the products' dtype; windows and sums.
  return blocks + tables + 6 * tokens * min(tokens, ROWS) * 4 + 12 * tokens * LANES * 4 + 2**20


def fused(
  qkv_BNF: jax.Array, num_heads: int, rope: Rope | None = None, norms: Norms | None = None
) -> jax.Array:
  """Self-attention [B, N, K E] of queries, keys and values [B, N, 3 K E], in their dtype.

  Queries and keys are normed, then rotated by `rope_tables`, or by tables [B, 1, N, E] of each
  image. Sizes are those that `refusal` lets pass. Without a TPU it is interpreted, slowly. It has
  no forward mode: `jax.jvp` raises TypeError.
  """
  tokens, size = qkv_BNF.shape[1], qkv_BNF.shape[2] // 3 // num_heads
  fill = -tokens % (ROWS if tokens > ROWS else SUBLANES)
  constants: list[Any] = []
  norm = None
  if norms is not None:
    norm, weights_4E = norms
    constants.append(jnp.pad(weights_4E, ((0, 0), (0, LANES - size))))
  if rope is not None:
    tables = [jnp.squeeze(table, 1) if table.ndim == 4 else table for table in rope]
    more = ((0, fill), (0, LANES - size))
    constants += [jnp.pad(x, ((0, 0), *more)) if x.ndim == 3 else np.pad(x, more) for x in tables]
    constants.append(jnp.asarray(quarter_turn(LANES), jnp.float32 if norm else qkv_BNF.dtype))
  sizes = _Sizes(num_heads, size, tokens, norm, rope is not None, platform() != "tpu")
  y_BND = _fused(sizes, jnp.pad(qkv_BNF, ((0, 0), (0, fill), (0, 0))), constants)
  return y_BND[:, :tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(sizes: _Sizes, qkv: _Array, constants: list[Any]) -> _Array:
  return _run(sizes, [qkv], constants)[0]


def _forward(sizes: _Sizes, qkv: _Array, constants: list[Any]) -> tuple[_Array, Any]:
  return _fused(sizes, qkv, constants), (qkv, constants)


def _backward(sizes: _Sizes, residuals: Any, dy: _Array) -> tuple[_Array, list[Any]]:
  qkv, constants = residuals
  dqkv, *dnorms = _run(sizes, [qkv, dy], constants)
  # Tables have no gradient.
  gradients: list[Any] = [jnp.sum(x, axis=0) for x in dnorms]
  return dqkv, gradients + [None] * (len(constants) - len(gradients))


_fused.defvjp(_forward, _backward)


def _run(sizes: _Sizes, arrays: list[_Array], constants: list[Any]) -> list[_Array]:
  """The forward kernel of qkv, or the backward kernel of qkv and dy, on every device's images."""

  def local(arrays: list[_Array], constants: list[Any]) -> list[_Array]:
    return _call(sizes, arrays, constants)

  if set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
    images = PartitionSpec(BATCH_AXES)
    of_constants = [images if x.ndim == 3 else PartitionSpec() for x in constants]
    local = jax.shard_map(local, in_specs=(images, of_constants), out_specs=images, check_vma=False)
  return local(arrays, constants)


def _call(sizes: _Sizes, arrays: list[_Array], constants: list[Any]) -> list[_Array]:
  qkv, is_forward = arrays[0], len(arrays) == 1
  batch, tokens, features = qkv.shape
  width = sizes.width

  def of_image(*shape: int) -> pl.BlockSpec:
    return pl.BlockSpec((1, *shape), lambda i: (i, 0, 0))

  inputs = [of_image(*x.shape[1:]) for x in arrays]
  others = [
    of_image(*x.shape[1:]) if x.ndim == 3 else pl.BlockSpec(x.shape, lambda i: (0, 0))
    for x in constants
  ]
  shapes = [jax.ShapeDtypeStruct((batch, tokens, width if is_forward else features), qkv.dtype)]
  if sizes.norm is not None and not is_forward:
    shapes.append(jax.ShapeDtypeStruct((batch, 4, LANES), jnp.float32))
  sums = [pltpu.VMEM((tokens, LANES), jnp.float32)] * 2
  moved = [*arrays, *constants, *shapes]
  products = 2 if is_forward else 5  # the backward pass makes the logits again
  return pl.pallas_call(
    functools.partial(_forward_kernel if is_forward else _backward_kernel, sizes),
    grid=(batch,),
    in_specs=[inputs[0], *others, *inputs[1:]],
    out_specs=[of_image(*x.shape[1:]) for x in shapes],
    out_shape=shapes,
    scratch_shapes=[] if is_forward else sums,
    name="attention_forward" if is_forward else "attention_backward",
    interpret=sizes.interpret,
    cost_estimate=pl.CostEstimate(
      flops=products * 2 * batch * tokens**2 * width,
      transcendentals=batch * sizes.heads * tokens**2,
      bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in moved),
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",),  # for both cores of a v4 or v5p
      # Without it a kernel gets 16 MiB, and 512 px need more.
      vmem_limit_bytes=_memory(tokens, width, qkv.dtype.itemsize),
    ),
  )(qkv, *constants, *arrays[1:])


def attend(
  q_BKNE: jax.Array, k_BKNE: jax.Array, v_BKNE: jax.Array, implementation: str
) -> jax.Array:
  """softmax(q k / sqrt(E)) v, the softmax in float32; products and result have the dtype of v.

  "cudnn" is the fused kernel of NVIDIA GPUs, bfloat16 only; "xla" runs everywhere. Heads come
  before tokens, which CPUs run twice as fast as jax.nn's order.
  """
  dtype = v_BKNE.dtype
  if implementation == "cudnn":
    q, k, v = (jnp.swapaxes(x.astype(dtype), 1, 2) for x in (q_BKNE, k_BKNE, v_BKNE))
    return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v, implementation="cudnn"), 1, 2)
  # M: the keys' tokens. Scaled here and not after: E numbers a token instead of N.
  q_BKNE = (q_BKNE * q_BKNE.shape[-1] ** -0.5).astype(dtype)
  logits_BKNM = jnp.einsum(
    "bkne,bkme->bknm", q_BKNE, k_BKNE.astype(dtype), preferred_element_type=jnp.float32
  )
  largest_BKN1 = jax.lax.stop_gradient(jnp.max(logits_BKNM, axis=-1, keepdims=True))
  weight_BKNM = jnp.exp(logits_BKNM - largest_BKN1)
  sum_BKN1 = jnp.sum(weight_BKNM, axis=-1, keepdims=True)
  y_BKNE = jnp.einsum("bknm,bkme->bkne", weight_BKNM.astype(dtype), v_BKNE)
  # Divided here and not before, likewise.
  return (y_BKNE / sum_BKN1).astype(dtype)
