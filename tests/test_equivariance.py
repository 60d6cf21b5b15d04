"""Latents that turn and shrink with their pictures: the authors' own numbers, and when."""

from __future__ import annotations

import collections
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from configs import base
from tests import cases
from tests.reference import procedural
from vavae_jax import equivariance, stages, update
from vavae_jax.common.errors import InputError
from vavae_jax.convert import autoencoder_from_torch, autoencoder_to_torch
from vavae_jax.data import images
from vavae_jax.equivariance import Size

SPEC, WEIGHTS, EXPECTED = cases.load("eqvae")


def configuration(**changes) -> FrozenConfigDict:
  """L1 and KL alone."""
  config = base.tokenizer()
  config.model.update(SPEC["config"])
  config.update_from_flattened_dict(
    {"teacher.name": "", "loss.perceptual_weight": 0.0, "loss.disc_weight": 0.0, **changes}
  )
  return FrozenConfigDict(config)


def batch(name):
  """(pictures, their size, what changes latents and pictures, noise) of a batch of theirs."""
  scale, quarters = SPEC["batches"][name].values()
  size = Size(scale, before=scale < 1 and not quarters)
  keys = (jax.random.key(i) for i in range(50))
  key = next(
    key
    for key in keys
    if not quarters or jax.random.randint(jax.random.fold_in(key, 1), (), 0, 3) == quarters - 1
  )
  image = np.floor(256 * procedural.uniform("image", (2, 32, 32, 3))).astype(np.uint8)
  height, width, channels = equivariance.encoded(size, (16, 16, 4))
  noise = cases.nhwc(procedural.normal("noise", (2, channels, height, width)))
  return image, size, equivariance.change(size, key), noise


@pytest.mark.parametrize("name", SPEC["batches"])
def test_pictures_are_compared_as_the_authors_do(name):
  image, size, change, _ = batch(name)
  target = change(equivariance.before(size, images.to_float(jnp.asarray(image))))
  np.testing.assert_allclose(target, cases.nhwc(EXPECTED[f"{name}/target"]), atol=1e-6)


@pytest.mark.parametrize("name", ["c", "low"])
def test_a_step_is_the_authors(name, monkeypatch):
  """Losses, what is decoded by way of them, and gradients."""
  monkeypatch.setattr(update, "_update_autoencoder", lambda config, state, grads: grads)
  model = autoencoder_from_torch(WEIGHTS, **SPEC["config"])
  graph, params = nnx.split(model)
  image, size, change, noise = batch(name)
  phase = stages.Phase(0, False, size)

  @jax.jit
  def step(params, image):
    state = SimpleNamespace(params={"autoencoder": params})
    return update.update(configuration(), phase, state, {}, {"image": image}, noise, change)

  grads, metrics = step(nnx.to_pure_dict(params), image)
  for key in ("nll", "kl", "grad_norm"):
    assert metrics[key] == pytest.approx(float(EXPECTED[f"{name}/{key}"]), rel=1e-4), key
  ours = autoencoder_to_torch(nnx.merge(graph, grads["autoencoder"]))
  watched = [key for key in EXPECTED if key.startswith(f"{name}/grad/")]
  for key in watched:
    cases.assert_near(ours[key.removeprefix(f"{name}/grad/")], EXPECTED[key], 1e-4)
  assert len(watched) == 3


def test_the_shares_of_batches_are_those_asked_for():
  config = configuration(**{"equivariance.share": 0.5, "equivariance.low_share": 0.25})
  found = [equivariance.drawn(config, step) for step in range(1, 2001)]
  assert found[:50] == [equivariance.drawn(config, step) for step in range(1, 51)]
  counts = collections.Counter(found)
  assert set(counts) == {Size(), *(Size(s, low) for s in (0.25, 0.5, 0.75) for low in (0, 1))}
  # Four standard deviations of 2,000 draws.
  assert counts[Size()] / 2000 == pytest.approx(0.375, abs=0.044)
  assert counts[Size(0.5)] / 2000 == pytest.approx(0.5 / 3, abs=0.034)
  assert stages.phase_of(configuration(), 1) == stages.Phase(0, False)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"equivariance.scales": (0.5, 0.3)},
      r"\(0.5, 0.3\); give some that make whole cells of the 16",
    ),
    ({"equivariance.scales": ()}, r"scales are \(\); give some"),
    (
      {"loss.perceptual_weight": 1.0, "data.image_size": 32},
      "shrink pictures to 8 pixels a side, and LPIPS needs 16",
    ),
    ({"teacher.name": "mae_vitl16"}, "low_share is 0.25, but the features of mae_vitl16"),
  ],
)
def test_settings_that_cannot_work_are_refused(changes, message):
  shares = {"equivariance.share": 0.5, "equivariance.low_share": 0.25}
  with pytest.raises(InputError, match=message):
    equivariance.check(configuration(**shares, **changes), 16)
