"""Guidance against the reference case `dit_default`; noise by index; refused settings."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningdit_jax import likelihood, sampling, solvers, transport
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


@pytest.mark.parametrize("bad", [{"method": "dopri9"}, {"num_steps": 1}, {"timestep_shift": -0.1}])
def test_bad_settings_are_refused(bad):
  with pytest.raises(ValueError, match=next(iter(bad))):
    sampling.sample_ode(lambda x, t: x, jnp.zeros((1, 1, 1, 1)), **bad)


def flow(x, t):
  """A velocity that mixes channels and depends on t, scalar or [B]."""
  t = jnp.reshape(jnp.asarray(t, jnp.float32), (-1, 1, 1, 1))
  return jnp.sin(x + jnp.roll(x, 1, axis=-1)) * (1 - t) + 0.5 * t


def points(count, seed=0):
  return jax.random.normal(jax.random.key(seed), (count, 2, 3, 4))


@pytest.mark.parametrize("method", sorted({*solvers.METHODS} - {solvers.MAP}))
def test_reverse_undoes_forward(method):
  solve = jax.jit(
    functools.partial(sampling.sample_ode, flow, num_steps=60, method=method, rtol=1e-6),
    static_argnames="reverse",
  )
  there = solve(points(3))
  assert jnp.abs(there - points(3)).max() > 0.3
  # Euler's error is of the step's size, 1/59 of the way at its widest.
  np.testing.assert_allclose(solve(there, reverse=True), points(3), atol=0.1)


def test_methods_of_higher_order_come_nearer():
  exact = sampling.sample_ode(flow, points(2), num_steps=400, method="rk4", timestep_shift=0.0)
  errors = [
    float(
      jnp.abs(
        sampling.sample_ode(flow, points(2), num_steps=9, method=method, timestep_shift=0.0) - exact
      ).max()
    )
    for method in ("euler", "heun", "rk4")
  ]
  assert errors[0] > 10 * errors[1] > 100 * errors[2]


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_a_sample_is_the_same_in_any_batch(method):
  solve = jax.jit(functools.partial(sampling.sample_ode, flow, method=method))
  # One of them is much harder to solve than the others.
  noise = points(4).at[2].multiply(30)
  together = solve(noise)
  for i in range(4):
    np.testing.assert_allclose(solve(noise[i : i + 1])[0], together[i], rtol=1e-6, atol=1e-6)


def test_likelihood_of_a_gaussian():
  """The flow x' = a x takes a standard normal to one of standard deviation e^a."""
  a, x = 0.7, points(3)
  probe = jnp.sign(points(3, seed=1))
  for method in ("dopri5", "rk4"):
    value, noise = jax.jit(
      functools.partial(likelihood.log_likelihood, lambda x, t: a * x, method=method, num_steps=20)
    )(x, probe)
    np.testing.assert_allclose(noise, x * np.exp(-a), rtol=1e-4, atol=1e-5)
    size = x[0].size
    expected = -0.5 * (jnp.sum(noise**2, (1, 2, 3)) + size * np.log(2 * np.pi)) - size * a
    np.testing.assert_allclose(value, expected, rtol=1e-4)


def test_likelihood_of_a_flow_by_its_own_jacobian():
  """The estimate's mean over probes, against the determinant of the whole map."""
  noise = points(1)[:, :1, :1]

  def end(x):
    return sampling.sample_ode(
      flow, x.reshape(noise.shape), method="rk4", num_steps=40, timestep_shift=0.0
    ).ravel()

  _, log_volume = np.linalg.slogdet(jax.jacobian(end)(noise.ravel()))
  prior = -0.5 * (jnp.sum(noise**2) + noise.size * np.log(2 * np.pi))
  probes = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=4))).reshape(-1, 1, 1, 1, 4)
  estimates = jax.vmap(
    lambda probe: likelihood.log_likelihood(
      flow, end(noise).reshape(noise.shape), probe, method="rk4", num_steps=40
    )[0]
  )(probes)
  assert np.ptp(estimates) > 0.01
  assert np.mean(estimates) == pytest.approx(float(prior - log_volume), abs=2e-3)


@pytest.mark.parametrize(
  ("form", "path", "method", "last_step"),
  [
    # Heun's method without a last step asks for the drift at both ends.
    *itertools.product(transport.DIFFUSION_FORMS, transport.PATHS, ["heun"], [""]),
    *itertools.product(["SBDM"], ["Linear"], ["euler"], solvers.SETTINGS["last_step"].within),
  ],
)
def test_every_sde_is_finite_from_end_to_end(form, path, method, last_step):
  """The reference gives NaN from t=0 with SBDM, and fails with constant diffusion."""
  end = jax.jit(
    functools.partial(
      solvers.sample_sde,
      flow,
      draw=lambda step: 0.1 * points(2, seed=3) * (step + 1),
      path=path,
      num_steps=4,
      method=method,
      diffusion_form=form,
      last_step=last_step,
    )
  )(points(2))
  assert np.isfinite(end).all()


def test_an_sde_keeps_the_distribution_that_the_flow_has():
  """Data N(0, 4): velocity and score are known, and every sampler must end at deviation 2."""

  def velocity(x, t):
    t = jnp.asarray(t)
    return x * (4 * t - (1 - t)) / (4 * t**2 + (1 - t) ** 2)

  noise = jax.random.normal(jax.random.key(0), (1, 200, 100, 1))
  kick = functools.partial(jax.random.fold_in, jax.random.key(1))
  for form in ("sigma", "constant", "SBDM"):
    end = jax.jit(
      functools.partial(
        solvers.sample_sde,
        velocity,
        draw=lambda step: jax.random.normal(kick(step), noise.shape),
        num_steps=200,
        diffusion_form=form,
        last_step_size=0.01,
      )
    )(noise)
    assert float(jnp.std(end)) == pytest.approx(2, rel=0.03), form


def guided_from(start):
  """The reference's small model, guided from a time on, and points of its latents."""
  spec, weights, _ = cases.load("dit_default")
  model, x = from_torch(weights, **spec["config"]), procedural.normal("x", (3, 32, 8, 8))
  settings = {"cfg_scale": 5.0, "cfg_interval_start": start}
  predict = sampling.guided(model, jnp.arange(3), spec["config"]["num_classes"], **settings)
  return predict, jnp.asarray(cases.nhwc(x))


@pytest.mark.parametrize("t", [0.05, 0.3, 0.9])
def test_leaving_out_the_unconditional_half_changes_nothing(t):
  """At times [B] both halves are computed and one is dropped; at a scalar time only one is."""
  predict, x = guided_from(0.3)
  short, full = jax.jit(predict)(x, jnp.float32(t)), jax.jit(predict)(x, jnp.full(len(x), t))
  cases.assert_near(short, full, 1e-5)


@pytest.mark.parametrize("method", ["euler", "heun", "dopri5"])
def test_leaving_it_out_changes_no_trajectory(method):
  """The interval's border lies between grid points and, for Heun's stages, within a step."""
  predict, noise = guided_from(0.3)

  def end(velocity):
    return jax.jit(lambda x: sampling.sample_ode(velocity, x, num_steps=6, method=method))(noise)

  full = end(lambda x, t: predict(x, jnp.broadcast_to(t, x.shape[:1])))
  cases.assert_near(end(predict), full, 1e-5)


def test_the_unconditional_half_is_not_run_where_guidance_is_off():
  ran = []

  def model(x, t, label):
    jax.debug.callback(lambda count: ran.append(int(count)), len(label))
    return x

  predict = sampling.guided(model, jnp.array([0, 1]), 9, cfg_scale=4.0, cfg_interval_start=0.5)
  jax.block_until_ready(
    sampling.sample_ode(predict, jnp.zeros((2, 1, 1, 3)), num_steps=5, timestep_shift=0.0)
  )
  jax.effects_barrier()
  assert sorted(ran) == [2, 2, 4, 4]  # t = 0, 0.25 | 0.5, 0.75


def test_autoguidance_leads_away_from_the_second_model():
  def model(x, t, label):
    return jnp.full_like(x, 3.0)

  def guide(x, t, label):
    return jnp.ones_like(x) * label[:, None, None, None]

  predict = sampling.guided(model, jnp.array([1, 2]), 9, cfg_scale=2.0, cfg_channels=0, guide=guide)
  value = predict(jnp.zeros((2, 1, 1, 3)), jnp.float32(0.5))
  np.testing.assert_allclose(value[:, 0, 0, 0], [5.0, 4.0])


@pytest.mark.parametrize(
  "bad", [{"method": "rk4"}, {"diffusion_form": "cubic"}, {"last_step": "First"}]
)
def test_unknown_settings_of_the_sde_are_refused(bad):
  with pytest.raises(ValueError, match=f"{next(iter(bad))}.*choose one of"):
    solvers.sample_sde(flow, points(1), lambda step: points(1), **bad)
