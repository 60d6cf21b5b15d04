"""The linear path and its losses against the reference case `transport`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningdit_jax import sampling, transport
from tests import cases
from tests.reference import procedural

SHAPE = (3, 4, 2, 2)
TIMES = jnp.array([0.1, 0.5, 0.9])


@pytest.fixture(scope="module")
def expected():
  with np.load(cases.FOLDER / "transport.npz") as arrays:
    return dict(arrays)


def normal(name):
  return jnp.asarray(cases.nhwc(procedural.normal(name, SHAPE)))


def network(x, t):
  """The case's network, t a scalar or [B]."""
  return 0.5 * x + 0.3 * jnp.sin(3 * jnp.reshape(t, (-1, 1, 1, 1)))


def test_path_and_velocity(expected):
  x_t = transport.interpolate(normal("x1"), normal("x0"), TIMES)
  cases.assert_near(x_t, cases.nhwc(expected["Linear/xt"]), 1e-5)
  target = transport.velocity(normal("x1"), normal("x0"))
  cases.assert_near(target, cases.nhwc(expected["Linear/ut"]), 1e-5)


def test_losses(expected):
  data, noise = normal("x1"), normal("x0")
  x_t = transport.interpolate(data, noise, TIMES)
  predicted, target = network(x_t, TIMES), transport.velocity(data, noise)
  each = [transport.velocity_losses(predicted[i : i + 1], target[i : i + 1]) for i in range(3)]
  mse, cosine = ([part[name] for part in each] for name in ("mse", "cosine"))
  cases.assert_near(mse, expected["Linear/velocity/None/loss"], 1e-5)
  cases.assert_near(cosine, expected["Linear/velocity/None/cos_loss"], 1e-5)


def test_a_zero_prediction_has_a_finite_gradient():
  def loss(predicted):
    return sum(transport.velocity_losses(predicted, jnp.ones_like(predicted)).values())

  assert np.all(np.isfinite(jax.grad(loss)(jnp.zeros((2, 3, 1, 4)))))


def test_times_are_logit_normal_or_uniform():
  logit = transport.sample_time(jax.random.key(0), 4000, use_lognorm=True)
  uniform = transport.sample_time(jax.random.key(0), 4000, use_lognorm=False)
  # Quartiles: sigmoid of those of the standard normal, and those of the uniform.
  quarters = [0.25, 0.5, 0.75]
  np.testing.assert_allclose(np.quantile(logit, quarters), [0.3375, 0.5, 0.6625], atol=0.02)
  np.testing.assert_allclose(np.quantile(uniform, quarters), quarters, atol=0.03)


@pytest.mark.parametrize(("points", "shift"), [(250, 0.3), (250, 0.0), (50, 0.3), (11, 0.3)])
def test_time_grid(expected, points, shift):
  cases.assert_near(
    sampling.time_grid(points, shift), expected[f"grid/n{points}_shift{shift}"], 1e-5
  )


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_euler(expected, shift):
  end = sampling.sample_ode(
    network, normal("z"), num_steps=11, method="euler", timestep_shift=shift
  )
  cases.assert_near(end, cases.nhwc(expected[f"ode/Linear/velocity/euler/shift{shift}"]), 1e-5)
