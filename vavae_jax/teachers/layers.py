"""What the transformers among the teachers share: images, positions, norms, attention, MLPs.

Notable: matrices multiply in `dtype`; norms, softmax and the residual stream are float32.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import platform

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]

# Mean and standard deviation of RGB in [0,1], that publishers normalise images by.
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# What the publishers' small, base, ... transformers have in common.
SIZES: dict[str, dict[str, Any]] = {
  "small": {"hidden_size": 384, "depth": 12, "num_heads": 6},
  "base": {"hidden_size": 768, "depth": 12, "num_heads": 12},
  "large": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
  "huge": {"hidden_size": 1280, "depth": 32, "num_heads": 16},
  "giant": {"hidden_size": 1536, "depth": 40, "num_heads": 24, "mlp_size": 4096},
}


def grid_of(image_BHWC: jax.Array, cell: int) -> tuple[int, int]:
  """(rows, columns) of the grid into which images [B,H,W,3] divide, `cell` pixels along each axis.

  InputError if the images have another shape, or do not divide.
  """
  if image_BHWC.ndim != 4 or image_BHWC.shape[-1] != 3:
    raise InputError(f"The images have shape {image_BHWC.shape}; [B,H,W,3] is needed.")
  _, height, width, _ = image_BHWC.shape
  if height % cell or width % cell or not height * width:
    raise InputError(
      f"Images of {height} x {width} pixels do not divide into cells of {cell} x {cell}: height "
      f"and width must be multiples of {cell}; crop or resize them."
    )
  return height // cell, width // cell


def resize(image_BHWC: jax.Array, height: int, width: int) -> jax.Array:
  """Images of another size: bilinear with half-pixel centres and no antialias, as the paper's."""
  shape = (image_BHWC.shape[0], height, width, image_BHWC.shape[3])
  return jax.image.resize(image_BHWC, shape, "linear", antialias=False)


def normalized(image_BHWC: jax.Array, statistics: Statistics | None) -> jax.Array:
  """Images in [-1,1] as a network was trained on them, float32; without statistics as they are."""
  image_BHWC = image_BHWC.astype(jnp.float32)
  if statistics is None:
    return image_BHWC
  mean_C, std_C = (jnp.asarray(values, jnp.float32) for values in statistics)
  return ((image_BHWC + 1) / 2 - mean_C) / std_C


def resample_positions(positions_1hwD: jax.Array, h: int, w: int) -> jax.Array:
  """A position embedding for another grid: bicubic, antialiased, as timm's; float32."""
  shape = (1, h, w, positions_1hwD.shape[-1])
  if positions_1hwD.shape == shape:
    return positions_1hwD
  return jax.image.resize(positions_1hwD, shape, jax.image.ResizeMethod.CUBIC_PYTORCH)


@dataclasses.dataclass(frozen=True)
class Layers:
  """Makes a transformer's layers; `epsilon` is of norms, `dtype` of matrix products."""

  epsilon: float
  dtype: jnp.dtype
  rngs: nnx.Rngs

  def norm(self, size: int) -> nnx.LayerNorm:
    """Over the last axis, float32."""
    # The fast variance is E[x^2] - E[x]^2, which cancels.
    return nnx.LayerNorm(
      size, epsilon=self.epsilon, use_fast_variance=False, dtype=jnp.float32, rngs=self.rngs
    )

  def linear(self, in_features: int, out_features: int) -> nnx.Linear:
    """A matrix and a bias."""
    return nnx.Linear(in_features, out_features, dtype=self.dtype, rngs=self.rngs)

  def patches(self, patch_size: int, hidden_size: int, use_bias: bool = True) -> nnx.Conv:
    """Patches of an image -> tokens on a grid."""
    size = (patch_size, patch_size)
    options: Any = {"use_bias": use_bias, "dtype": self.dtype, "rngs": self.rngs}
    return nnx.Conv(3, hidden_size, size, strides=size, padding="VALID", **options)

  def table(self, *shape: int) -> nnx.Param:
    """Learned vectors: tokens or positions."""
    return nnx.Param(nnx.initializers.normal(0.02)(self.rngs.params(), shape))


class Attention(nnx.Module):
  """Self-attention; queries, keys and values are one matrix."""

  def __init__(self, hidden_size: int, num_heads: int, layers: Layers):
    self.num_heads = num_heads
    self.qkv = layers.linear(hidden_size, 3 * hidden_size)
    self.proj = layers.linear(hidden_size, hidden_size)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    q_BNKE, k_BNKE, v_BNKE = self.heads(x_BND)
    return self.merged(jax.nn.dot_product_attention(q_BNKE, k_BNKE, v_BNKE, implementation="xla"))

  def heads(self, x_BND: jax.Array) -> jax.Array:
    """Tokens -> queries, keys and values, each [B,N,K,E]."""
    return rearrange(self.qkv(x_BND), "B N (q K E) -> q B N K E", q=3, K=self.num_heads)

  def merged(self, y_BNKE: jax.Array) -> jax.Array:
    """What the heads attended to -> tokens."""
    return self.proj(rearrange(y_BNKE, "B N K E -> B N (K E)"))


class Mlp(nnx.Module):
  """Two matrices with an activation between them."""

  def __init__(self, hidden_size: int, mlp_size: int, activation: str, layers: Layers):
    self.activation = activation
    self.fc1 = layers.linear(hidden_size, mlp_size)
    self.fc2 = layers.linear(mlp_size, hidden_size)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x_BND)))


class SwiGLU(nnx.Module):
  """silu(x W1) * (x W2), then W3; W1 and W2 are one matrix."""

  def __init__(self, hidden_size: int, mlp_size: int, layers: Layers):
    self.w12 = layers.linear(hidden_size, 2 * mlp_size)
    self.w3 = layers.linear(mlp_size, hidden_size)

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    gate, value = jnp.split(self.w12(x_BND), 2, axis=-1)
    return self.w3(nnx.silu(gate) * value)


def _gelu(x: jax.Array) -> jax.Array:
  if platform() == "tpu":
    # nnx' is by erfc, twice as long there; this differs by 3e-7 |x| at most.
    return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))
  return nnx.gelu(x, approximate=False)


def _quick_gelu(x: jax.Array) -> jax.Array:
  return x * nnx.sigmoid(1.702 * x)


_ACTIVATIONS = {"gelu": _gelu, "quick_gelu": _quick_gelu}
