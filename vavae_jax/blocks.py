"""The layers that the tokenizer's network consists of, up to the blocks of one resolution.

Convolutions run in `dtype`; GroupNorm and attention's softmax are float32.

Source: Rombach et al., arXiv 2112.10752; hustvl/LightningDiT
vavae/ldm/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any, cast

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from vavae_jax.common.convolution import apart, convolve
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import pin_batch, platform
from vavae_jax.normalization import normalized


@dataclasses.dataclass(frozen=True)
class Layers:
  """Makes the two kinds of layer that everything below consists of.

  With `use_checkpoint` the backward pass computes each block again instead of keeping its insides.
  """

  norm_groups: int
  use_checkpoint: bool
  final_norm: bool
  dtype: jax.typing.DTypeLike
  rngs: nnx.Rngs

  def conv(self, in_channels: int, out_channels: int, size: int = 3, **kwargs: Any) -> nnx.Conv:
    """A convolution that starts as PyTorch's do: all weights uniform in +-1/sqrt(fan_in)."""
    bound = (in_channels * size * size) ** -0.5

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
      return jax.random.uniform(key, shape, dtype, -bound, bound)

    kwargs |= {"kernel_init": init, "bias_init": init, "dtype": self.dtype, "rngs": self.rngs}
    kwargs["conv_general_dilated"] = convolve
    return nnx.Conv(in_channels, out_channels, (size, size), **kwargs)

  def norm(self, channels: int) -> nnx.GroupNorm:
    """GroupNorm in float32, its variance from centred values: E[x^2] - E[x]^2 would cancel."""
    if self.norm_groups < 1 or channels % self.norm_groups:
      raise InputError(
        f"norm_groups={self.norm_groups} does not divide a width of {channels} channels; choose "
        "norm_groups that divides ch * m for every m in ch_mult (the published model has 32)."
      )
    return nnx.GroupNorm(
      channels,
      self.norm_groups,
      epsilon=1e-6,
      dtype=jnp.float32,
      use_fast_variance=False,
      rngs=self.rngs,
    )


class ResnetBlock(nnx.Module):
  """Twice norm, swish, convolution, around a shortcut."""

  def __init__(self, in_channels: int, out_channels: int, layers: Layers):
    self.norm1 = layers.norm(in_channels)
    self.conv1 = layers.conv(in_channels, out_channels)
    self.norm2 = layers.norm(out_channels)
    self.conv2 = layers.conv(out_channels, out_channels)
    same = in_channels == out_channels
    self.nin_shortcut = None if same else layers.conv(in_channels, out_channels, 1)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.conv1(normalized(self.norm1, x, swish=True))
    y = self.conv2(normalized(self.norm2, y, swish=True))
    shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
    return pin_batch(shortcut + y)


class AttnBlock(nnx.Module):
  """Self-attention with one head over all positions, around a shortcut."""

  def __init__(self, channels: int, layers: Layers):
    self.norm = layers.norm(channels)
    self.q, self.k, self.v, self.proj_out = (layers.conv(channels, channels, 1) for _ in range(4))

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    y_BhwD = normalized(self.norm, x_BhwD)
    q_BNKE, k_BNKE, v_BNKE = (
      rearrange(project(y_BhwD), "B h w D -> B (h w) 1 D") for project in (self.q, self.k, self.v)
    )
    y_BNKE = jax.nn.dot_product_attention(q_BNKE, k_BNKE, v_BNKE)  # softmax is always float32
    return pin_batch(x_BhwD + self.proj_out(y_BNKE.reshape(x_BhwD.shape)))


class Downsample(nnx.Module):
  """Halves height and width; the one row and column of padding lie below and to the right."""

  def __init__(self, channels: int, layers: Layers):
    self.conv = layers.conv(channels, channels, strides=2, padding=((0, 1), (0, 1)))

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.conv(x)


class Upsample(nnx.Module):
  """Doubles height and width: every position four times, then a convolution."""

  def __init__(self, channels: int, layers: Layers):
    self.conv = layers.conv(channels, channels)

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    if platform() == "tpu":
      return self._in_place(x_BhwD)
    return self.conv(repeat(x_BhwD, "B h w D -> B (h p) (w q) D", p=2, q=2))

  def _in_place(self, x_BhwD: jax.Array) -> jax.Array:
    """The same without the larger array, which TPUs are slow to write: each of its 2 x 2 positions
    sees 2 x 2 of the input, through sums of the kernel's rows and columns.
    """
    wide = jnp.asarray(self.conv.kernel[...])  # [3, 3, in, out]
    for axis in (0, 1):
      before, behind = ([(0, 0)] * axis + [pad] + [(0, 0)] * (3 - axis) for pad in ((1, 0), (0, 1)))
      wide = jnp.pad(wide, before) + jnp.pad(wide, behind)
    dtype = self.conv.dtype
    y_BhwD = jax.lax.conv_general_dilated(
      x_BhwD.astype(dtype),
      wide.astype(dtype),
      window_strides=(1, 1),
      padding=((2, 2), (2, 2)),
      lhs_dilation=(2, 2),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return apart(y_BhwD + jnp.asarray(cast(nnx.Param, self.conv.bias)[...], dtype))


def run(block: ResnetBlock | AttnBlock, x: jax.Array, use_checkpoint: bool) -> jax.Array:
  """block(x), of which only x is kept for the backward pass where `use_checkpoint` is on."""
  if not use_checkpoint:
    return block(x)
  graph, weights = nnx.split(block)  # what a checkpoint closes over would not be its own to drop
  return jax.checkpoint(lambda weights, x: nnx.merge(graph, weights)(x))(weights, x)


class Level(nnx.Module):
  """The blocks at one resolution, and the way to the next one."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    num_blocks: int,
    layers: Layers,
    *,
    attention: bool,
    downsample: bool = False,
    upsample: bool = False,
  ):
    self.use_checkpoint = layers.use_checkpoint
    widths = [in_channels] + [out_channels] * num_blocks
    self.block = nnx.List([ResnetBlock(*pair, layers) for pair in pairwise(widths)])
    self.attn = nnx.List([AttnBlock(out_channels, layers) for _ in self.block if attention])
    self.downsample = Downsample(out_channels, layers) if downsample else None
    self.upsample = Upsample(out_channels, layers) if upsample else None

  def __call__(self, x: jax.Array) -> jax.Array:
    for i, block in enumerate(self.block):
      x = run(block, x, self.use_checkpoint)
      if self.attn:
        x = run(self.attn[i], x, self.use_checkpoint)
    if self.downsample is not None:
      x = self.downsample(x)
    if self.upsample is not None:
      x = self.upsample(x)
    return x


class Middle(nnx.Module):
  """Block, attention, block at the lowest resolution."""

  def __init__(self, channels: int, layers: Layers):
    self.use_checkpoint = layers.use_checkpoint
    self.block_1 = ResnetBlock(channels, channels, layers)
    self.attn_1 = AttnBlock(channels, layers)
    self.block_2 = ResnetBlock(channels, channels, layers)

  def __call__(self, x: jax.Array) -> jax.Array:
    for block in (self.block_1, self.attn_1, self.block_2):
      x = run(block, x, self.use_checkpoint)
    return x
