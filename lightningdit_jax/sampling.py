"""From noise to latents: time grids, guidance, solvers of the ODE and the SDE, likelihood.

Times run from t=0, noise, to t=1, data. The sample of index i is a function of (seed, i) alone:
noise is drawn by index, and the adaptive solver chooses its steps for each sample by itself.
Fixed grids are `jax.lax.scan`s. Reference: `inference.py`, `transport/integrators.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lightningdit_jax import transport
from lightningdit_jax.model import LightningDiT
from lightningdit_jax.solvers import integrate
from vavae_jax.common.errors import InputError

Model = LightningDiT | Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Velocity = Callable[[jax.Array, jax.Array], jax.Array]

SDE_METHODS = ("euler", "heun")
LAST_STEPS = ("", "Mean", "Tweedie", "Euler")


def check_grid(num_steps: int, timestep_shift: float = 0.0) -> None:
  """Raises InputError for a time grid that cannot be."""
  if num_steps < 2:
    raise InputError(f"num_steps is {num_steps}; a grid from noise to data has at least 2 points.")
  if timestep_shift < 0:
    raise InputError(
      f"timestep_shift is {timestep_shift}; it must not be negative: 0 is no shift, below 1 denser "
      "near the noise."
    )


def time_grid(
  num_steps: int, timestep_shift: float = 0.0, interval: tuple[float, float] = (0.0, 1.0)
) -> jax.Array:
  """Grid points of the solver, denser near the noise for a shift below 1.

  Args:
    num_steps: number of grid points, as the reference counts: one more than solver steps.
    timestep_shift: s in t' = s t / (1 + (s - 1) t); 0 is no shift.
    interval: first and last point before the shift.

  Returns:
    float32 [num_steps].

  Raises:
    InputError: fewer than two points, or a negative shift.
  """
  check_grid(num_steps, timestep_shift)
  t = jnp.linspace(*interval, num_steps)
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
  interval: tuple[float, float] = (0.0, 1.0),
  reverse: bool = False,
  atol: float = 1e-6,
  rtol: float = 1e-3,
) -> jax.Array:
  """Integrates dx/dt = velocity(x, t) from noise at t=0 to data at t=1, or back.

  Args:
    velocity: function of x and t in [0, 1], a scalar; of t [B] if the method is "dopri5".
    noise: standard normal, the batch in the leading axis; the data if `reverse`.
    num_steps: grid points; 250 means 249 steps. An adaptive method uses the ends of the grid only.
    method: one of `METHODS`.
    timestep_shift: see `time_grid`.
    interval: where to begin and end, `transport.interval` of what the model predicts.
    reverse: from data to noise, along the same grid.
    atol: absolute tolerance of "dopri5".
    rtol: relative tolerance of "dopri5".

  Returns:
    float32, the shape of `noise`.

  Raises:
    InputError: unknown method, or a grid that cannot be.
  """
  grid = time_grid(num_steps, timestep_shift, interval)
  grid = grid[::-1] if reverse else grid
  return integrate(velocity, noise.astype(jnp.float32), grid, method, atol, rtol)


def log_likelihood(
  velocity: Velocity,
  latent: jax.Array,
  probe: jax.Array,
  *,
  num_steps: int = 250,
  method: str = "dopri5",
  timestep_shift: float = 0.0,
  interval: tuple[float, float] = (0.0, 1.0),
  atol: float = 1e-6,
  rtol: float = 1e-3,
) -> tuple[jax.Array, jax.Array]:
  """Log-density of latents under the flow, by Hutchinson's estimate of the divergence.

  Args:
    velocity: as of `sample_ode`, without guidance.
    latent: [B, ...], at t=1, normalised as the model sees them. For the density of stored latents
      add the sum of log(multiplier / std) over all their numbers.
    probe: +1 or -1, the shape of `latent`; the estimate is exact in the mean over probes.
    num_steps: see `sample_ode`, like the rest.
    method: one of `METHODS`.
    timestep_shift: see `time_grid`.
    interval: see `sample_ode`.
    atol: absolute tolerance of "dopri5".
    rtol: relative tolerance of "dopri5".

  Returns:
    (natural logarithm of the density [B], the noise that the latents come from).

  Source: Chen et al., Neural ordinary differential equations; Grathwohl et al., FFJORD.
  """

  def field(state: tuple[jax.Array, jax.Array], t: jax.Array) -> tuple[jax.Array, jax.Array]:
    speed, along = jax.jvp(lambda x: velocity(x, t).astype(jnp.float32), state[:1], (probe,))
    return speed, _sample_sum(along * probe)

  grid = time_grid(num_steps, timestep_shift, interval)[::-1]
  start = (latent.astype(jnp.float32), jnp.zeros(len(latent)))
  noise, change = integrate(field, start, grid, method, atol, rtol)
  size = noise[0].size
  prior = -0.5 * (_sample_sum(noise**2) + size * jnp.log(2 * jnp.pi))
  # Down from t=1 to t=0 the divergence was summed with the sign that the density needs.
  return prior + change, noise


def bits_per_dimension(log_likelihood: jax.Array, size: int) -> jax.Array:
  """-log2 of a density per dimension.

  Args:
    log_likelihood: natural logarithm, any shape.
    size: dimensions of one sample.

  Returns:
    The shape of `log_likelihood`.
  """
  return -log_likelihood / (size * jnp.log(2.0))


def _sample_sum(x: jax.Array) -> jax.Array:
  return jnp.sum(x, axis=range(1, x.ndim))


def check_sde(method: str, diffusion_form: str, last_step: str, last_step_size: float) -> None:
  """Raises InputError, with the valid choices, for settings that `sample_sde` does not know."""
  for name, given, known in (
    ("method", method, SDE_METHODS),
    ("diffusion_form", diffusion_form, transport.DIFFUSION_FORMS),
    ("last_step", last_step, LAST_STEPS),
  ):
    if given not in known:
      raise InputError(f"{name} of the SDE is {given!r}; choose one of {known}.")
  if last_step and not 0 < last_step_size < 1:
    raise InputError(
      f"last_step_size is {last_step_size}; the last step, {last_step}, needs one between 0 and 1."
    )


def sde_interval(
  path: str,
  prediction: str,
  *,
  method: str,
  diffusion_form: str,
  last_step: str,
  last_step_size: float,
  eps: float | None = None,
) -> tuple[float, float]:
  """The times between which `sample_sde` takes its equal steps; arguments as there.

  Where the drift would be asked for at a singular end, it ends 1e-3 before.

  Returns:
    (t0, t1).
  """
  t0, t1 = transport.interval(path, prediction, eps)
  safe = 1e-3 if eps is None else eps
  if path != "VP" and diffusion_form == "SBDM":
    t0 = safe
  if last_step:
    return t0, 1 - last_step_size
  # Only Heun's method asks at the end itself, where all D / sigma but that of "sigma" are singular.
  if method == "heun" and diffusion_form != "sigma":
    t1 = min(t1, 1 - safe)
  return t0, t1


def sample_sde(
  predict: Velocity,
  noise: jax.Array,
  draw: Callable[[jax.Array], jax.Array],
  *,
  path: str = "Linear",
  prediction: str = "velocity",
  num_steps: int = 250,
  method: str = "euler",
  diffusion_form: str = "SBDM",
  diffusion_norm: float = 1.0,
  last_step: str = "Mean",
  last_step_size: float = 0.04,
  eps: float | None = None,
) -> jax.Array:
  """Integrates dx = (velocity + D score) dt + sqrt(2 D) dw from noise to data.

  Args:
    predict: function of x and a scalar t: what the model predicts.
    noise: standard normal, the batch in the leading axis.
    draw: standard normal of the shape of `noise` for each step 0, 1, ...
    path: a key of `transport.PATHS`.
    prediction: what `predict` is, one of `transport.PREDICTIONS`.
    num_steps: grid points, the last one behind the last step.
    method: "euler" (Euler-Maruyama) or "heun" (noise first, then a step of Heun's method).
    diffusion_form: of D(t), one of `transport.DIFFUSION_FORMS`.
    diffusion_norm: magnitude of D(t).
    last_step: "Mean" (the drift without noise), "Euler" (the ODE's), "Tweedie" (the expected
      latent), or "" for none.
    last_step_size: of "Mean" and "Euler", and how far from t=1 all three begin.
    eps: see `sde_interval`.

  Returns:
    float32, the shape of `noise`.

  Raises:
    InputError: unknown settings, or a grid that cannot be.

  Source: Ma et al., SiT, section 2.4 and appendix; the reference's `Sampler.sample_sde`.
  """
  check_grid(num_steps)
  check_sde(method, diffusion_form, last_step, last_step_size)
  ends = sde_interval(
    path,
    prediction,
    method=method,
    diffusion_form=diffusion_form,
    last_step=last_step,
    last_step_size=last_step_size,
    eps=eps,
  )
  grid = jnp.linspace(*ends, num_steps)
  size = grid[1] - grid[0]

  def diffusion(x: jax.Array, t: jax.Array) -> jax.Array:
    return transport.diffusion(diffusion_form, diffusion_norm, t, x, path)

  def drift(x: jax.Array, t: jax.Array) -> jax.Array:
    predicted = predict(x, t).astype(jnp.float32)
    implied_noise = transport.to_noise(predicted, x, t, path, prediction)
    # D score = -(D / sigma) noise; the quotient of "sigma" is finite at t=1, its parts' is not.
    if diffusion_form == "sigma":
      quotient: jax.Array | float = diffusion_norm
    else:
      quotient = diffusion(x, t) / transport.coefficients(path, t, x).sigma
    return transport.to_velocity(predicted, x, t, path, prediction) - quotient * implied_noise

  def step(x: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    index, t = at
    kick = jnp.sqrt(2 * diffusion(x, t) * size) * draw(index)
    if method == "euler":
      return x + size * drift(x, t) + kick, None
    x = x + kick
    first = drift(x, t)
    return x + size / 2 * (first + drift(x + size * first, t + size)), None

  x = noise.astype(jnp.float32)
  x, _ = jax.lax.scan(step, x, (jnp.arange(num_steps - 1), grid[:-1]))
  t = grid[-1]
  if last_step == "Mean":
    return x + last_step_size * drift(x, t)
  if last_step:
    predicted = predict(x, t).astype(jnp.float32)
    if last_step == "Euler":
      return x + last_step_size * transport.to_velocity(predicted, x, t, path, prediction)
    c = transport.coefficients(path, t, x)
    return (x - c.sigma * transport.to_noise(predicted, x, t, path, prediction)) / c.alpha
  return x


def guided(
  model: Model,
  label: jax.Array,
  null_label: int,
  *,
  cfg_scale: float,
  cfg_interval_start: float = 0.0,
  cfg_channels: int = 3,
  guide: Model | None = None,
) -> Velocity:
  """What the model predicts, with guidance.

  Args:
    model: model(x [B, h, w, Z], t [B], label [B]) -> prediction [B, h, w, Z].
    label: int32 [B].
    null_label: the label that stands for none, the model's `num_classes`.
    cfg_scale: 1 is no guidance.
    cfg_interval_start: guidance is off where t is smaller; 1 is no guidance, 0 is everywhere.
    cfg_channels: guidance acts on the first channels only, as the published scales want; 0: all.
    guide: a second, weaker model to be guided away from, with the same label (autoguidance); None:
      the model itself with the null label (classifier-free guidance).

  Returns:
    A function of x and t, scalar or [B]. At a scalar t where guidance is off, the half that guides
    is not computed.

  Source: `forward_with_cfg` of the reference; Karras et al., Guiding a diffusion model with a bad
  version of itself.
  """

  def times(t: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(t, jnp.float32), (count,))

  def plain(x: jax.Array, t: jax.Array) -> jax.Array:
    return model(x, times(t, len(x)), label)

  def halves(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    if guide is not None:
      return plain(x, t), guide(x, times(t, len(x)), label)
    # Interleaved and not concatenated: the halves of a sharded batch stay on their devices.
    twice = jnp.stack([x, x], 1).reshape(-1, *x.shape[1:])
    t_2B = times(t, len(x)).repeat(2)
    labels = jnp.stack([label, jnp.full_like(label, null_label)], 1).reshape(-1)
    out = model(twice, t_2B, labels).reshape(-1, 2, *x.shape[1:])
    return out[:, 0], out[:, 1]

  def both(x: jax.Array, t: jax.Array) -> jax.Array:
    towards, away = halves(x, t)
    on = jnp.arange(x.shape[-1]) < (cfg_channels or x.shape[-1])
    if jnp.ndim(t):
      on = on & (t >= cfg_interval_start)[:, None, None, None]
    return jnp.where(on, away + cfg_scale * (towards - away), towards)

  if cfg_scale == 1 or cfg_interval_start >= 1:
    return plain
  if cfg_interval_start <= 0:
    return both

  def predict(x: jax.Array, t: jax.Array) -> jax.Array:
    if jnp.ndim(t):
      return both(x, t)
    return jax.lax.cond(t < cfg_interval_start, plain, both, x, t)

  return predict


def noise_of(
  seed: int, index_B: jax.Array, shape: tuple[int, ...], step: int | jax.Array = 0
) -> jax.Array:
  """The noise of samples by their index, whatever the batch they are in.

  Args:
    seed: of the whole set.
    index_B: int32 [B], each sample's place in the set.
    shape: of one latent, (h, w, Z).
    step: 0 is the starting noise, more are the kicks of an SDE.

  Returns:
    float32 [B, *shape], standard normal.
  """
  key = jax.random.key(seed)

  def one(index: jax.Array) -> jax.Array:
    key_of_one = jax.random.fold_in(jax.random.fold_in(key, index), step)
    return jax.random.normal(key_of_one, shape)

  return jax.vmap(one)(index_B)
