"""The Inception network of FID gives PyTorch's features by both protocols."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import cases
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import inception

SPEC, WEIGHTS, FID = cases.load("inception_fid")
with np.load(cases.FOLDER / "inception_adm.npz") as _arrays:
  ADM = dict(_arrays)
IMAGES = cases.nhwc((255 * procedural.uniform("images", (2, 3, 64, 64))).astype(np.uint8))


@pytest.fixture(scope="module")
def model():
  return inception.from_torch(WEIGHTS)


@pytest.fixture(scope="module")
def forward(model):
  return jax.jit(model.__call__)


def test_pytorch_fids_features(forward):
  given = inception.pytorch_fid_input(IMAGES)
  found = forward(given)
  corner = cases.nhwc(FID["resized_corner"])
  cases.assert_near((given[:, :8, :8] + 1) / 2, corner, 1e-6)
  cases.assert_near(found["pool3"], FID["pool3"], 1e-5)
  cases.assert_near(found["logits"], FID["logits"], 1e-5)
  cases.assert_near(found["block1"].mean((1, 2)), FID["block1_mean"], 1e-5)
  cases.assert_near(found["block2"].mean((1, 2)), FID["mixed6_mean"], 1e-5)


def test_adms_features(forward):
  given = inception.adm_input(IMAGES)
  found = forward(given)
  cases.assert_near(given[:, :8, :8], cases.nhwc(ADM["input_corner"]), 1e-6)
  cases.assert_near(found["pool3"], ADM["pool3"], 1e-5)
  cases.assert_near(found["spatial"], cases.nhwc(ADM["spatial"]), 1e-5)
  cases.assert_near(found["logits_unbiased"], ADM["logits_unbiased"], 1e-5)
  cases.assert_near(found["block2"].mean((1, 2)), ADM["mixed6e_mean"], 1e-5)


@pytest.mark.parametrize(("name", "size"), [("conv_1a", 13), ("conv_2b", 6), ("conv_3b", 5)])
def test_convolutions_on_tpus_lose_no_digit(monkeypatch, model, name, size):
  """Strided, padded and of one pixel."""
  layer = getattr(model, name)
  x = jnp.asarray(procedural.normal("x", (2, size, size, layer.conv.in_features)))
  found = []
  for place in ("cpu", "tpu"):
    monkeypatch.setattr(inception, "platform", lambda place=place: place)
    found.append(jax.jit(layer.__call__)(x))
  cases.assert_near(found[1], found[0], 1e-6)


@pytest.mark.parametrize(("size", "last"), [(299, 298.0), (600, 298 * 600 / 299), (64, 63.0)])
def test_tensorflows_resize_keeps_the_first_pixel_and_repeats_the_last(size, last):
  """Of a ramp, each pixel's value is the place where it was taken."""
  ramp = jnp.broadcast_to(jnp.arange(size, dtype=jnp.float32)[None, :, None, None], (1, size, 2, 3))
  column = inception._resize(ramp, lambda i, scale: i * scale)[0, :, 0, 0]
  assert column[0] == 0
  np.testing.assert_allclose(column[-1], last, rtol=1e-6)


@pytest.mark.parametrize(
  "images",
  [
    np.zeros((2, 64, 64, 3), np.float32),
    np.zeros((2, 3, 64, 64), np.uint8),
    np.zeros((64, 64, 3), np.uint8),
  ],
)
@pytest.mark.parametrize("protocol", inception.PROTOCOLS)
def test_other_pictures_are_refused(protocol, images):
  with pytest.raises(InputError, match=r"uint8 \[B,H,W,3\] is needed"):
    inception.PROTOCOLS[protocol](jnp.asarray(images))


def test_an_input_of_another_size_is_refused(model):
  with pytest.raises(InputError, match=r"\[B,299,299,3\] is needed"):
    model(jnp.zeros((1, 64, 64, 3)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"fc.weight": np.zeros((1000, 2048), np.float32)}, r"fc\.weight \(1000, 2048\) instead of"),
    ({"AuxLogits.fc.bias": np.zeros(1000, np.float32)}, "unknown: AuxLogits"),
    ({"Mixed_7c.branch_pool.bn.bias": None}, r"missing: Mixed_7c\.branch_pool\.bn\.bias"),
  ],
)
def test_other_weights_are_refused(change, message):
  """Among them those of torchvision's ImageNet classifier."""
  altered = {name: x for name, x in (WEIGHTS | change).items() if x is not None}
  with pytest.raises(InputError, match=message):
    inception.from_torch(altered)
