"""Paths, losses and times against the reference case `transport`; its solvers: test_solvers.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningdit_jax import sampling, solvers, transport
from tests import cases
from tests.reference import procedural

SHAPE = (3, 4, 2, 2)
TIMES = jnp.array([0.1, 0.5, 0.9])
with np.load(cases.FOLDER / "transport.npz") as arrays:
  EXPECTED = dict(arrays)


def keys(prefix: str) -> list[str]:
  return [key for key in EXPECTED if key.startswith(prefix)]


def normal(name):
  return jnp.asarray(cases.nhwc(procedural.normal(name, SHAPE)))


def velocity_of(data, noise, t, path):
  c = transport.coefficients(path, t, data)
  return transport.PREDICTIONS["velocity"].compared(c, None, data, noise)[1]


def network(x, t):
  """The case's network, t a scalar or [B]."""
  return 0.5 * x + 0.3 * jnp.sin(3 * jnp.reshape(t, (-1, 1, 1, 1)))


@pytest.mark.parametrize("path", transport.PATHS)
def test_path(path):
  data, noise, x = normal("x1"), normal("x0"), cases.nhwc(EXPECTED[f"{path}/xt"])
  cases.assert_near(transport.interpolate(data, noise, TIMES, path), x, 1e-5)
  velocity = velocity_of(data, noise, TIMES, path)
  cases.assert_near(velocity, cases.nhwc(EXPECTED[f"{path}/ut"]), 1e-5)
  c = transport.coefficients(path, TIMES, x)
  cases.assert_near(-c.rate * x, cases.nhwc(EXPECTED[f"{path}/drift_mean"]), 1e-5)
  spread = jnp.broadcast_to(c.spread, x.shape)
  cases.assert_near(spread, cases.nhwc(EXPECTED[f"{path}/drift_var"]), 1e-5)


@pytest.mark.parametrize("path", transport.PATHS)
def test_predictions_of_one_kind_imply_the_others(path):
  """The noise that made x_t, its velocity and its score are the same statement."""
  data, noise = normal("x1"), normal("x0")
  x = transport.interpolate(data, noise, TIMES, path)
  sigma = transport.coefficients(path, TIMES, x).sigma
  given = {
    "velocity": velocity_of(data, noise, TIMES, path),
    "noise": noise,
    "score": -noise / sigma,
  }
  for prediction, value in given.items():
    for to, expected in ((transport.to_velocity, "velocity"), (transport.to_noise, "noise")):
      cases.assert_near(to(value, x, TIMES, path, prediction), given[expected], 1e-5)


@pytest.mark.parametrize("path", transport.PATHS)
def test_score_from_velocity(path):
  x, velocity = (jnp.asarray(cases.nhwc(EXPECTED[f"{path}/{name}"])) for name in ("xt", "ut"))
  noise = transport.to_noise(velocity, x, TIMES, path, "velocity")
  score = -noise / transport.coefficients(path, TIMES, x).sigma
  cases.assert_near(score, cases.nhwc(EXPECTED[f"{path}/score_from_velocity"]), 1e-5)


@pytest.mark.parametrize("key", [k for path in transport.PATHS for k in keys(f"{path}/diffusion/")])
def test_diffusion(key):
  path, _, form = key.split("/")
  value = transport.diffusion(form, 1.3, TIMES, jnp.zeros((3, 2, 2, 4)), path)
  actual = jnp.broadcast_to(value, (3, 2, 2, 4))
  cases.assert_near(actual, cases.nhwc(EXPECTED[key]), 1e-5)


@pytest.mark.parametrize("key", [k for k in EXPECTED if k.endswith("/loss")])
def test_losses(key):
  path, prediction, weight, _ = key.split("/")
  data, noise = normal("x1"), normal("x0")
  x = transport.interpolate(data, noise, TIMES, path)
  losses = transport.losses(
    network(x, TIMES),
    data,
    noise,
    TIMES,
    path=path,
    prediction=prediction,
    loss_weight=weight.replace("None", ""),
  )
  cases.assert_near(losses["mse"], EXPECTED[key], 1e-5)
  cosine = f"{path}/{prediction}/{weight}/cos_loss"
  assert ("cosine" in losses) == (cosine in EXPECTED)
  if cosine in EXPECTED:
    cases.assert_near(losses["cosine"], EXPECTED[cosine], 1e-5)


@pytest.mark.parametrize("key", [k for k in EXPECTED if k.endswith("/None/interval")])
def test_intervals(key):
  """Of training, of the ODE, and of the SDE with a last step of 0.04."""
  path, prediction, *_ = key.split("/")
  sde = solvers.sde_interval(
    path,
    prediction,
    method="euler",
    diffusion_form="sigma",
    last_step="Mean",
    last_step_size=0.04,
  )
  ends = [transport.interval(path, prediction, training=training) for training in (True, False)]
  np.testing.assert_allclose([*ends[0], *ends[1], *sde], EXPECTED[key], atol=1e-7)


@pytest.mark.parametrize("wrong", ["predicted", "latent", "noise", "t"])
def test_shapes_that_would_broadcast_are_refused(wrong):
  """One row, against the three of the others."""
  given = {"predicted": normal("x1"), "latent": normal("x1"), "noise": normal("x0"), "t": TIMES}
  given[wrong] = given[wrong][:1]
  with pytest.raises(AssertionError, match="shape"):
    transport.losses(*given.values())
  with pytest.raises(AssertionError, match="shape"):
    transport.interpolate(normal("x1"), normal("x0"), TIMES[:1])


def test_a_zero_prediction_has_a_finite_gradient():
  def loss(predicted):
    one = jnp.ones_like(predicted)
    return sum(part.sum() for part in transport.losses(predicted, one, -one, jnp.ones(2)).values())

  assert np.all(np.isfinite(jax.grad(loss)(jnp.zeros((2, 3, 1, 4)))))


QUARTERS = np.array([0.25, 0.5, 0.75])
# Of the standard normal.
NORMAL_QUARTERS = np.array([-0.6745, 0.0, 0.6745])


@pytest.mark.parametrize(
  ("settings", "expected"),
  [
    ({}, 1 / (1 + np.exp(-NORMAL_QUARTERS))),
    ({"shifted_mu": -0.8}, 1 / (1 + np.exp(0.8 - NORMAL_QUARTERS))),
    (
      {"shifted_mu": -0.5, "lognorm_sigma": 1.25},
      1 / (1 + np.exp(0.5 - 1.25 * NORMAL_QUARTERS)),
    ),
    ({"use_lognorm": False}, QUARTERS),
    ({"use_lognorm": False, "interval": (0.4, 0.6)}, 0.4 + 0.2 * QUARTERS),
    ({"use_lognorm": False, "partial_train": (0.5, 0.9)}, 0.5 + 0.4 * QUARTERS),
    # Between the median and the upper end of the logit-normal, by thirds of what is left.
    ({"partial_train": (0.5, 1.0)}, [0.579, 0.6625, 0.7596]),
    ({"partial_train": (0.5, 1.0), "lognorm_sigma": 2.0}, [0.6543, 0.794, 0.9089]),
  ],
)
def test_quartiles_of_times(settings, expected):
  t = transport.sample_time(jax.random.key(0), 8000, **settings)
  np.testing.assert_allclose(np.quantile(t, QUARTERS), expected, atol=0.015)
  low, high = settings.get("partial_train", settings.get("interval", (0, 1)))
  assert low <= t.min()
  assert t.max() <= high


def test_a_share_of_the_times_is_confined():
  t = transport.sample_time(
    jax.random.key(0), 8000, use_lognorm=False, partial_train=(0.0, 0.2), partial_ratio=0.25
  )
  # A quarter of them all, and a fifth of the others.
  assert np.mean(t <= 0.2) == pytest.approx(0.25 + 0.75 * 0.2, abs=0.02)


@pytest.mark.parametrize(("points", "shift"), [(250, 0.3), (250, 0.0), (50, 0.3), (11, 0.3)])
def test_time_grid(points, shift):
  grid = sampling.time_grid(points, shift)
  cases.assert_near(grid, EXPECTED[f"grid/n{points}_shift{shift}"], 1e-5)
