"""PSNR and SSIM of image pairs, one value per image.

Notable: both follow the protocol of the published tokenizer's evaluation, not the textbook's. PSNR
compares the 8-bit images that would be written to disk; SSIM compares the unquantised ones, with
the border mirrored so that every pixel is the centre of a window (the textbook has whole windows
only, 0.002 higher on the reference case). The Gaussian window is applied as two banded matrices,
which every accelerator multiplies fast.

Source: evaluate_tokenizer.py of hustvl/LightningDiT; Wang et al. 2004 (SSIM); the reference case
`metrics`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_WINDOW = 11
_SIGMA = 1.5
_DATA_RANGE = 2.0  # of images in [-1, 1]


def psnr(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio of images [B,H,W,C], float in [-1,1], after rounding to 8 bits.

  Decibels [B], float32; higher is better, infinite for images with equal 8-bit values. ValueError
  if the shapes differ or are not [B,H,W,C], or the values are integers.
  """
  _check_pair(a_BHWC, b_BHWC)
  error_BHWC = _to_8_bit(a_BHWC) - _to_8_bit(b_BHWC)
  mse_B = jnp.mean(jnp.square(error_BHWC), axis=(1, 2, 3))
  return 10 * jnp.log10(255.0**2 / mse_B)


def ssim(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
  """Structural similarity with an 11 x 11 Gaussian window of sigma 1.5.

  Images are [B,H,W,C], float in [-1,1] (clipped to it), H and W at least 11. They are mirrored at
  their borders (without repeating the edge), as torchmetrics does. The result is the mean over
  pixels and channels [B], float32, at most 1; higher is better. ValueError: see `psnr`; or if a
  window does not fit.

  Source: Wang et al. 2004, K1 = 0.01, K2 = 0.03.
  """
  _check_pair(a_BHWC, b_BHWC)
  _, height, width, _ = a_BHWC.shape
  if min(height, width) < _WINDOW:
    raise ValueError(
      f"SSIM got images of {height} x {width}, its window needs at least {_WINDOW} x {_WINDOW}: "
      "evaluate at a larger resolution."
    )
  rows, columns = _gaussian_blur(height), _gaussian_blur(width)

  def blur(x_BHWC: jax.Array) -> jax.Array:
    # Variances are small differences of large means: a bfloat16 or TF32 product would drown them.
    return jnp.einsum(
      "ih,bhwc,jw->bijc", rows, x_BHWC, columns, precision=jax.lax.Precision.HIGHEST
    )

  a = jnp.clip(a_BHWC.astype(jnp.float32), -1, 1)
  b = jnp.clip(b_BHWC.astype(jnp.float32), -1, 1)
  mean_a, mean_b = blur(a), blur(b)
  variance_a = jnp.maximum(blur(a * a) - mean_a**2, 0)
  variance_b = jnp.maximum(blur(b * b) - mean_b**2, 0)
  covariance = blur(a * b) - mean_a * mean_b

  c1, c2 = (0.01 * _DATA_RANGE) ** 2, (0.03 * _DATA_RANGE) ** 2
  luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
  structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
  return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _to_8_bit(image: jax.Array) -> jax.Array:
  """The uint8 values of an image in [-1,1], kept as float32."""
  return jnp.floor(jnp.clip(127.5 * image.astype(jnp.float32) + 128, 0, 255))


def _gaussian_blur(length: int) -> np.ndarray:
  """Matrix [length, length] that blurs a row of pixels mirrored at both ends."""
  reach = _WINDOW // 2
  window = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * _SIGMA**2))
  window /= window.sum()
  band = np.stack([np.pad(window, (i, length - 1 - i)) for i in range(length)])
  mirror = np.pad(np.eye(length), ((reach, reach), (0, 0)), mode="reflect")
  return np.asarray(band @ mirror, np.float32)


def _check_pair(a: jax.Array, b: jax.Array) -> None:
  if a.ndim != 4 or a.shape != b.shape:
    raise ValueError(
      f"Got images of shapes {a.shape} and {b.shape}, need two equal shapes [B,H,W,C]: pass pairs "
      "of images at one resolution."
    )
  for image in (a, b):
    if not jnp.issubdtype(image.dtype, jnp.floating):
      raise ValueError(
        f"Got images of dtype {image.dtype}, need float in [-1,1]: convert uint8 by x / 127.5 - 1."
      )
