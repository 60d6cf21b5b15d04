"""Solvers of the ODE, Runge-Kutta on a grid or Dormand-Prince on its own, and of the SDE.

`check_solver` alone knows which settings work. The state of an ODE is a pytree of arrays [B, ...]:
a likelihood travels beside its latents. Reference: `transport/integrators.py`, which calls
torchdiffeq.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lightningdit_jax import transport
from vavae_jax.common import keys
from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import Key

# Explicit Runge-Kutta methods: each stage's weights of the earlier stages, the step's weights of
# all. rk4 is the 3/8 rule, as in torchdiffeq, which calls Heun's method heun2.
_HEUN = (((1.0,),), (0.5, 0.5))
MAP = "map"  # Euler's steps with the mean velocity of each, which a flow map knows
TABLEAUX: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
  "euler": ((), (1.0,)),
  MAP: ((), (1.0,)),
  "heun": _HEUN,
  "heun2": _HEUN,
  "midpoint": (((0.5,),), (0.0, 1.0)),
  "rk4": (((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
METHODS = (*TABLEAUX, "dopri5")
MAX_ADAPTIVE_STEPS = 4096
# The adaptive solver's first step, as a share of the way. diffrax begins with a hundredth, over
# which the velocity of a noise prediction grows tenfold: 50 times the reference's error.
FIRST_STEP = 1e-4
SDE_METHODS = ("euler", "heun")


SETTINGS: dict[str, Key] = {
  "mode": Key("ODE", ("ODE", "SDE"), "Of the equation that is solved from noise to data."),
  "num_steps": Key(250, "[2, 1e6]", "Grid points of the solver: 250 are 249 Euler steps."),
  "method": Key("euler", METHODS, 'The SDE takes "euler" and "heun"; "map" is for flow maps.'),
  "timestep_shift": Key(0.3, "[0, 1e6]", "Below 1 the ODE's grid is denser near noise; 0: none."),
  "atol": Key(1e-6, "(0, 1]", "Absolute tolerance of dopri5."),
  "rtol": Key(1e-3, "(0, 1]", "Relative tolerance of dopri5."),
  "diffusion_form": Key("sigma", tuple(transport.DIFFUSION_FORMS), "Of the SDE's D(t)."),
  "diffusion_norm": Key(1.0, "[0, 1e6]", "Magnitude of the SDE's D(t)."),
  "last_step": Key("Mean", ("", "Mean", "Tweedie", "Euler"), 'Last step of the SDE; "": none.'),
  "last_step_size": Key(0.04, "(0, 1)", "Length of that step in t."),
}


def check_solver(**settings: Any) -> None:
  """Raises InputError, with the valid choices, for settings that no solver can use.

  They are some of `SETTINGS`; `sampling.sample_ode` and `sample_sde` explain them.
  """
  keys.check(SETTINGS, settings)
  method = settings.get("method", "euler")
  if settings.get("mode") == "SDE" and method not in SDE_METHODS:
    raise InputError(f"method of the SDE is {method!r}; choose one of {', '.join(SDE_METHODS)}.")


def integrate(
  field: Callable[..., Any],
  start: Any,
  grid: jax.Array,
  method: str,
  atol: float,
  rtol: float,
) -> Any:
  """Solves d state / dt = field(state, t) from the first point of a grid to the last.

  The state is a pytree of float32 arrays [B, ...], t a scalar; the grid rises or falls. "dopri5"
  uses the ends of the grid only and calls the field with t [B]; its tolerances are for the root
  mean square over a sample. "map" calls field(state, t, end of the step), on a rising grid.
  """
  if method == "dopri5":
    return _dopri5(field, start, grid[0], grid[-1], atol, rtol)
  stages, weights = TABLEAUX[method]

  def moved(state: Any, by: float | jax.Array, shares: tuple[float, ...], slopes: list[Any]) -> Any:
    def move(x: jax.Array, *slopes: jax.Array) -> jax.Array:
      return x + by * sum(
        share * s.astype(x.dtype) for share, s in zip(shares, slopes, strict=True)
      )

    return jax.tree.map(move, state, *slopes)

  def step(state: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    t, size = ends[0], ends[1] - ends[0]
    slopes = [field(state, t, ends[1]) if method == MAP else field(state, t)]
    for shares in stages:
      slopes.append(field(moved(state, size, shares, slopes), t + sum(shares) * size))
    return moved(state, size, weights, slopes), None

  return jax.lax.scan(step, start, (grid[:-1], grid[1:]))[0]


def _dopri5(
  field: Callable[[Any, jax.Array], Any],
  start: Any,
  t0: jax.Array,
  t1: jax.Array,
  atol: float,
  rtol: float,
) -> Any:
  """Dormand-Prince, which chooses each sample's steps alone, so that none depends on its batch.

  diffrax solves for one sample and is vmapped; the field, which takes only batches, is called once
  for all of them.
  """
  # They take half a second to import. While this is traced, their own import must not be.
  with jax.ensure_compile_time_eval():
    import diffrax
    import equinox as eqx

  count = len(jax.tree.leaves(start)[0])
  # A custom rule for vmap must not close over traced arrays, such as a model's weights.
  converted = eqx.filter_closure_convert(field, start, jnp.broadcast_to(t0, (count,)))
  arrays, rest = eqx.partition(converted, eqx.is_array)

  def field_of_all(arrays: Any, state: Any, t_B: jax.Array) -> Any:
    return eqx.combine(arrays, rest)(state, t_B)

  @jax.custom_batching.custom_vmap
  def field_of_one(arrays: Any, state: Any, t: jax.Array) -> Any:
    # For shapes only: every call is batched by the rule below.
    batch = jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), (state, t))
    return jax.tree.map(lambda x: x[0], field_of_all(arrays, *batch))

  @field_of_one.def_vmap
  def _(count: int, in_batched: Any, arrays: Any, state: Any, t: jax.Array) -> tuple[Any, Any]:
    def whole(x: jax.Array, batched: bool) -> jax.Array:
      return x if batched else jnp.broadcast_to(x, (count, *x.shape))

    batch = jax.tree.map(whole, (state, t), tuple(in_batched[1:]))
    slopes = field_of_all(arrays, *batch)
    return slopes, jax.tree.map(lambda _: True, slopes)

  def solve(one: Any) -> Any:
    solution = diffrax.diffeqsolve(
      diffrax.ODETerm(lambda t, state, _: field_of_one(arrays, state, t)),
      diffrax.Dopri5(),
      t0,
      t1,
      FIRST_STEP * (t1 - t0),
      one,
      stepsize_controller=diffrax.PIDController(rtol, atol),
      saveat=diffrax.SaveAt(t1=True),
      adjoint=diffrax.ForwardMode(),
      max_steps=MAX_ADAPTIVE_STEPS,
    )
    return jax.tree.map(lambda x: x[0], solution.ys)

  return jax.vmap(solve)(start)


def sde_interval(
  path: str,
  prediction: str,
  method: str,
  diffusion_form: str,
  last_step: str,
  last_step_size: float,
  eps: float | None = None,
) -> tuple[float, float]:
  """The times (t0, t1) between which `sample_sde` takes its equal steps; arguments as there.

  They end 1e-3, or `eps`, before an end where the drift is needed and singular.
  """
  t0, t1 = transport.interval(path, prediction, eps)
  safe = 1e-3 if eps is None else eps
  if transport.PATHS[path].starts_at_zero and diffusion_form == "SBDM":
    t0 = safe
  if last_step:
    return t0, 1 - last_step_size
  # Only Heun's method asks at the end itself, where all D / sigma but that of "sigma" are singular.
  if method == "heun" and diffusion_form != "sigma":
    t1 = min(t1, 1 - safe)
  return t0, t1


def sample_sde(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
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
    path: a key of `transport.PATHS`, likewise the next.
    prediction: what `predict` gives.
    num_steps: grid points, the last one behind the last step.
    method: "euler" (Euler-Maruyama) or "heun" (noise first, then a step of Heun's method).
    diffusion_form: of D(t), a key of `transport.DIFFUSION_FORMS`.
    diffusion_norm: magnitude of D(t).
    last_step: "Mean" (the drift without noise), "Euler" (the ODE's), "Tweedie" (the expected
      latent), or "" for none.
    last_step_size: of "Mean" and "Euler", and how far from t=1 all three begin.
    eps: see `sde_interval`.

  The result is float32, of the shape of `noise`.
  Source: Ma et al., SiT, section 2.4 and appendix; the reference's `Sampler.sample_sde`.
  """
  check_solver(
    mode="SDE",
    num_steps=num_steps,
    method=method,
    diffusion_form=diffusion_form,
    diffusion_norm=diffusion_norm,
    last_step=last_step,
    last_step_size=last_step_size,
  )
  ends = sde_interval(path, prediction, method, diffusion_form, last_step, last_step_size, eps)
  grid = jnp.linspace(*ends, num_steps)
  size = grid[1] - grid[0]

  def diffusion(x: jax.Array, t: jax.Array) -> jax.Array:
    return transport.diffusion(diffusion_form, diffusion_norm, t, x, path)

  def velocity_and_noise(x: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    predicted = predict(x, t).astype(jnp.float32)
    return (
      transport.to_velocity(predicted, x, t, path, prediction),
      transport.to_noise(predicted, x, t, path, prediction),
    )

  def drift(x: jax.Array, t: jax.Array) -> jax.Array:
    velocity, implied_noise = velocity_and_noise(x, t)
    # D score = -(D / sigma) noise; the quotient of "sigma" is finite at t=1, its parts' is not.
    if diffusion_form == "sigma":
      return velocity - diffusion_norm * implied_noise
    sigma = transport.coefficients(path, t, x).sigma
    return velocity - diffusion(x, t) / sigma * implied_noise

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
  if not last_step:
    return x
  velocity, implied_noise = velocity_and_noise(x, t)
  if last_step == "Euler":
    return x + last_step_size * velocity
  c = transport.coefficients(path, t, x)
  return (x - c.sigma * implied_noise) / c.alpha
