"""LPIPS against the reference case, and what its files may look like."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests import cases
from tests.reference import procedural
from vavae_jax.perceptual import Lpips, load_lpips, lpips_from_torch

# A picture and its opposite in one batch, of odd sizes; h != w.
HALF = np.tanh(procedural.normal("image", (1, 18, 33, 3)))
IMAGE = np.concatenate([HALF, -HALF])


@pytest.fixture(scope="module")
def reference():
  return cases.load("lpips")


@pytest.fixture(scope="module")
def model(reference) -> Lpips:
  return lpips_from_torch(reference[1])


def by_torchvision(weights: dict) -> tuple[dict, dict]:
  """The case's weights as two files, VGG16 with its classifier and the heads."""
  vgg = {".".join(["features", *k.split(".")[2:]]): v for k, v in weights.items() if "net." in k}
  heads = {k: v for k, v in weights.items() if k.startswith("lin")}
  unused = ("classifier.0.weight", "pre_logits.fc1.weight", "head.fc.bias")  # two of timm's
  return vgg | dict.fromkeys(unused, np.zeros((2, 3), np.float32)), heads


def kernels(model: Lpips) -> list[np.ndarray]:
  convs = [conv for part in model.slices for conv in part.convs]
  return [np.asarray(layer.kernel[...]) for layer in [*convs, *model.heads]]


def test_distance_and_gradient_match_reference(reference, model):
  a, b = (
    jnp.asarray(np.tanh(cases.nhwc(procedural.normal(name, (2, 3, 64, 64)))))
    for name in ("lp_a", "lp_b")
  )

  @jax.jit
  def run(a, b):
    # As a training step does: one of the two without gradient.
    features_b = model.features(b)

    def total(a):
      distance_B = model.distance(model.features(a), features_b)
      return distance_B.sum(), distance_B

    return jax.grad(total, has_aux=True)(a)

  gradient, distance = run(a, b)
  _, _, expected = reference
  cases.assert_near(distance, expected["distance"].ravel(), 1e-5)
  cases.assert_near(gradient, cases.nhwc(expected["grad_a"]), 1e-4)


def test_feature_maps_are_those_of_their_own_image(model):
  maps = jax.jit(Lpips.features)(model, IMAGE)
  sizes = [(18, 33, 64), (9, 16, 128), (4, 8, 256), (2, 4, 512), (1, 2, 512)]
  assert [x.shape for x in maps] == [(2, *size) for size in sizes]
  assert all(x.min() == 0 for x in maps)
  alone = jax.jit(Lpips.features)(model, IMAGE[1:])
  for x, one in zip(maps, alone, strict=True):
    cases.assert_near(x[1:], one, 1e-5)


def test_features_that_are_zero_have_a_finite_gradient(model):
  """Whole positions are, where no channel is active; and equal features have a gradient of zero."""
  widths = [head.kernel.shape[2] for head in model.heads]
  one, other = (
    [np.abs(procedural.normal(name, (2, 3, 5, width))) for width in widths] for name in "ab"
  )
  for features in one:
    features[:, 0] = 0
  gradient = jax.jit(jax.grad(lambda a, b: model.distance(a, b).sum()))
  for part in gradient(one, other):
    np.testing.assert_array_equal(part[:, 0], 0)
    assert jnp.isfinite(part).all()
    assert jnp.abs(part[:, 1:]).min(axis=(0, 1, 2)).max() > 0
  assert max(jnp.abs(part).max() for part in gradient(one, one)) < 1e-6
  np.testing.assert_array_equal(model.distance(one, one), 0)


def test_bfloat16_stays_near_float32(reference, model):
  rounded = lpips_from_torch(reference[1], dtype=jnp.bfloat16)
  image = IMAGE[:, :, :17]
  maps = jax.jit(Lpips.features)(rounded, image)
  assert {x.dtype for x in maps} == {jnp.dtype(jnp.bfloat16)}
  distance = rounded.distance(maps, [x[::-1] for x in maps])
  assert distance.dtype == jnp.float32
  cases.assert_near(distance, jax.jit(Lpips.__call__)(model, image, image[::-1]), 0.02)


@pytest.mark.parametrize("kind", ["torchvision and heads", "doubled names", "checkpoint"])
def test_other_names_give_the_same_weights(kind, reference, model):
  weights = reference[1]
  doubles = {k.replace("lin", "lins.", 1): v for k, v in weights.items() if k.startswith("lin")}
  assert "lins.0.model.1.weight" in doubles
  shift = np.float32([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1)
  state_dicts = {
    "torchvision and heads": by_torchvision(weights),
    "doubled names": [weights | doubles | {"scaling_layer.shift": shift}],
    "checkpoint": [
      {f"loss.perceptual_loss.{k}": v for k, v in weights.items()}
      | {"loss.logvar": np.zeros(()), "encoder.conv_in.weight": np.zeros((4, 3, 3, 3))}
    ],
  }[kind]
  again = lpips_from_torch(*state_dicts)
  for mine, theirs in zip(kernels(again), kernels(model), strict=True):
    np.testing.assert_array_equal(mine, theirs)


def test_weights_that_do_not_fit_are_listed(reference):
  weights = reference[1]
  vgg, heads = by_torchvision(weights)
  with pytest.raises(ValueError, match=r"missing: lin0\.model\.1\.weight, lin1"):
    lpips_from_torch(vgg)
  with pytest.raises(ValueError, match=r"unknown: features\.40\.weight"):
    lpips_from_torch(vgg | {"features.40.weight": np.zeros(3)}, heads)
  with pytest.raises(ValueError, match=r"lin0\.model\.1\.weight; give only one"):
    lpips_from_torch(weights, heads)
  with pytest.raises(ValueError, match=r"another value .*: scaling_layer\.scale"):
    lpips_from_torch(weights | {"scaling_layer.scale": np.ones((1, 3, 1, 1))})


def test_files_are_read_and_a_missing_one_says_where_it_is_from(reference, model, tmp_path):
  vgg, heads = by_torchvision(reference[1])
  save_file(vgg, tmp_path / "vgg.safetensors")
  save_file(heads, tmp_path / "heads.safetensors")
  save_file(reference[1], tmp_path / "both.safetensors")
  for paths in (("vgg.safetensors", "heads.safetensors"), ("both.safetensors",)):
    loaded = load_lpips(*(tmp_path / path for path in paths))
    for mine, theirs in zip(kernels(loaded), kernels(model), strict=True):
      np.testing.assert_array_equal(mine, theirs)
  for paths in ("",), (tmp_path / "no.pth",), (tmp_path / "vgg.safetensors",):
    with pytest.raises(ValueError, match=r"vgg16-397923af\.pth") as error:
      load_lpips(*paths)
    for told in ("config.perceptual.vgg", "config.perceptual.heads", "v0.1/vgg.pth"):
      assert told in str(error.value)


def test_images_that_do_not_fit_are_refused(model):
  for shape in ((2, 15, 20, 3), (2, 3, 32, 32), (32, 32, 3)):
    with pytest.raises(ValueError, match=r"\[B,H,W,3\] of at least 16 x 16 pixels"):
      model.features(jnp.zeros(shape))
