"""PatchGAN: a small convolutional network that judges every patch of an image for itself.

Notable: BatchNorm takes its statistics over the global batch (under `jax.jit` a mean over a sharded
axis is a mean over all devices) or over groups of it, as the GPUs of the reference did with their 8
images each. Running statistics are `nnx.BatchStat` variables, which a call with `train=True`
updates in place.

Source: Isola et al., arXiv 1611.07004; CompVis/taming-transformers
taming/modules/discriminator/model.py.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vavae_jax.common.convolution import convolve
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import pin_batch


class BatchNorm(nnx.Module):
  """Normalises each channel over batch and space, in float32.

  PyTorch's conventions: the running variance is the unbiased one, the batch is normalised by the
  biased one, and the new batch's share of the running statistics is 0.1. If `group` is not 0, each
  so many images are normalised together; the running statistics then get the groups' mean.
  """

  MOMENTUM = 0.1
  EPSILON = 1e-5

  def __init__(self, channels: int, group: int, rngs: nnx.Rngs):
    self.group = group
    self.scale = nnx.Param(1.0 + 0.02 * rngs.params.normal((channels,)))
    self.bias = nnx.Param(jnp.zeros(channels))
    self.mean = nnx.BatchStat(jnp.zeros(channels))
    self.var = nnx.BatchStat(jnp.ones(channels))

  def __call__(self, x_BhwD: jax.Array, *, train: bool) -> jax.Array:
    x_BhwD = x_BhwD.astype(jnp.float32)
    if not train:
      return self._normalised(x_BhwD, self.mean[...], self.var[...])
    # G: groups, n: images of a group.
    x_GnhwD = rearrange(x_BhwD, "(G n) h w D -> G n h w D", n=self.group or len(x_BhwD))
    mean_G111D = x_GnhwD.mean((1, 2, 3), keepdims=True)
    var_G111D = x_GnhwD.var((1, 2, 3), keepdims=True)
    count = x_GnhwD[0, ..., 0].size
    mean_D, var_D = (x_G111D.mean((0, 1, 2, 3)) for x_G111D in (mean_G111D, var_G111D))
    self._remember(mean_D, var_D * count / (count - 1))
    return self._normalised(x_GnhwD, mean_G111D, var_G111D).reshape(x_BhwD.shape)

  def _normalised(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
    return (x - mean) * (jax.lax.rsqrt(var + self.EPSILON) * self.scale) + self.bias

  def _remember(self, mean_D: jax.Array, unbiased_var_D: jax.Array) -> None:
    for running, new in ((self.mean, mean_D), (self.var, unbiased_var_D)):
      running[...] = running[...] + self.MOMENTUM * (jax.lax.stop_gradient(new) - running[...])


class Layer(nnx.Module):
  """4x4 convolution, then BatchNorm in all but the first, then leaky ReLU."""

  def __init__(self, conv: nnx.Conv, norm: BatchNorm | None):
    self.conv, self.norm = conv, norm

  def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
    x = self.conv(x)
    if self.norm is not None:
      x = self.norm(x, train=train)
    return pin_batch(nnx.leaky_relu(x, 0.2))


class PatchDiscriminator(nnx.Module):
  """Image -> one logit per patch, high for real.

  `ndf` is the width of the first layer, which doubles with every further layer, up to 8 ndf;
  `n_layers` layers halve the image: 3 judge patches of 70 x 70 pixels. BatchNorm normalises
  `bn_group` images together, 0: the whole batch. Convolutions run in `dtype`, BatchNorm in float32.
  """

  def __init__(
    self,
    *,
    in_channels: int = 3,
    ndf: int = 64,
    n_layers: int = 3,
    bn_group: int = 0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.n_layers = n_layers
    self.smallest = 3 * 2**n_layers  # side of a picture that leaves a patch to judge
    widths = [in_channels] + [ndf * min(2**i, 8) for i in range(n_layers + 1)]

    def conv(width: int, channels: int, stride: int, use_bias: bool) -> nnx.Conv:
      bound = (16 * width) ** -0.5  # PyTorch's, whose biases the reference keeps
      return nnx.Conv(
        width,
        channels,
        (4, 4),
        strides=stride,
        padding=1,
        use_bias=use_bias,
        conv_general_dilated=convolve,
        kernel_init=nnx.initializers.normal(0.02),
        bias_init=lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound),
        dtype=dtype,
        rngs=rngs,
      )

    def layer(i: int, width: int, channels: int) -> Layer:
      own = conv(width, channels, 2 if i < n_layers else 1, use_bias=i == 0)
      return Layer(own, BatchNorm(channels, bn_group, rngs) if i else None)

    self.layers = nnx.List([layer(i, *pair) for i, pair in enumerate(pairwise(widths))])
    self.conv_out = conv(widths[-1], 1, 1, use_bias=True)

  def __call__(self, image_BHWC: jax.Array, *, train: bool) -> jax.Array:
    """Images [B,H,W,C] in [-1, 1] -> logits [B,h,w,1] float32, h = H / 2**n_layers - 2.

    With `train` BatchNorm normalises by this batch's statistics and folds them into the running
    ones, otherwise by the running ones. InputError if an image leaves no patch to judge.
    """
    if min(image_BHWC.shape[1:3]) < self.smallest:
      raise InputError(
        f"Images {image_BHWC.shape} are too small for a discriminator with n_layers="
        f"{self.n_layers}, which needs {self.smallest} x {self.smallest} pixels; use fewer layers."
      )
    x = pin_batch(image_BHWC)
    for layer in self.layers:
      x = layer(x, train=train)
    return self.conv_out(x).astype(jnp.float32)
