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


class ViT(nnx.Module):
  """A vision transformer without a head; its features lie on a grid of 16 pixels of the image.

  Args:
    patch_size: pixels of the network's input per token along each axis.
    hidden_size, depth, num_heads: width D, number of blocks L, attention heads K.
    grid_size: rows and columns of the position embedding.
    mlp_size: the MLP's width; four times `hidden_size` if not given.
    num_registers: register tokens.
    embed_class: the position embedding has a row for the class token.
    use_layer_scale: each sublayer's output is scaled channel by channel.
    use_swiglu: SwiGLU instead of an MLP.
    activation: of the MLP, "gelu" or "quick_gelu".
    use_pre_norm: CLIP's: a norm before the blocks, and patches without a bias.
    epsilon: of all norms.
    statistics: what images are normalised by; None feeds [-1,1] as it is.
    dtype: of matrix products and features; weights are float32.
  """

  stride = 16

  def __init__(
    self,
    *,
    patch_size: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    grid_size: int,
    mlp_size: int | None = None,
    num_registers: int = 0,
    embed_class: bool = True,
    use_layer_scale: bool = False,
    use_swiglu: bool = False,
    activation: str = "gelu",
    use_pre_norm: bool = False,
    epsilon: float = 1e-6,
    statistics: Statistics | None = None,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.patch_size = patch_size
    self.feature_size = hidden_size
    self.num_prefix_tokens = 1 + num_registers
    self.statistics = statistics
    self.dtype = dtype
    layers = Layers(epsilon, dtype, rngs)
    self.embedding = Embedding(
      patch_size,
      hidden_size,
      grid_size,
      num_registers,
      embed_class=embed_class,
      use_bias=not use_pre_norm,
      layers=layers,
    )
    self.norm_pre = layers.norm(hidden_size) if use_pre_norm else None

    @nnx.split_rngs(splits=depth)
    @nnx.vmap
    def stacked_blocks(rngs: nnx.Rngs) -> Block:
      return Block(
        hidden_size,
        num_heads,
        mlp_size or 4 * hidden_size,
        activation,
        use_layer_scale=use_layer_scale,
        use_swiglu=use_swiglu,
        layers=dataclasses.replace(layers, rngs=rngs),
      )

    self.blocks = stacked_blocks(rngs)
    self.norm = layers.norm(hidden_size)

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """RGB images [B,H,W,3] in [-1,1] -> features [B,h,w,F] of dtype `dtype`, h = H/16 and w = W/16.

    InputError if H or W is no multiple of 16.
    """
    h, w = grid_of(image_BHWC, self.stride)
    if self.patch_size != self.stride:
      image_BHWC = resize(image_BHWC, h * self.patch_size, w * self.patch_size)
    patches_BND = self.tokens(image_BHWC)[:, self.num_prefix_tokens :]
    return rearrange(patches_BND, "B (h w) D -> B h w D", h=h)

  def tokens(self, image_BHWC: jax.Array) -> jax.Array:
    """All tokens [B,N,F] of the last layer after the final norm: class, registers, patches by row.

    The images are at the network's own resolution: H and W are multiples of the patch size.
    """
    grid_of(image_BHWC, self.patch_size)
    x_BND = self.embedding(normalized(image_BHWC, self.statistics))
    if self.norm_pre is not None:
      x_BND = self.norm_pre(x_BND)
    graph, weights = nnx.split(self.blocks)

    def run_block(x_BND: jax.Array, weights_of_block: Any) -> tuple[jax.Array, None]:
      return nnx.merge(graph, weights_of_block)(x_BND), None

    x_BND, _ = jax.lax.scan(run_block, x_BND, weights)
    return self.norm(x_BND).astype(self.dtype)


class Embedding(nnx.Module):
  """Images -> tokens with positions, float32."""

  def __init__(
    self,
    patch_size: int,
    hidden_size: int,
    grid_size: int,
    num_registers: int,
    *,
    embed_class: bool,
    use_bias: bool,
    layers: Layers,
  ):
    self.grid_size = grid_size
    self.embed_class = embed_class
    self.has_registers = num_registers > 0
    self.patch = layers.patches(patch_size, hidden_size, use_bias)
    self.cls_token = layers.table(1, 1, hidden_size)
    if self.has_registers:
      self.register_tokens = layers.table(1, num_registers, hidden_size)
    self.pos_embed = layers.table(1, grid_size**2 + embed_class, hidden_size)

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

  def __init__(
    self,
    hidden_size: int,
    num_heads: int,
    mlp_size: int,
    activation: str,
    *,
    use_layer_scale: bool,
    use_swiglu: bool,
    layers: Layers,
  ):
    self.norm1 = layers.norm(hidden_size)
    self.attn = Attention(hidden_size, num_heads, layers)
    self.ls1 = _LayerScale(hidden_size) if use_layer_scale else None
    self.norm2 = layers.norm(hidden_size)
    self.mlp: nnx.Module = (
      SwiGLU(hidden_size, mlp_size, layers)
      if use_swiglu
      else Mlp(hidden_size, mlp_size, activation, layers)
    )
    self.ls2 = _LayerScale(hidden_size) if use_layer_scale else None

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
