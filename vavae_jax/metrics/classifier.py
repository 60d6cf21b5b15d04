"""A small picture classifier: features for a Frechet distance where no published network fits.

It judges tokenizers and diffusion models without having taught either of them. Wide residual blocks
on three grids, GroupNorm instead of BatchNorm, so that it is a function of one picture. Filters are
standardised (arXiv 1903.10520), which makes up for what that costs in learning.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.nn.initializers import lecun_normal

from vavae_jax.common.convolution import convolve
from vavae_jax.common.errors import InputError

GRIDS = 3


class Conv(nnx.Module):
  """A 3x3 convolution without bias; with `standardised` weights each filter has the mean 0 and the
  deviation that keeps the scale of a rectified input."""

  def __init__(
    self,
    channels: int,
    wanted: int,
    stride: int = 1,
    *,
    standardised: bool,
    dtype: jax.typing.DTypeLike,
    rngs: nnx.Rngs,
  ):
    self.kernel = nnx.Param(lecun_normal()(rngs.params(), (3, 3, channels, wanted)))
    self.stride, self.standardised, self.dtype = stride, standardised, dtype

  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    """[B,H,W,channels] -> [B, H/stride, W/stride, wanted]."""
    kernel = self.kernel.get_value()
    if self.standardised:
      count = math.prod(kernel.shape[:-1])
      mean, var = (f(kernel, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
      kernel = (kernel - mean) * jax.lax.rsqrt(count * var / 2 + 1e-6)
    return convolve(
      x_BHWC.astype(self.dtype),
      kernel.astype(self.dtype),
      (self.stride, self.stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class Classifier(nnx.Module):
  """Pictures -> features and class scores.

  `width` channels of the finest grid double on each coarser one; each has `depth` residual blocks.
  `patch_size` pixels along each axis are folded into channels first; `norm_groups` divides `width`.
  """

  def __init__(
    self,
    *,
    num_classes: int,
    width: int = 32,
    depth: int = 1,
    patch_size: int = 2,
    norm_groups: int = 8,
    standardised: bool = True,
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if norm_groups < 1 or width % norm_groups:
      raise InputError(f"norm_groups={norm_groups} does not divide width={width}.")
    self.patch_size = patch_size
    self.feature_size = width * 2 ** (GRIDS - 1)

    conv = functools.partial(Conv, standardised=standardised, dtype=dtype, rngs=rngs)

    def norm(channels: int) -> nnx.GroupNorm:
      return nnx.GroupNorm(channels, norm_groups, dtype=jnp.float32, rngs=rngs)

    def block(channels: int) -> nnx.List:
      return nnx.List(
        [norm(channels), conv(channels, channels), norm(channels), conv(channels, channels)]
      )

    widths = [width * 2**grid for grid in range(GRIDS)]
    before = [3 * patch_size**2, *widths[:-1]]
    strides = [1, *[2] * (GRIDS - 1)]
    self.enter = nnx.List([conv(*x) for x in zip(before, widths, strides, strict=True)])
    self.blocks = nnx.List([nnx.List([block(w) for _ in range(depth)]) for w in widths])
    self.norm = norm(widths[-1])
    self.head = nnx.Linear(widths[-1], num_classes, dtype=jnp.float32, rngs=rngs)

  def __call__(self, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """RGB images [B,H,W,3] in [-1,1] -> features before the last layer [B,F], scores [B,classes].

    H and W are multiples of `patch_size`; both results are float32.
    """
    p = self.patch_size
    x_BhwD = rearrange(image_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=p, q=p)
    for enter, blocks in zip(self.enter, self.blocks, strict=True):
      x_BhwD = enter(x_BhwD)
      for norm1, conv1, norm2, conv2 in blocks:
        y_BhwD = conv1(nnx.relu(norm1(x_BhwD)))
        x_BhwD = x_BhwD + conv2(nnx.relu(norm2(y_BhwD)))
    features_BF = nnx.relu(self.norm(x_BhwD)).mean((1, 2))
    return features_BF, self.head(features_BF)
