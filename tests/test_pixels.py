"""PSNR and SSIM against the reference case, and their limits."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import procedural
from vavae_jax.metrics.pixels import psnr, ssim

REFERENCE = Path(__file__).parent / "reference"


def reference_images() -> tuple[jnp.ndarray, jnp.ndarray]:
  p, q = (procedural.normal(name, (2, 3, 48, 48)) for name in ("img_p", "img_q"))
  images = np.tanh(p), np.tanh(p + 0.3 * q)
  return tuple(jnp.asarray(image.transpose(0, 2, 3, 1)) for image in images)


def smooth_images(height: int, width: int) -> jnp.ndarray:
  y, x = np.mgrid[:height, :width] / 7
  image = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], axis=-1)
  return jnp.asarray(np.stack([image, 0.5 * image, -image]), jnp.float32)


def test_psnr_matches_reference():
  expected = np.load(REFERENCE / "metrics.npz")["psnr"]
  np.testing.assert_allclose(psnr(*reference_images()), expected, rtol=1e-5)


def test_ssim_matches_reference():
  expected = np.load(REFERENCE / "metrics.npz")["ssim"]
  np.testing.assert_allclose(ssim(*reference_images()).mean(), expected, rtol=1e-5)


def test_ssim_agrees_with_its_definition():
  """Window by window in float64, on an oblong image."""
  a = 0.9 * np.asarray(smooth_images(11, 14), np.float64)
  b = np.clip(a + 0.2 * procedural.normal("noise", a.shape), -1, 1)
  line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
  window = np.outer(line, line)[None, :, :, None] / line.sum() ** 2
  mirrored = [np.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), "reflect") for x in (a, b)]
  values = []
  for y, x in np.ndindex(11, 14):
    u, v = (image[:, y : y + 11, x : x + 11] for image in mirrored)
    mu, nu = ((window * patch).sum((1, 2), keepdims=True) for patch in (u, v))
    cross = (window * (u - mu) * (v - nu)).sum((1, 2))
    spread = (window * (u - mu) ** 2).sum((1, 2)) + (window * (v - nu) ** 2).sum((1, 2))
    mu, nu = mu[:, 0, 0], nu[:, 0, 0]
    luminance = (2 * mu * nu + 0.02**2) / (mu**2 + nu**2 + 0.02**2)
    values.append(luminance * (2 * cross + 0.06**2) / (spread + 0.06**2))
  expected = np.mean(values, axis=(0, 2))
  np.testing.assert_allclose(ssim(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)


def test_psnr_sees_8_bit_values():
  a = jnp.zeros((3, 12, 16, 3))
  np.testing.assert_array_equal(psnr(a, a + 0.9 / 127.5), np.inf)
  np.testing.assert_allclose(psnr(a, a + 1.5 / 127.5), 20 * np.log10(255), rtol=1e-6)


def test_ssim_of_an_image_with_itself_is_one():
  image = smooth_images(17, 24)
  np.testing.assert_allclose(ssim(image, image), 1, atol=1e-6)


def test_ssim_reads_each_image_and_axis_alone():
  image = smooth_images(17, 24)
  noisy = image + 0.2 * procedural.normal("noise", image.shape)
  values = ssim(image, noisy)
  np.testing.assert_allclose(ssim(image[1:2], noisy[1:2])[0], values[1], rtol=1e-5)
  flipped = ssim(image.transpose(0, 2, 1, 3), noisy.transpose(0, 2, 1, 3))
  np.testing.assert_allclose(flipped, values, rtol=1e-5)
  assert len(set(np.round(values, 3).tolist())) == 3


def test_ssim_clips_to_the_data_range():
  image = smooth_images(13, 19)
  np.testing.assert_array_equal(ssim(image, 3 * image), ssim(image, jnp.clip(3 * image, -1, 1)))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
  ("a", "b", "message"),
  [
    (jnp.zeros((2, 16, 16, 3)), jnp.zeros((3, 16, 16, 3)), "two equal shapes"),
    (jnp.zeros((16, 16, 3)), jnp.zeros((16, 16, 3)), "two equal shapes"),
    (jnp.zeros((2, 16, 16, 3)), jnp.zeros((2, 16, 16, 3), jnp.uint8), "convert uint8"),
  ],
)
def test_unusable_pairs_are_refused(metric, a, b, message):
  with pytest.raises(ValueError, match=message):
    metric(a, b)


def test_ssim_refuses_images_below_its_window():
  with pytest.raises(ValueError, match="10 x 16"):
    ssim(jnp.zeros((2, 10, 16, 3)), jnp.zeros((2, 10, 16, 3)))
