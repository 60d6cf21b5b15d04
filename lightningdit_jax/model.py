"""LightningDiT, top to bottom: a diffusion transformer on latents, conditioned on time and class.

A DiT (adaLN-zero blocks over patches of the latent) with SwiGLU, RMSNorm and RoPE. Notable:

- Its arguments are `options.Options`.
- The blocks' weights are stacked on a leading axis L and run by `jax.lax.scan`, so that 28 blocks
  compile like one. Inside, weights are gathered in the compute dtype and activations pinned to the
  batch axes.
- Positions are constants of the actual grid, not weights, so that h may differ from w.
- Weights, residual stream, norms, RoPE and softmax are float32; matrices multiply in `dtype`.
- Nothing is random: the caller drops a label by replacing it with the null label, `num_classes`.

Source: Yao et al., arXiv 2501.01423, section 4; hustvl/LightningDiT models/lightningdit.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from ml_collections import FrozenConfigDict

from lightningdit_jax import attention, internal_guidance, platforms, routing
from lightningdit_jax.dense import ATTENDED, REMAT_POLICIES, XAVIER, Layers
from lightningdit_jax.options import Options
from lightningdit_jax.positions import Rope, position_embedding, rope_tables, rotate
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import gather, pin_batch

SMALL = nnx.initializers.normal(0.02)
ZEROS = nnx.initializers.zeros

M = TypeVar("M", bound=nnx.Module)


def modulate(x_BND: jax.Array, shift_BD: jax.Array | None, scale_BD: jax.Array) -> jax.Array:
  """x (1 + scale) + shift, one scale and shift per sample; no shift where it is None."""
  x_BND = x_BND * (1.0 + scale_BD[:, None])
  return x_BND if shift_BD is None else x_BND + shift_BD[:, None]


def gathered(module: M, dtype: jax.typing.DTypeLike, unrounded: bool = False) -> M:
  """The module with its weights whole on every device and its matrices in `dtype`; see `gather`."""
  graph, weights = nnx.split(module)
  return nnx.merge(graph, gather(weights, dtype, unrounded))


def waves(t_B: jax.Array, count: int) -> jax.Array:
  """Cosines and sines [B, 2 count] of a time."""
  frequencies = 10000.0 ** -(np.arange(count) / count)
  angle = t_B.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


class TimestepEmbedder(nnx.Module):
  """Time -> width: cosines and sines of the time, then an MLP."""

  NUM_FREQUENCIES = 128

  def __init__(self, hidden_size: int, layers: Layers):
    self.fc1 = layers.linear(2 * self.NUM_FREQUENCIES, hidden_size, SMALL)
    self.fc2 = layers.linear(hidden_size, hidden_size, SMALL)

  def __call__(self, t_B: jax.Array) -> jax.Array:
    return self.fc2(nnx.silu(self.fc1(waves(t_B, self.NUM_FREQUENCIES))))


class Attention(nnx.Module):
  """Self-attention; queries and keys are normed with `use_qknorm`, then turned by RoPE."""

  def __init__(self, options: Options, layers: Layers):
    width, self.num_heads = options.hidden_size, options.num_heads
    self.implementation = "xla" if options.attention == "auto" else options.attention
    self.qkv = layers.linear(width, 3 * width)
    self.q_norm = layers.qk_norm(width // self.num_heads) if options.use_qknorm else None
    self.k_norm = layers.qk_norm(width // self.num_heads) if options.use_qknorm else None
    self.proj = layers.linear(width, width)

  def __call__(self, x_BND: jax.Array, rope: Rope | None) -> jax.Array:
    qkv_BNF = self.qkv(x_BND, apart=self.implementation != "xla")
    _, tokens, width = x_BND.shape
    if self.implementation == "pallas" and not attention.refusal(tokens, width, self.num_heads):
      norms = attention.norms_of(self.q_norm, self.k_norm)
      y_BND = attention.fused(qkv_BNF.astype(self.qkv.dtype), self.num_heads, rope, norms)
      return self.proj(checkpoint_name(y_BND, ATTENDED))
    # Split first: the gradient is then put together in one piece, not from three padded ones.
    q, k, v = (
      rearrange(part, "B N (K E) -> B K N E", K=self.num_heads)
      for part in jnp.split(qkv_BNF, 3, axis=-1)
    )
    if self.q_norm is not None and self.k_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    if rope is not None:
      q, k = rotate(q, rope), rotate(k, rope)
    # Norm and rotation leave q and k in float32.
    y_BKNE = attention.attend(q, k, v, self.implementation)
    return self.proj(checkpoint_name(rearrange(y_BKNE, "B K N E -> B N (K E)"), ATTENDED))


class SwiGLU(nnx.Module):
  """silu(x W1) * (x W2), then W3; W1 and W2 are one matrix."""

  def __init__(self, hidden_size: int, mlp_size: int, layers: Layers):
    self.w12 = layers.linear(hidden_size, 2 * mlp_size)
    self.w3 = layers.linear(mlp_size, hidden_size)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    gate, value = self.w12.halves(x_BND)
    return self.w3(nnx.silu(gate) * value)


class Mlp(nnx.Module):
  """Two matrices with a GELU, by its tanh approximation, between them."""

  def __init__(self, hidden_size: int, mlp_size: int, layers: Layers):
    self.fc1 = layers.linear(hidden_size, mlp_size)
    self.fc2 = layers.linear(mlp_size, hidden_size)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    return self.fc2(nnx.gelu(self.fc1(x_BND), approximate=True))


class Block(nnx.Module):
  """Attention and MLP, each normed, modulated by the condition and gated; gates start at zero."""

  def __init__(self, options: Options, layers: Layers):
    self.wo_shift = options.wo_shift
    width = options.hidden_size
    mlp_size = int(width * options.mlp_ratio)
    self.norm1 = layers.norm(width)
    self.attn = Attention(options, layers)
    self.norm2 = layers.norm(width)
    self.mlp: nnx.Module = (
      SwiGLU(width, int(2 / 3 * mlp_size), layers)
      if options.use_swiglu
      else Mlp(width, mlp_size, layers)
    )
    self.adaLN_modulation = layers.linear(width, (4 if options.wo_shift else 6) * width, ZEROS)

  def __call__(self, x_BND: jax.Array, c_BD: jax.Array, rope: Rope | None) -> jax.Array:
    modulation = self.adaLN_modulation(nnx.silu(c_BD)).astype(jnp.float32)
    if self.wo_shift:
      scale1, gate1, scale2, gate2 = jnp.split(modulation, 4, axis=-1)
      shift1 = shift2 = None
    else:
      shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(modulation, 6, axis=-1)
    y_BND = self.attn(modulate(self.norm1(x_BND), shift1, scale1), rope)
    x_BND = x_BND + gate1[:, None] * y_BND
    y_BND = self.mlp(modulate(self.norm2(x_BND), shift2, scale2))
    return x_BND + gate2[:, None] * y_BND


class FinalLayer(nnx.Module):
  """Tokens -> patches of the velocity; it keeps its shift even where the blocks have none."""

  def __init__(
    self, hidden_size: int, out_features: int, layers: Layers, init: nnx.Initializer = ZEROS
  ):
    self.norm_final = layers.norm(hidden_size)
    self.linear = layers.linear(hidden_size, out_features, init)
    self.adaLN_modulation = layers.linear(hidden_size, 2 * hidden_size, init)

  def __call__(self, x_BND: jax.Array, c_BD: jax.Array) -> jax.Array:
    modulation = self.adaLN_modulation(nnx.silu(c_BD)).astype(jnp.float32)
    shift_BD, scale_BD = jnp.split(modulation, 2, axis=-1)
    return self.linear(modulate(self.norm_final(x_BND), shift_BD, scale_BD))


class LightningDiT(nnx.Module):
  """The velocity field of a class-conditional flow over latents, or another prediction of it.

  Keyword arguments are the fields of `Options`, which checks them; `PRESETS` has the published
  sizes. Matrices multiply in `dtype`, with results in `results` (None: the same); weights are
  float32.
  """

  NUM_FREQUENCIES = 64  # of each time, for `log_variance`

  def __init__(
    self,
    *,
    dtype: jax.typing.DTypeLike = jnp.float32,
    results: jax.typing.DTypeLike | None = None,
    rngs: nnx.Rngs,
    **options: Any,
  ):
    o = self.options = Options(**options)
    self.dtype = dtype
    width, layers = o.hidden_size, Layers(o.use_rmsnorm, dtype, rngs, results)
    self.x_embedder = nnx.Conv(
      o.in_channels,
      width,
      (o.patch_size, o.patch_size),
      strides=o.patch_size,
      padding="VALID",
      kernel_init=nnx.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3),
      dtype=results or dtype,
      rngs=rngs,
    )
    self.t_embedder = TimestepEmbedder(width, layers)
    num_labels = o.num_classes + (o.class_dropout_prob > 0)
    self.y_embedder = nnx.Embed(num_labels, width, embedding_init=SMALL, rngs=rngs)

    @nnx.split_rngs(splits=o.depth)
    @nnx.vmap
    def stacked_blocks(rngs: nnx.Rngs) -> Block:
      return Block(o, dataclasses.replace(layers, rngs=rngs))

    self.blocks = stacked_blocks(rngs)
    outputs = o.patch_size**2 * o.in_channels * (2 if o.learn_sigma else 1)
    self.final_layer = FinalLayer(width, outputs, layers)
    # Its weights begin unlike those of the last one, as in its authors' code.
    self.early_layer = FinalLayer(width, outputs, layers, XAVIER) if o.early_head else None
    exact = dataclasses.replace(layers, dtype=jnp.float32, results=None)
    self.logvar = exact.linear(4 * self.NUM_FREQUENCIES, 1, ZEROS) if o.dmf_depth else None

  def __call__(
    self,
    x_BhwZ: jax.Array,
    t_B: jax.Array,
    label_B: jax.Array,
    route: routing.Route | None = None,
    end_B: jax.Array | None = None,
  ) -> jax.Array:
    """The velocity, float32, at a point of the path from noise to data.

    Latents [B,h,w,in_channels] are normalised, h and w multiples of patch_size; t is in [0, 1], t=0
    noise and t=1 data; labels are integers in 0 .. num_classes. Any other label gives NaN. A route
    leads tokens around blocks. Of a model with `dmf_depth`, the mean velocity between t and the
    later time `end_B`, if given.
    """
    return self._heads(x_BhwZ, t_B, label_B, route=route, end_B=end_B)[-1]

  def both(self, x_BhwZ: jax.Array, t_B: jax.Array, label_B: jax.Array) -> list[jax.Array]:
    """What the early head reads on the way, then what a call gives."""
    return self._heads(x_BhwZ, t_B, label_B, self.early_layer)

  def log_variance(self, t_B: jax.Array, end_B: jax.Array) -> jax.Array:
    """Of the loss of a model with `dmf_depth`: the logarithm of its errors' scale, float32 [B]."""
    assert self.logvar is not None
    both = [waves(time_B, self.NUM_FREQUENCIES) for time_B in (t_B, end_B)]
    return gathered(self.logvar, jnp.float32)(jnp.concatenate(both, axis=-1))[:, 0]

  def _heads(
    self,
    x_BhwZ: jax.Array,
    t_B: jax.Array,
    label_B: jax.Array,
    early_layer: FinalLayer | None = None,
    route: routing.Route | None = None,
    end_B: jax.Array | None = None,
  ) -> list[jax.Array]:
    o = self.options
    self._check_inputs(x_BhwZ, t_B, label_B, end_B)
    p, unrounded = o.patch_size, o.reduce_dtype == "float32"
    h, w = x_BhwZ.shape[1] // p, x_BhwZ.shape[2] // p
    rope = rope_tables(h, w, o.hidden_size // o.num_heads) if o.use_rope else None

    x_BND = rearrange(gathered(self.x_embedder, self.dtype)(x_BhwZ), "B h w D -> B (h w) D")
    x_BND = pin_batch(x_BND + position_embedding(h, w, o.hidden_size) * o.position_scale)
    # A label below 0 would wrap around to a class; past the table it gives NaN, as one too large.
    label_B = jnp.where(label_B < 0, np.iinfo(np.int32).max, label_B)
    label_BD = gathered(self.y_embedder, jnp.float32)(label_B)
    embed = gathered(self.t_embedder, self.dtype, unrounded)
    c_BD = end_BD = pin_batch(embed(t_B) + label_BD)
    if end_B is not None:
      end_BD = pin_batch(embed(end_B) + label_BD)

    graph, weights = nnx.split(self.blocks)

    # A scan keeps the recomputation from being merged away, so the barriers against that can go;
    # unrolled they stay where memory matters, and where it does not a merge is a gain.
    keeps_apart = o.kept != "costly" and o.scan_unroll >= o.depth

    def block(rope: Rope | None) -> Any:
      def run(
        x_BND: jax.Array, weights_of_block: Any, is_late: jax.Array | None = None
      ) -> tuple[jax.Array, None]:
        block = nnx.merge(graph, gather(weights_of_block, self.dtype, unrounded))
        at_BD = c_BD if is_late is None else jnp.where(is_late, end_BD, c_BD)
        return pin_batch(block(x_BND, at_BD, rope)), None

      return jax.checkpoint(run, prevent_cse=keeps_apart, policy=REMAT_POLICIES[o.kept])

    def scan(x_BND: jax.Array, rope: Rope | None, *of_blocks: Any) -> jax.Array:
      run = block(rope)
      return jax.lax.scan(lambda x, each: run(x, *each), x_BND, of_blocks, unroll=o.scan_unroll)[0]

    def read(head: FinalLayer, x_BND: jax.Array) -> jax.Array:
      patches = gathered(head, self.dtype, unrounded)(x_BND, end_BD).astype(jnp.float32)
      out = rearrange(patches, "B (h w) (p q Z) -> B (h p) (w q) Z", h=h, w=w, p=p, q=p)
      return out[..., : o.in_channels]

    if early_layer is not None:
      look = functools.partial(read, early_layer)
      how = (o.early_head, o.scan_unroll, keeps_apart)
      x_BND, early = internal_guidance.scan(block(rope), look, x_BND, weights, *how)
      return [early, read(self.final_layer, x_BND)]
    if route is not None:
      x_BND = routing.through(scan, x_BND, rope, weights, route)
    elif end_B is not None:
      # One scan: two would copy their parts of the weights.
      x_BND = scan(x_BND, rope, weights, jnp.arange(o.depth) >= o.dmf_depth)
    else:
      x_BND = scan(x_BND, rope, weights)
    return [read(self.final_layer, x_BND)]

  def _check_inputs(
    self, x_BhwZ: jax.Array, t_B: jax.Array, label_B: jax.Array, end_B: jax.Array | None
  ) -> None:
    if x_BhwZ.ndim != 4 or x_BhwZ.shape[-1] != self.options.in_channels:
      raise InputError(
        f"LightningDiT needs latents [B,h,w,{self.options.in_channels}], channels last, but got "
        f"{x_BhwZ.shape}."
      )
    batch, height, width, _ = x_BhwZ.shape
    p = self.options.patch_size
    if height % p or width % p:
      raise InputError(
        f"A latent of {height} x {width} cells does not divide into patches of {p} x {p}; choose "
        "another size or patch_size."
      )
    if t_B.shape != (batch,) or label_B.shape != (batch,):
      raise InputError(
        f"{batch} latents need t and label of shape ({batch},), but got {t_B.shape} and "
        f"{label_B.shape}; broadcast a scalar t with jnp.full."
      )
    if end_B is not None and (end_B.shape != (batch,) or not self.options.dmf_depth):
      raise InputError(
        f"end_B is of shape {end_B.shape}; it is ({batch},) here, and for a model with dmf_depth "
        "above 0 alone."
      )


def build_model(config: FrozenConfigDict, dtype: str = "") -> functional.Build:
  """LightningDiT of a training's configuration, for `functional`; in another dtype, if given, to
  sample. What depends on the platform is for `platforms.fitted` to say.
  """

  def build(rngs: nnx.Rngs) -> LightningDiT:
    return LightningDiT(**platforms.fitted(config, dtype), rngs=rngs)

  return build
