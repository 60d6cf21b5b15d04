"""The path from noise to data and the loss along it, as pure functions.

t=0 is noise and t=1 is data everywhere (the opposite of score-based papers), and t is not scaled by
1000. Paper section 5 and table 1; reference `transport/`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sample_time(key: jax.Array, batch_size: int, *, use_lognorm: bool = True) -> jax.Array:
  """Training times.

  Args:
    key: of the draw.
    batch_size: how many.
    use_lognorm: logit-normal(0, 1), which favours the middle of the path; False: uniform.

  Returns:
    t_B float32 in [0, 1], t=0 noise and t=1 data.
  """
  if use_lognorm:
    return jax.nn.sigmoid(jax.random.normal(key, (batch_size,)))
  return jax.random.uniform(key, (batch_size,))


def interpolate(latent_BhwZ: jax.Array, noise_BhwZ: jax.Array, t_B: jax.Array) -> jax.Array:
  """The linear path x_t = t latent + (1 - t) noise.

  Args:
    latent_BhwZ: normalised latents, the point at t=1.
    noise_BhwZ: standard normal, the point at t=0.
    t_B: in [0, 1].

  Returns:
    float32 [B, h, w, Z].
  """
  t_B111 = t_B[:, None, None, None]
  return t_B111 * latent_BhwZ + (1 - t_B111) * noise_BhwZ


def velocity(latent_BhwZ: jax.Array, noise_BhwZ: jax.Array) -> jax.Array:
  """What the model is to predict on the linear path: dx/dt = latent - noise, at every t."""
  return latent_BhwZ - noise_BhwZ


def velocity_losses(predicted_BhwZ: jax.Array, target_BhwZ: jax.Array) -> dict[str, jax.Array]:
  """Mean squared error and direction loss of a predicted velocity.

  Args:
    predicted_BhwZ: the model's.
    target_BhwZ: from `velocity`.

  Returns:
    {"mse": mean of squares, "cosine": mean over positions of 1 - cosine over channels}, scalars.
  """
  predicted, target = predicted_BhwZ.astype(jnp.float32), target_BhwZ.astype(jnp.float32)
  # Each norm is clamped as PyTorch does: a zero-initialised head would give NaN gradients.
  norms = jnp.sqrt(
    jnp.maximum(jnp.sum(predicted**2, -1), 1e-16) * jnp.maximum(jnp.sum(target**2, -1), 1e-16)
  )
  cosine_Bhw = jnp.sum(predicted * target, -1) / norms
  return {"mse": jnp.mean((predicted - target) ** 2), "cosine": jnp.mean(1 - cosine_Bhw)}
