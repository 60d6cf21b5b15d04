"""Teachers around a teacher: for another grid than its own, and for features without their mean."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vavae_jax.common.errors import InputError


class Enlarged(nnx.Module):
  """A teacher that sees pictures `scale` times larger along each axis, averaged over each cell.

  `stride` are the wanted pixels per feature; InputError if `scale` times it is no multiple of the
  teacher's own.
  """

  def __init__(self, teacher: Any, scale: int, stride: int):
    pool, rest = divmod(stride * scale, teacher.stride)
    if scale < 1 or rest or not pool:
      raise InputError(
        f"The teacher has a feature for every {teacher.stride} pixels along each axis, the model a "
        f"latent for every {stride}; they are compared position by position. Enlarged "
        f"config.teacher.scale={scale} times these are {stride * scale} pixels, which must be a "
        f"multiple of {teacher.stride}: set the scale to {max(teacher.stride // stride, 1)}."
      )
    self.teacher, self.scale, self.stride = teacher, scale, stride
    self.pool = pool
    self.feature_size = teacher.feature_size

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """Images [B,H,W,3], float in [-1,1] -> features [B,h,w,F] with h = H / stride."""
    batch, height, width, channels = image_BHWC.shape
    larger = (batch, self.scale * height, self.scale * width, channels)
    # Cubic interpolation leaves the range of what it interpolates.
    image_BHWC = jnp.clip(jax.image.resize(image_BHWC, larger, "cubic"), -1, 1)
    x_BhwF = self.teacher(image_BHWC)
    batch, height, width, features = x_BhwF.shape
    cells = (batch, height // self.pool, self.pool, width // self.pool, self.pool, features)
    return x_BhwF.reshape(cells).mean((2, 4))


class Centred(nnx.Module):
  """A teacher's features without a mean [F], which is zero until somebody sets it."""

  def __init__(self, teacher: Any):
    self.teacher, self.stride, self.feature_size = teacher, teacher.stride, teacher.feature_size
    self.mean = nnx.Variable(jnp.zeros(teacher.feature_size))

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """As the teacher's."""
    return self.teacher(image_BHWC) - self.mean[...]
