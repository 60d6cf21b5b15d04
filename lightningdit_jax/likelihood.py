"""The density of latents under the flow."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp

from lightningdit_jax.sampling import Velocity, sample_ode


def log_likelihood(
  velocity: Velocity, latent: jax.Array, probe: jax.Array, **settings: Any
) -> tuple[jax.Array, jax.Array]:
  """Log-density of latents under the flow, by Hutchinson's estimate of the divergence.

  Args:
    velocity: see `sample_ode`; without guidance, of a model with `attention="xla"`, since kernels
      have no forward derivative.
    latent: [B, ...], at t=1, normalised as the model sees them. For the density of stored latents
      add the sum of log(multiplier / std) over all their numbers.
    probe: +1 or -1, the shape of `latent`; the estimate is exact in the mean over probes.
    **settings: of `sample_ode`; by default "dopri5" without shift.

  Returns (natural logarithm of the density [B], the noise that the latents come from).
  Source: Chen et al., Neural ordinary differential equations; Grathwohl et al., FFJORD.
  """
  chex.assert_equal_shape([latent, probe])

  def field(state: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[jax.Array, jax.Array]:
    speed, along = jax.jvp(lambda x: velocity(x, t).astype(jnp.float32), state[:1], (probe,))
    return speed, _sample_sum(along * probe)

  settings = {"method": "dopri5", "timestep_shift": 0.0, **settings}
  noise, change = sample_ode(field, (latent, jnp.zeros(len(latent))), reverse=True, **settings)
  size = noise[0].size
  prior = -0.5 * (_sample_sum(noise**2) + size * jnp.log(2 * jnp.pi))
  # Down from t=1 to t=0 the divergence was summed with the sign that the density needs.
  return prior + change, noise


def _sample_sum(x: jax.Array) -> jax.Array:
  return jnp.sum(x, axis=range(1, x.ndim))
