"""Guidance against the reference case `dit_default`; noise by index; refused settings."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningdit_jax import sampling
from lightningdit_jax.convert import from_torch
from tests import cases
from tests.reference import procedural


@pytest.mark.parametrize(
  ("key", "t", "start"),
  [
    ("cfg_interval_early", 0.05, 0.125),
    ("cfg_interval_late", 0.6, 0.125),
    ("cfg_plain", 0.05, 0.0),
  ],
)
@pytest.mark.parametrize("name", ["dit_default", "dit_variant", "dit_qknorm_rms"])
def test_guidance_of_the_reference(name, key, t, start):
  spec, weights, expected = cases.load(name)
  config, y = spec["config"], spec["inputs"]["y"]
  model = from_torch(weights, **config)
  x = jnp.asarray(cases.nhwc(procedural.normal("x", expected["forward"].shape)[:2]))
  velocity = sampling.guided(
    model, jnp.array(y[:2]), config["num_classes"], cfg_scale=6.7, cfg_interval_start=start
  )
  cases.assert_near(jax.jit(velocity)(x, jnp.float32(t)), cases.nhwc(expected[key])[:2], 1e-5)


def doubling(x, t, label):
  """A model whose velocity is its label, so that guidance is arithmetic."""
  del t
  return jnp.broadcast_to(label[:, None, None, None].astype(jnp.float32), x.shape)


def test_guidance_acts_on_the_first_channels_or_on_all():
  x, label = jnp.zeros((2, 1, 3, 5)), jnp.array([3, 4])
  for channels, expected in ((2, [21.0, 21.0, 3.0, 3.0, 3.0]), (0, [21.0] * 5)):
    velocity = sampling.guided(doubling, label, 1, cfg_scale=10.0, cfg_channels=channels)
    np.testing.assert_allclose(velocity(x, jnp.float32(0.5))[0, 0, 0], expected)


def test_without_guidance_the_null_label_is_never_asked():
  asked = []

  def model(x, t, label):
    asked.append(len(label))
    return x

  x, label = jnp.zeros((2, 1, 1, 3)), jnp.array([0, 1])
  for scale, start in ((1.0, 0.0), (5.0, 1.0)):
    sampling.guided(model, label, 9, cfg_scale=scale, cfg_interval_start=start)(x, jnp.float32(0.5))
  assert asked == [2, 2]


def test_noise_is_a_function_of_seed_and_index():
  shape = (2, 3, 4)
  together = sampling.noise_of(5, jnp.arange(6), shape)
  np.testing.assert_array_equal(
    sampling.noise_of(5, jnp.array([4, 1]), shape), together[jnp.array([4, 1])]
  )
  assert not np.array_equal(sampling.noise_of(6, jnp.arange(6), shape), together)


@pytest.mark.parametrize("bad", [{"method": "dopri9"}, {"num_steps": 1}])
def test_bad_settings_are_refused(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    sampling.sample_ode(lambda x, t: x, jnp.zeros((1, 1, 1, 1)), **bad)
