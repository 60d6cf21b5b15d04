"""From noise to latents: the shifted time grid, guidance, the Euler solver.

Times run from t=0, noise, to t=1, data. The sample of index i is a function of (seed, i) alone.
Reference: `inference.py` and `transport/integrators.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lightningdit_jax.model import LightningDiT

Velocity = Callable[[jax.Array, jax.Array], jax.Array]
METHODS = ("euler",)


def time_grid(num_steps: int, timestep_shift: float = 0.0) -> jax.Array:
  """Grid points of the solver, denser near the noise for a shift below 1.

  Args:
    num_steps: number of grid points, as the reference counts: one more than solver steps.
    timestep_shift: s in t' = s t / (1 + (s - 1) t); 0 is no shift.

  Returns:
    float32 [num_steps], from 0 to 1.
  """
  t = jnp.linspace(0.0, 1.0, num_steps)
  if timestep_shift:
    t = timestep_shift * t / (1 + (timestep_shift - 1) * t)
  return t


def sample_ode(
  velocity: Velocity,
  noise: jax.Array,
  *,
  num_steps: int = 250,
  method: str = "euler",
  timestep_shift: float = 0.3,
) -> jax.Array:
  """Integrates dx/dt = velocity(x, t) from noise at t=0 to data at t=1.

  Args:
    velocity: function of x and a scalar t in [0, 1].
    noise: standard normal, the batch in the leading axis.
    num_steps: grid points; 250 means 249 Euler steps.
    method: "euler".
    timestep_shift: see `time_grid`.

  Returns:
    float32, the shape of `noise`.

  Raises:
    ValueError: unknown method, or fewer than two grid points.
  """
  if method not in METHODS:
    raise ValueError(f"method is {method!r}; choose one of {METHODS}.")
  if num_steps < 2:
    raise ValueError(f"num_steps is {num_steps}; a grid from noise to data has at least 2 points.")
  t = time_grid(num_steps, timestep_shift)

  def step(x: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    start, end = ends
    return x + (end - start) * velocity(x, start).astype(x.dtype), None

  return jax.lax.scan(step, noise.astype(jnp.float32), (t[:-1], t[1:]))[0]


def guided(
  model: LightningDiT | Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
  label: jax.Array,
  null_label: int,
  *,
  cfg_scale: float,
  cfg_interval_start: float = 0.0,
  cfg_channels: int = 3,
) -> Velocity:
  """The velocity with classifier-free guidance.

  Args:
    model: model(x [B, h, w, Z], t [B], label [B]) -> velocity [B, h, w, Z].
    label: int32 [B].
    null_label: the label that stands for none, the model's `num_classes`.
    cfg_scale: 1 is no guidance.
    cfg_interval_start: guidance is off where t is smaller; 1 is no guidance, 0 is everywhere.
    cfg_channels: guidance acts on the first channels only, as the published scales want; 0: all.

  Returns:
    velocity(x, t). Where guidance is off, the unconditional half is not computed.

  Source: `forward_with_cfg` of the reference.
  """
  null = jnp.full_like(label, null_label)

  def times(t: jax.Array, count: int) -> jax.Array:
    return jnp.full((count,), t, jnp.float32)

  def plain(x: jax.Array, t: jax.Array) -> jax.Array:
    return model(x, times(t, len(x)), label)

  def both(x: jax.Array, t: jax.Array) -> jax.Array:
    # Interleaved and not concatenated: the halves of a sharded batch stay on their devices.
    twice = jnp.stack([x, x], 1).reshape(-1, *x.shape[1:])
    labels = jnp.stack([label, null], 1).reshape(-1)
    out = model(twice, times(t, len(twice)), labels).reshape(-1, 2, *x.shape[1:])
    with_label, without = out[:, 0], out[:, 1]
    channels = cfg_channels or x.shape[-1]
    mask = jnp.arange(x.shape[-1]) < channels
    return jnp.where(mask, without + cfg_scale * (with_label - without), with_label)

  if cfg_scale == 1 or cfg_interval_start >= 1:
    return plain
  if cfg_interval_start <= 0:
    return both

  def velocity(x: jax.Array, t: jax.Array) -> jax.Array:
    return jax.lax.cond(t < cfg_interval_start, plain, both, x, t)

  return velocity


def noise_of(seed: int, index_B: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """The starting noise of samples by their index, whatever the batch they are in.

  Args:
    seed: of the whole set.
    index_B: int32 [B], each sample's place in the set.
    shape: of one latent, (h, w, Z).

  Returns:
    float32 [B, *shape], standard normal.
  """
  key = jax.random.key(seed)
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(index_B)
