"""LPIPS: how different two images look, by the features of a VGG16 and learned channel weights.

Frozen: the tokenizer's training adds the distance to its reconstruction loss, evaluation reports
it. Notable: features and distance are apart, so that a training step computes the features of the
real image once, outside the gradient. Convolutions run in `dtype`; inputs are scaled, features
normalised and sums taken in float32.

Source: Zhang et al., arXiv 1801.03924; CompVis/taming-transformers taming/modules/losses/lpips.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vavae_jax.common import functional
from vavae_jax.common.convolution import convolve
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import pin_batch
from vavae_jax.weights import torch_weights
from vavae_jax.weights.state_dicts import read_state_dict

# Of each slice, PyTorch's numbers of the convolutions, which count activations and pools too, and
# the width.
_SLICES = (
  ((0, 2), 64),
  ((5, 7), 128),
  ((10, 12, 14), 256),
  ((17, 19, 21), 512),
  ((24, 26, 28), 512),
)
# ImageNet's statistics for images in [-1, 1], rounded as they were when the heads were trained.
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)
SMALLEST = 2 ** (len(_SLICES) - 1)  # side of a picture
_EPSILON = 1e-10

# What the files hold that is not used: torchvision's or timm's classifier, a second name of lpips'
# heads.
LEFT_ASIDE = ("classifier.", "pre_logits.", "head.", "lins.")
_IN_CHECKPOINT = "loss.perceptual_loss."
_WANTED = (
  "LPIPS needs two files: torchvision's VGG16 of ImageNet, vgg16-397923af.pth or "
  "hf:timm/vgg16.tv_in1k/model.safetensors from the Hugging Face hub "
  "(config.perceptual.vgg), and its heads, lpips/weights/v0.1/vgg.pth of "
  "https://github.com/richzhang/PerceptualSimilarity (config.perceptual.heads); or one file that "
  "has both as config.perceptual.vgg. --config.perceptual.network=efficientnet_lite0 needs neither."
)


class Lpips(nnx.Module):
  """The distance of two images; with random weights it does not measure what people see."""

  def __init__(self, *, dtype: jax.typing.DTypeLike = jnp.float32, rngs: nnx.Rngs):
    self.dtype = dtype
    widths = [3, *(width for _, width in _SLICES)]
    counts = [len(numbers) for numbers, _ in _SLICES]
    pairs = zip(pairwise(widths), counts, strict=True)
    self.slices = nnx.List([_Slice(*pair, count, dtype, rngs) for pair, count in pairs])
    self.heads = nnx.List([_Head(width) for width in widths[1:]])

  def __call__(self, a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """Float32 distances [B] of RGB images [B,H,W,3] in [-1, 1], pair by pair; 0 for equal ones."""
    return self.distance(self.features(a_BHWC), self.features(b_BHWC))

  def features(self, image_BHWC: jax.Array) -> tuple[jax.Array, ...]:
    """The five feature maps of RGB images [B,H,W,3] in [-1, 1], the last of each resolution.

    They are [B,H,W,64], [B,H/2,W/2,128], [B,H/4,W/4,256], [B,H/8,W/8,512] and [B,H/16,W/16,512] of
    `dtype`, not negative; each halving rounds down. InputError below 16 x 16 pixels.
    """
    if image_BHWC.ndim != 4 or image_BHWC.shape[-1] != 3 or min(image_BHWC.shape[1:3]) < SMALLEST:
      raise InputError(
        f"LPIPS needs images [B,H,W,3] of at least {SMALLEST} x {SMALLEST} pixels, channels "
        f"last, but got {image_BHWC.shape}."
      )
    scaled_BHWC = (image_BHWC.astype(jnp.float32) - _SHIFT) / _SCALE
    x = pin_batch(scaled_BHWC.astype(self.dtype))
    maps = []
    for i, part in enumerate(self.slices):
      x = part(x if i == 0 else nnx.max_pool(x, (2, 2), (2, 2)))
      maps.append(x)
    return tuple(maps)

  def distance(self, features_a: Sequence[jax.Array], features_b: Sequence[jax.Array]) -> jax.Array:
    """The distance [B], float32, of images by their feature maps.

    Squared differences of unit features, weighted by channel, averaged over positions and summed
    over the maps.
    """
    chex.assert_trees_all_equal_shapes(list(features_a), list(features_b))
    squares = [(_unit(a) - _unit(b)) ** 2 for a, b in zip(features_a, features_b, strict=True)]
    terms = [head(square) for head, square in zip(self.heads, squares, strict=True)]
    return jnp.stack([term_Bhw.mean((1, 2)) for term_Bhw in terms]).sum(0)


class _Slice(nnx.Module):
  """The convolutions at one resolution, each with its activation."""

  def __init__(
    self, width: int, channels: int, num_convs: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
  ):
    # This initializer keeps the scale through 13 activations.
    options: Any = {"kernel_init": nnx.initializers.he_normal(), "dtype": dtype, "rngs": rngs}
    options["conv_general_dilated"] = convolve
    pairs = pairwise([width] + [channels] * num_convs)
    self.convs = nnx.List([nnx.Conv(*pair, (3, 3), **options) for pair in pairs])

  def __call__(self, x: jax.Array) -> jax.Array:
    for conv in self.convs:
      x = pin_batch(nnx.relu(conv(x)))
    return x


class _Head(nnx.Module):
  """One weight per channel, in the layout of a convolution's kernel; it starts as a mean."""

  def __init__(self, channels: int):
    self.kernel = nnx.Param(jnp.full((1, 1, channels, 1), 1 / channels))

  def __call__(self, square_BhwD: jax.Array) -> jax.Array:
    # Not a product of matrices, which TPUs round to bfloat16.
    return jnp.sum(square_BhwD * self.kernel[0, 0, :, 0], -1)


def lpips_from_torch(
  *state_dicts: Mapping[str, Any], dtype: jax.typing.DTypeLike = jnp.float32
) -> Lpips:
  """LPIPS with the weights of PyTorch's files, together or apart; float32.

  The state dicts have the convolutions as torchvision's VGG16 names them (`features.0.weight`) or
  as LPIPS does (`net.slice1.0.weight`), and the heads (`lin0.model.1.weight`). A classifier is left
  aside, and of a tokenizer's training checkpoint all but `loss.perceptual_loss.`. InputError lists
  unknown, missing, misshapen, non-finite or doubly given tensors.
  """
  weights: dict[str, Any] = {}
  for state_dict in state_dicts:
    own = {
      name.removeprefix(_IN_CHECKPOINT): value
      for name, value in state_dict.items()
      if name.startswith(_IN_CHECKPOINT)
    } or state_dict
    own = {name: value for name, value in own.items() if not name.startswith(LEFT_ASIDE)}
    if twice := sorted(weights.keys() & own.keys()):
      raise InputError(f"More than one of the files has {twice[0]}; give only one that has it.")
    weights |= own
  from_torchvision = any(name.startswith("features.") for name in weights)
  fixed = {
    f"scaling_layer.{name}": values.reshape(1, 3, 1, 1)
    for name, values in (("shift", _SHIFT), ("scale", _SCALE))
  }
  model = functional.abstract(lambda rngs: Lpips(dtype=dtype, rngs=rngs))
  renamed = _torch_names(from_torchvision)
  return torch_weights.load(model, weights, renamed=renamed, fixed=fixed)


def load_lpips(
  vgg: str | os.PathLike[str],
  heads: str | os.PathLike[str] = "",
  *,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> Lpips:
  """LPIPS with the weights of one or two files; `heads` is "" if `vgg` has them, too.

  A file is given by its path or as hf:OWNER/NAME/FILE.

  InputError, which says where to get a file, if it is missing or is not LPIPS'.
  """
  if not vgg:
    raise InputError(f"No file of VGG16 is given. {_WANTED}")
  paths = [path for path in (vgg, heads) if path]
  try:
    return lpips_from_torch(*(read_state_dict(path) for path in paths), dtype=dtype)
  except InputError as error:
    tried = " and ".join(map(str, paths))
    raise InputError(f"LPIPS cannot be read from {tried}. {error} {_WANTED}") from error


def _torch_names(from_torchvision: bool) -> dict[str, str]:
  """Our names -> PyTorch's, as torchvision or as LPIPS names the convolutions."""
  names = {}
  for i, (numbers, _) in enumerate(_SLICES):
    names[f"heads.{i}."] = f"lin{i}.model.1."
    parent = "features" if from_torchvision else f"net.slice{i + 1}"
    names |= {f"slices.{i}.convs.{j}.": f"{parent}.{n}." for j, n in enumerate(numbers)}
  return names


def _unit(x_BhwD: jax.Array) -> jax.Array:
  """Unit vectors along the channels, float32; zero vectors stay zero."""
  x_BhwD = x_BhwD.astype(jnp.float32)
  square_Bhw1 = jnp.sum(x_BhwD * x_BhwD, -1, keepdims=True)
  # The square root's gradient at zero is infinite and would pass the outer `where` as NaN. PyTorch
  # has it too; there as here the ReLU before, inactive in all channels, lets nothing through.
  is_zero = square_Bhw1 == 0
  norm_Bhw1 = jnp.sqrt(jnp.where(is_zero, 1.0, square_Bhw1))
  return jnp.where(is_zero, 0.0, x_BhwD / (norm_Bhw1 + _EPSILON))
