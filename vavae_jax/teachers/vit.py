"""The vision transformer of DINOv2, MAE and CLIP, frozen; they differ in options and sizes only.

Features are the patch tokens of the last layer after the final norm; class and register tokens are
left out. The paper feeds images in [-1,1] as they are, without ImageNet's normalisation, and so do
we by default.

Notable: features come on a grid of 16 pixels of the given image, whatever the patch size. For
patches of 14 the image is first resized, 256 -> 224. Position embeddings are resampled to the grid
at hand as timm does, which is not what facebook's own code does.

Source: Oquab et al. 2023, arXiv 2304.07193; Darcet et al. 2023, arXiv 2309.16588; He et al. 2021,
arXiv 2111.06377; timm's vision_transformer.py; models/foundation_models.py of LightningDiT.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vavae_jax.teachers.layers import (
  Attention,
  Layers,
  Mlp,
  Statistics,
  SwiGLU,
  grid_of,
  normalized,
  resample_positions,
  resize,
)
from vavae_jax.teachers.names import Naming

# The names by which facebook and timm have most of these networks, and those of transformers.
FACEBOOK = Naming(
  renamed={"embedding.patch.": "patch_embed.proj.", "embedding.": ""}, aside=("mask_token$",)
)
TRANSFORMERS = {
  "embedding.patch.": "embeddings.patch_embeddings.projection.",
  "embedding.cls_token": "embeddings.cls_token",
  "embedding.register_tokens": "embeddings.register_tokens",
  "embedding.pos_embed": "embeddings.position_embeddings",
  "blocks.": "encoder.layer.",
  "attn.qkv.": "attention.attention.query+attention.attention.key+attention.attention.value.",
  "attn.proj.": "attention.output.dense.",
  "norm.": "layernorm.",
}
TRANSFORMERS_FUSED = (
  "attention.attention.query",
  "attention.attention.key",
  "attention.attention.value",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The arguments of `ViT`."""

  patch_size: int  # pixels of the network's input per token along each axis
  hidden_size: int  # width D
  depth: int  # number of blocks L
  num_heads: int  # attention heads K
  grid_size: int  # rows and columns of the position embedding
  mlp_size: int | None = None  # None: four times `hidden_size`
  num_registers: int = 0
  embed_class: bool = True  # the position embedding has a row for the class token
  use_layer_scale: bool = False  # each sublayer's output is scaled channel by channel
  use_swiglu: bool = False  # instead of an MLP
  activation: str = "gelu"  # of the MLP; or "quick_gelu"
  use_pre_norm: bool = False  # CLIP's: a norm before the blocks, and patches without a bias
  epsilon: float = 1e-6  # of all norms
  statistics: Statistics | None = None  # that images are normalised by; None feeds them as they are


class ViT(nnx.Module):
  """A vision transformer without a head; its features lie on a grid of 16 pixels of the image.

  Keyword arguments are the fields of `Options`. Matrices multiply in `dtype`, which the features
  have; weights are float32.
  """

  stride = 16

  def __init__(self, *, dtype: jnp.dtype = jnp.float32, rngs: nnx.Rngs, **options: Any):
    o = self.options = Options(**options)
    self.feature_size = o.hidden_size
    self.num_prefix_tokens = 1 + o.num_registers
    self.dtype = dtype
    layers = Layers(o.epsilon, dtype, rngs)
    self.embedding = Embedding(o, layers)
    self.norm_pre = layers.norm(o.hidden_size) if o.use_pre_norm else None

    @nnx.split_rngs(splits=o.depth)
    @nnx.vmap
    def stacked_blocks(rngs: nnx.Rngs) -> Block:
      return Block(o, dataclasses.replace(layers, rngs=rngs))

    self.blocks = stacked_blocks(rngs)
    self.norm = layers.norm(o.hidden_size)

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """RGB images [B,H,W,3] in [-1,1] -> features [B,h,w,F] of dtype `dtype`, h = H/16 and w = W/16.

    InputError if H or W is no multiple of 16.
    """
    h, w = grid_of(image_BHWC, self.stride)
    patch = self.options.patch_size
    if patch != self.stride:
      image_BHWC = resize(image_BHWC, h * patch, w * patch)
    patches_BND = self.tokens(image_BHWC)[:, self.num_prefix_tokens :]
    return rearrange(patches_BND, "B (h w) D -> B h w D", h=h)

  def tokens(self, image_BHWC: jax.Array) -> jax.Array:
    """All tokens [B,N,F] of the last layer after the final norm: class, registers, patches by row.

    The images are at the network's own resolution: H and W are multiples of the patch size.
    """
    grid_of(image_BHWC, self.options.patch_size)
    x_BND = self.embedding(normalized(image_BHWC, self.options.statistics))
    if self.norm_pre is not None:
      x_BND = self.norm_pre(x_BND)
    graph, weights = nnx.split(self.blocks)

    def run_block(x_BND: jax.Array, weights_of_block: Any) -> tuple[jax.Array, None]:
      return nnx.merge(graph, weights_of_block)(x_BND), None

    x_BND, _ = jax.lax.scan(run_block, x_BND, weights)
    return self.norm(x_BND).astype(self.dtype)


class Embedding(nnx.Module):
  """Images -> tokens with positions, float32."""

  def __init__(self, options: Options, layers: Layers):
    width, self.grid_size = options.hidden_size, options.grid_size
    self.embed_class = options.embed_class
    self.has_registers = options.num_registers > 0
    self.patch = layers.patches(options.patch_size, width, not options.use_pre_norm)
    self.cls_token = layers.table(1, 1, width)
    if self.has_registers:
      self.register_tokens = layers.table(1, options.num_registers, width)
    self.pos_embed = layers.table(1, self.grid_size**2 + self.embed_class, width)

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    x_BhwD = self.patch(image_BHWC).astype(jnp.float32)
    batch, h, w, width = x_BhwD.shape
    positions_1ND, cls_11D = jnp.asarray(self.pos_embed[...]), jnp.asarray(self.cls_token[...])
    if self.embed_class:
      cls_11D = cls_11D + positions_1ND[:, :1]
      positions_1ND = positions_1ND[:, 1:]
    positions_1hwD = rearrange(positions_1ND, "1 (h w) D -> 1 h w D", h=self.grid_size)
    x_BND = rearrange(x_BhwD + resample_positions(positions_1hwD, h, w), "B h w D -> B (h w) D")
    # Registers have no position.
    prefix = [cls_11D, self.register_tokens[...]] if self.has_registers else [cls_11D]
    prefix_BND = [jnp.broadcast_to(x, (batch, x.shape[1], width)) for x in prefix]
    return jnp.concatenate([*prefix_BND, x_BND], axis=1)


class Block(nnx.Module):
  """Attention and MLP, each normed before and, with layer scale, scaled after."""

  def __init__(self, options: Options, layers: Layers):
    width = options.hidden_size
    mlp_size = options.mlp_size or 4 * width
    self.norm1 = layers.norm(width)
    self.attn = Attention(width, options.num_heads, layers)
    self.ls1 = _LayerScale(width) if options.use_layer_scale else None
    self.norm2 = layers.norm(width)
    self.mlp: nnx.Module = (
      SwiGLU(width, mlp_size, layers)
      if options.use_swiglu
      else Mlp(width, mlp_size, options.activation, layers)
    )
    self.ls2 = _LayerScale(width) if options.use_layer_scale else None

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    y_BND = self.attn(self.norm1(x_BND))
    x_BND = x_BND + (y_BND if self.ls1 is None else self.ls1(y_BND))
    y_BND = self.mlp(self.norm2(x_BND))
    return x_BND + (y_BND if self.ls2 is None else self.ls2(y_BND))


class _LayerScale(nnx.Module):
  """A factor for each channel, float32."""

  def __init__(self, hidden_size: int):
    self.gamma = nnx.Param(jnp.ones(hidden_size))

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    return x_BND * self.gamma[...]


COMPARED = ((Embedding, "patch_drop"), (Block, "Block"))
