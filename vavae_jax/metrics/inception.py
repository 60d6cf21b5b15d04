"""The Inception network of FID, and the two ways in which pictures are prepared for it.

It is the classifier that TensorFlow released on 2015-12-05 (1008 outputs), whose features FID,
sFID, the inception score, precision and recall have been computed from ever since; ImageNet
classifiers of the same name have other weights and other pooling. Both pytorch-fid and
torch-fidelity publish it as PyTorch weights, the same file under two names.

Notable: averages at the border are over what is there (TensorFlow's), the last block takes a
maximum where the one before averages (as the released graph does), and sFID's channels are those of
the 1x1 branch of `Mixed_6d`, which the graph calls mixed_6/conv. Everything is float32 in full
precision on every device, since a FID must not depend on what it was computed on.

Source: Szegedy et al. 2015, arXiv 1512.00567; Heusel et al. 2017, arXiv 1706.08500; tensor names of
pytorch-fid 0.3.0's pt_inception-2015-12-05-6726825d.pth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import platform
from vavae_jax.weights import torch_weights

SIZE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
_NORM_EPSILON = 1e-3
_TORCH_NAMES = {
  "norm.": "bn.",
  "conv_1a.": "Conv2d_1a_3x3.",
  "conv_2a.": "Conv2d_2a_3x3.",
  "conv_2b.": "Conv2d_2b_3x3.",
  "conv_3b.": "Conv2d_3b_1x1.",
  "conv_4a.": "Conv2d_4a_3x3.",
  "mixed_": "Mixed_",
}


def adm_input(image_BHWC: jax.Array) -> jax.Array:
  """Pictures as ADM's evaluation, and so the paper's numbers, prepare them: uint8 [B,H,W,3] -> the
  network's input [B,299,299,3], float32 in [-1,1).

  TensorFlow 1's bilinear resize, in which output pixel i lies at i * H / 299 without the half
  pixel's shift, so that pictures move by up to half a pixel; then (x - 128) / 128.
  """
  return (_resize(_checked(image_BHWC), lambda i, scale: i * scale) - 128) / 128


def pytorch_fid_input(image_BHWC: jax.Array) -> jax.Array:
  """Pictures as pytorch-fid prepares them: uint8 [B,H,W,3] -> [B,299,299,3], float32 in [-1,1].

  A bilinear resize by half-pixel centres.
  """
  unit_BHWC = _checked(image_BHWC) / 255
  half = np.float32(0.5)
  return 2 * _resize(unit_BHWC, lambda i, scale: np.maximum((i + half) * scale - half, 0)) - 1


PROTOCOLS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "adm": adm_input,
  "pytorch-fid": pytorch_fid_input,
}


def _checked(image_BHWC: jax.Array) -> jax.Array:
  if image_BHWC.ndim != 4 or image_BHWC.shape[-1] != 3 or image_BHWC.dtype != jnp.uint8:
    raise InputError(
      f"The pictures are {image_BHWC.dtype} of shape {image_BHWC.shape}; uint8 [B,H,W,3] is needed."
    )
  return image_BHWC.astype(jnp.float32)


def _resize(
  image_BHWC: jax.Array, position_of: Callable[[np.ndarray, np.float32], np.ndarray]
) -> jax.Array:
  """Bilinear to 299 x 299, never averaged over more pixels than two by two, as both tools do.

  `position_of` makes (output pixels, input pixels per output pixel) into places in the input.
  """
  for axis in (1, 2):
    size = image_BHWC.shape[axis]
    position = position_of(np.arange(SIZE, dtype=np.float32), np.float32(size / SIZE))
    low = np.minimum(position.astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1)
    weight = np.expand_dims(position - low, [i for i in range(4) if i != axis])
    at_low, at_high = (jnp.take(image_BHWC, index, axis) for index in (low, high))
    image_BHWC = at_low + (at_high - at_low) * weight
  return image_BHWC


class InceptionV3(nnx.Module):
  """The network; nothing in it is trained here."""

  def __init__(self, *, rngs: nnx.Rngs):
    make = _Maker(rngs)
    self.conv_1a = make(3, 32, (3, 3), stride=2)
    self.conv_2a = make(32, 32, (3, 3), padded=False)
    self.conv_2b = make(32, 64, (3, 3))
    self.conv_3b = make(64, 80, (1, 1))
    self.conv_4a = make(80, 192, (3, 3), padded=False)
    self.mixed_5b = Mixed(192, _ON_35, make, _average, 32)
    self.mixed_5c = Mixed(256, _ON_35, make, _average, 64)
    self.mixed_5d = Mixed(288, _ON_35, make, _average, 64)
    self.mixed_6a = Mixed(288, _TO_17, make, _shrink)
    self.mixed_6b = Mixed(768, _on_17(128), make, _average, 192)
    self.mixed_6c = Mixed(768, _on_17(160), make, _average, 192)
    self.mixed_6d = Mixed(768, _on_17(160), make, _average, 192)
    self.mixed_6e = Mixed(768, _on_17(192), make, _average, 192)
    self.mixed_7a = Mixed(768, _TO_8, make, _shrink)
    self.mixed_7b = Mixed(1280, _ON_8, make, _average, 192)
    self.mixed_7c = Mixed(2048, _ON_8, make, _maximum, 192)
    self.fc = nnx.Linear(NUM_FEATURES, NUM_CLASSES, precision="highest", rngs=rngs)

  def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
    """All that the metrics are computed from; under jit, what is unused is free.

    The input is [B,299,299,3] by one of `PROTOCOLS`, or else InputError. The result has "pool3"
    [B,2048], for FID, precision and recall; "spatial" [B,17,17,7], which sFID flattens to 2,023
    numbers; "logits_unbiased" [B,1008], for the inception score (softmax); "logits" [B,1008]; and
    on the way "block1" [B,35,35,192] and "block2" [B,17,17,768].
    """
    if x_BHWC.ndim != 4 or x_BHWC.shape[1:] != (SIZE, SIZE, 3):
      raise InputError(f"The input has shape {x_BHWC.shape}; [B,{SIZE},{SIZE},3] is needed.")
    x_BhwD = self.conv_2b(self.conv_2a(self.conv_1a(x_BHWC)))
    block1_BhwD = _shrink(self.conv_4a(self.conv_3b(_shrink(x_BhwD))))
    x_BhwD = self.mixed_5d(self.mixed_5c(self.mixed_5b(block1_BhwD)))
    x_BhwD = self.mixed_6c(self.mixed_6b(self.mixed_6a(x_BhwD)))
    spatial_BhwD = self.mixed_6d.branch1x1(x_BhwD)[..., :SPATIAL_CHANNELS]
    block2_BhwD = self.mixed_6e(self.mixed_6d(x_BhwD))
    x_BhwD = self.mixed_7c(self.mixed_7b(self.mixed_7a(block2_BhwD)))
    pool3_BD = jnp.mean(x_BhwD, axis=(1, 2))
    return {
      "pool3": pool3_BD,
      "spatial": spatial_BhwD,
      "logits_unbiased": jnp.dot(pool3_BD, self.fc.kernel[...], precision="highest"),
      "logits": self.fc(pool3_BD),
      "block1": block1_BhwD,
      "block2": block2_BhwD,
    }


class _ConvNorm(nnx.Module):
  """A convolution, BatchNorm by its stored statistics, relu.

  Notable: unpadded convolutions pad a row and a column of zeros and cut off their results, and 1x1
  convolutions are matrix products: two and three times faster by XLA on a CPU.
  """

  def __init__(self, conv: nnx.Conv, stride: int, rngs: nnx.Rngs):
    self.conv, self.stride = conv, stride
    self.norm = nnx.BatchNorm(
      conv.out_features, use_running_average=True, epsilon=_NORM_EPSILON, rngs=rngs
    )

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    if platform() == "tpu":
      y_BhwD = _convolved(x_BhwD, self.conv.kernel[...], (self.stride,) * 2, self.conv.padding)
    elif self.conv.kernel_size == (1, 1):
      y_BhwD = jnp.dot(x_BhwD, self.conv.kernel[0, 0], precision="highest")
    else:
      y_BhwD = self.conv(x_BhwD)
    if self.conv.padding != "SAME":
      height, width = ((size - 3) // self.stride + 1 for size in x_BhwD.shape[1:3])
      y_BhwD = y_BhwD[:, :height, :width]
    return jax.nn.relu(self.norm(y_BhwD))


def _convolved(
  x_BhwD: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Any
) -> jax.Array:
  """The convolution in all digits of float32, as several of bfloat16, for TPUs.

  Precision "highest" makes them there too, but all in one operation, over which libtpu's search for
  a schedule takes half a minute: half an hour for this network. As a loop it takes a sixth.
  """
  kernel = jnp.concatenate(_parts(kernel), axis=-1)

  def convolve(x_BhwD: jax.Array) -> jax.Array:
    products = jax.lax.conv_general_dilated(
      *(x_BhwD, kernel, strides, padding),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      preferred_element_type=jnp.float32,
    )
    large, medium, small = jnp.split(products, 3, axis=-1)
    return small + medium + large

  parts = jnp.stack(_parts(x_BhwD)[::-1])
  nothing = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(convolve, parts[0]))
  return jax.lax.scan(lambda y, part: (y + convolve(part), None), nothing, parts)[0]


def _parts(x: jax.Array) -> list[jax.Array]:
  """Three bfloat16 arrays, the largest digits first, that sum to one of float32."""
  parts = []
  for _ in range(3):
    # A cast to bfloat16 and back XLA may leave out.
    part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    parts.append(part.astype(jnp.bfloat16))
    x = x - part
  return parts


class _Maker:
  """Makes convolutions; those with a stride never pad."""

  def __init__(self, rngs: nnx.Rngs):
    self.rngs = rngs

  def __call__(
    self, width: int, channels: int, size: tuple[int, int], stride: int = 1, padded: bool = True
  ) -> _ConvNorm:
    padding = "SAME" if padded and stride == 1 else ((0, 1), (0, 1))
    options: Any = {"padding": padding, "use_bias": False, "precision": "highest"}
    conv = nnx.Conv(width, channels, size, stride, **options, rngs=self.rngs)
    return _ConvNorm(conv, stride, self.rngs)


# Branches of convolutions one after the other: published name -> (channels, height and width of the
# kernel). Two branches may begin with the same ones.
Branches = Sequence[dict[str, tuple[int, int, int]]]
_ON_35: Branches = (
  {"1x1": (64, 1, 1)},
  {"5x5_1": (48, 1, 1), "5x5_2": (64, 5, 5)},
  {"3x3dbl_1": (64, 1, 1), "3x3dbl_2": (96, 3, 3), "3x3dbl_3": (96, 3, 3)},
)
_TO_17: Branches = (
  {"3x3": (384, 3, 3)},
  {"3x3dbl_1": (64, 1, 1), "3x3dbl_2": (96, 3, 3), "3x3dbl_3": (96, 3, 3)},
)
_TO_8: Branches = (
  {"3x3_1": (192, 1, 1), "3x3_2": (320, 3, 3)},
  {"7x7x3_1": (192, 1, 1), "7x7x3_2": (192, 1, 7), "7x7x3_3": (192, 7, 1), "7x7x3_4": (192, 3, 3)},
)
_ON_8: Branches = (
  {"1x1": (320, 1, 1)},
  {"3x3_1": (384, 1, 1), "3x3_2a": (384, 1, 3)},
  {"3x3_1": (384, 1, 1), "3x3_2b": (384, 3, 1)},
  {"3x3dbl_1": (448, 1, 1), "3x3dbl_2": (384, 3, 3), "3x3dbl_3a": (384, 1, 3)},
  {"3x3dbl_1": (448, 1, 1), "3x3dbl_2": (384, 3, 3), "3x3dbl_3b": (384, 3, 1)},
)


def _on_17(inner: int) -> Branches:
  one, row, column = (inner, 1, 1), (inner, 1, 7), (inner, 7, 1)
  twice = {"7x7dbl_1": one, "7x7dbl_2": column, "7x7dbl_3": row, "7x7dbl_4": column}
  return (
    {"1x1": (192, 1, 1)},
    {"7x7_1": one, "7x7_2": row, "7x7_3": (192, 7, 1)},
    twice | {"7x7dbl_5": (192, 1, 7)},
  )


class Mixed(nnx.Module):
  """Branches of convolutions beside each other, and a pool; their channels are joined.

  A convolution to `pool_channels` follows the pool. With 0 there is none, and the block halves the
  grid, by the stride of each branch's last convolution.
  """

  branch1x1: _ConvNorm

  def __init__(
    self,
    width: int,
    branches: Branches,
    make: _Maker,
    pool: Callable[[jax.Array], jax.Array],
    pool_channels: int = 0,
  ):
    self.pool = pool
    self.branches = tuple(tuple(f"branch{name}" for name in branch) for branch in branches)
    for names, branch in zip(self.branches, branches, strict=True):
      inputs = width
      for name, (channels, *size) in zip(names, branch.values(), strict=True):
        stride = 1 if pool_channels or name != names[-1] else 2
        if not hasattr(self, name):
          setattr(self, name, make(inputs, channels, (size[0], size[1]), stride))
        inputs = channels
    self.branch_pool = make(width, pool_channels, (1, 1)) if pool_channels else None

  def __call__(self, x_BhwD: jax.Array) -> jax.Array:
    found: dict[str, jax.Array] = {}
    joined = []
    for names in self.branches:
      y_BhwD = x_BhwD
      for name in names:
        if name not in found:
          found[name] = getattr(self, name)(y_BhwD)
        y_BhwD = found[name]
      joined.append(y_BhwD)
    pooled = self.pool(x_BhwD)
    joined.append(pooled if self.branch_pool is None else self.branch_pool(pooled))
    return jnp.concatenate(joined, axis=-1)


def _average(x_BhwD: jax.Array) -> jax.Array:
  """The mean of each 3 x 3 neighbourhood, of its part inside the grid."""
  counts = _by_threes(jnp.ones((1, *x_BhwD.shape[1:3], 1)), jnp.add, 0)
  return _by_threes(x_BhwD, jnp.add, 0) / counts


def _maximum(x_BhwD: jax.Array) -> jax.Array:
  """The maximum of each 3 x 3 neighbourhood."""
  return _by_threes(x_BhwD, jnp.maximum, -jnp.inf)


def _shrink(x_BhwD: jax.Array) -> jax.Array:
  """The maximum of every second 3 x 3 neighbourhood that is whole."""
  for axis in (1, 2):
    size = x_BhwD.shape[axis]
    thirds = (jax.lax.slice_in_dim(x_BhwD, i, size - 2 + i, 2, axis) for i in range(3))
    x_BhwD = functools.reduce(jnp.maximum, thirds)
  return x_BhwD


def _by_threes(
  x_BhwD: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array], beyond: float
) -> jax.Array:
  """Rows and then columns with their two neighbours; XLA's windows take a CPU ten times as long."""
  for axis in (1, 2):
    size = x_BhwD.shape[axis]
    widths = [(int(i == axis), int(i == axis)) for i in range(4)]
    padded = jnp.pad(x_BhwD, widths, constant_values=beyond)
    thirds = (jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i in range(3))
    x_BhwD = functools.reduce(combine, thirds)
  return x_BhwD


def from_torch(state_dict: Mapping[str, Any]) -> InceptionV3:
  """The network with the weights that pytorch-fid and torch-fidelity publish, float32.

  `num_batches_tracked`, which only counts, is left aside. InputError lists unknown, missing,
  misshapen or non-finite tensors, as those of torchvision's classifier would be.
  """
  norms = [name.removesuffix("weight") for name in state_dict if name.endswith(".bn.weight")]
  counters = {f"{norm}num_batches_tracked" for norm in norms}
  own = {k: v for k, v in state_dict.items() if k not in counters or np.ndim(v)}
  model = functional.abstract(lambda rngs: InceptionV3(rngs=rngs))
  return torch_weights.load(model, own, renamed=_TORCH_NAMES)
