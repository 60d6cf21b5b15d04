"""The tokenizer's losses against plain NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from tests import cases
from tests.reference import procedural
from vavae_jax import losses, update
from vavae_jax.autoencoder import Posterior

RNG = np.random.default_rng(0)
LATENTS = RNG.normal(size=(3, 2, 3, 5)).astype(np.float32)
FEATURES = RNG.normal(size=(3, 2, 3, 5)).astype(np.float32)


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_marginal_cosine(margin):
  cosine = (unit(LATENTS) * unit(FEATURES)).sum(-1)
  expected = np.maximum(1 - margin - cosine, 0).mean()
  np.testing.assert_allclose(losses.marginal_cosine(LATENTS, FEATURES, margin), expected, rtol=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_marginal_distance_matrix(margin):
  total = []
  for z, f in zip(LATENTS.reshape(3, 6, 5), FEATURES.reshape(3, 6, 5), strict=True):
    for i in range(6):
      for j in range(6):
        difference = abs(unit(z)[i] @ unit(z)[j] - unit(f)[i] @ unit(f)[j])
        total.append(max(difference - margin, 0))
  found = losses.marginal_distance_matrix(LATENTS, FEATURES, margin)
  np.testing.assert_allclose(found, np.mean(total), rtol=1e-5)


@pytest.mark.parametrize("loss", [losses.marginal_cosine, losses.marginal_distance_matrix])
def test_alignment_has_a_finite_gradient_at_zero(loss):
  assert np.all(np.isfinite(jax.grad(loss)(jnp.zeros_like(LATENTS), FEATURES)))


@pytest.mark.parametrize(
  "loss",
  [
    losses.cosine,
    losses.marginal_cosine,
    losses.marginal_distance_matrix,
    lambda a, b: losses.feature_distance([a], [b]),
    lambda a, b: losses.discriminator(a, b, "hinge"),
  ],
)
def test_arrays_that_would_broadcast_are_refused(loss):
  with pytest.raises(AssertionError, match=r"\(1, 2, 3"):
    loss(LATENTS, FEATURES[:1])


def test_adversarial_losses():
  real, fake = jnp.array([2.0, 0.0]), jnp.array([-2.0, 1.0])
  assert losses.discriminator(real, fake, "hinge") == pytest.approx(0.5 * (0.5 + 1.0))
  vanilla = 0.5 * (np.log1p(np.exp([-2.0, 0.0])).mean() + np.log1p(np.exp([-2.0, 1.0])).mean())
  assert losses.discriminator(real, fake, "vanilla") == pytest.approx(vanilla)
  assert losses.generator(fake) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", losses.ADVERSARIAL)
def test_the_reference_case_of_the_discriminators_loss(kind):
  _, _, expected = cases.load("patchgan")
  real, fake = (procedural.normal(name, (4, 1, 6, 6)) for name in ("logits_real", "logits_fake"))
  assert losses.discriminator(real, fake, kind) == pytest.approx(float(expected[kind]), rel=1e-6)


def test_adaptive_weight_is_a_ratio_with_a_limit():
  three, four = jnp.array([[0.0, 3.0]]), jnp.array([4.0, 0.0])
  assert losses.adaptive_weight(three, four, 1e4) == pytest.approx(3 / 4.0001)
  assert losses.adaptive_weight(three, jnp.zeros(2), 1e4) == 1e4
  assert jax.grad(lambda x: losses.adaptive_weight(x, four, 1e4))(three).sum() == 0


def test_feature_distance_ignores_scale_and_sees_direction():
  a, b = [LATENTS], [2 * LATENTS]
  np.testing.assert_allclose(losses.feature_distance(a, b), np.zeros(3), atol=1e-6)
  np.testing.assert_allclose(losses.feature_distance(a, [-LATENTS]), np.full(3, 4.0), rtol=1e-5)


def test_the_kl_is_logged_where_its_weight_is_zero():
  config = FrozenConfigDict({"loss": {"kl_weight": 0.0}})
  ones = jnp.ones((2, 1, 1, 3))
  total, metrics = update._total("latent", config, Posterior(ones, 0 * ones), False)
  assert total == 0
  assert metrics["kl"] == pytest.approx(1.5)  # three channels of mean 1 and variance 1
