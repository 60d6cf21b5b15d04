"""Every solver of the ODE and the SDE against the reference case `transport`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from lightningdit_jax import sampling, solvers, transport
from tests import cases
from tests.test_transport import EXPECTED, keys, network, normal


def as_velocity(path, prediction):
  def velocity(x, t):
    return transport.to_velocity(network(x, t), x, t, path, prediction)

  return velocity


@pytest.mark.parametrize("key", keys("ode/"))
def test_ode(key):
  _, path, prediction, method, shift = key.split("/")
  end = jax.jit(
    functools.partial(
      sampling.sample_ode,
      as_velocity(path, prediction),
      num_steps=11 if method == "euler" else 6,
      method=method,
      timestep_shift=float(shift.removeprefix("shift")),
      interval=transport.interval(path, prediction),
    )
  )(normal("z"))
  # Near t=1 the reference's sigma on the VP path is a difference of nearly equal numbers.
  tolerance = 3e-5 if (path, prediction) == ("VP", "noise") else 1e-5
  # Both adaptive solvers are right within rtol 1e-3.
  tolerance = 1e-3 if method == "dopri5" else tolerance
  cases.assert_near(end, cases.nhwc(EXPECTED[key]), tolerance)


@pytest.mark.parametrize("key", keys("sde/"))
def test_sde(key):
  _, path, method, form, last_step = key.split("/")
  kicks = jnp.stack([normal(f"w_{i}") for i in range(7)])
  end = jax.jit(
    functools.partial(
      solvers.sample_sde,
      network,
      draw=lambda step: kicks[step],
      path=path,
      num_steps=8,
      method=method.lower(),
      diffusion_form=form,
      last_step=last_step.replace("None", ""),
    )
  )(normal("z"))
  cases.assert_near(end, cases.nhwc(EXPECTED[key]), 1e-5)
