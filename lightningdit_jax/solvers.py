"""Solvers of ordinary differential equations: Runge-Kutta on a grid, Dormand-Prince on its own.

The state is a pytree of arrays [B, ...]: a likelihood travels beside its latents. Reference:
`transport/integrators.py`, which calls torchdiffeq.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vavae_jax.common.errors import InputError

# Explicit Runge-Kutta methods: what each stage takes of the earlier ones, what the step takes of
# all. rk4 is the 3/8 rule, as torchdiffeq has it, whose name of Heun's method is heun2.
_HEUN = (((1.0,),), (0.5, 0.5))
TABLEAUX: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
  "euler": ((), (1.0,)),
  "heun": _HEUN,
  "heun2": _HEUN,
  "midpoint": (((0.5,),), (0.0, 1.0)),
  "rk4": (((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
METHODS = (*TABLEAUX, "dopri5")
MAX_ADAPTIVE_STEPS = 4096
# Of the adaptive solver, as a share of the way. By itself diffrax begins with a hundredth, over
# which the velocity that a noise prediction implies grows tenfold: 50 times the reference's error.
FIRST_STEP = 1e-4


def integrate(
  field: Callable[[Any, jax.Array], Any],
  start: Any,
  grid: jax.Array,
  method: str,
  atol: float,
  rtol: float,
) -> Any:
  """Solves d state / dt = field(state, t) from the first point of a grid to the last.

  Args:
    field: function of the state and a scalar t; of t [B] if the method is "dopri5".
    start: pytree of float32 arrays [B, ...].
    grid: [points], rising or falling; "dopri5" uses its ends only.
    method: one of `METHODS`.
    atol: absolute tolerance of "dopri5", for the root mean square over a sample.
    rtol: relative tolerance of "dopri5".

  Returns:
    The state at the end.

  Raises:
    InputError: unknown method.
  """
  if method == "dopri5":
    return _dopri5(field, start, grid[0], grid[-1], atol, rtol)
  if method not in TABLEAUX:
    raise InputError(f"method is {method!r}; choose one of {METHODS}.")
  stages, weights = TABLEAUX[method]

  def moved(state: Any, by: float | jax.Array, shares: tuple[float, ...], slopes: list[Any]) -> Any:
    def move(x: jax.Array, *slopes: jax.Array) -> jax.Array:
      return x + by * sum(
        share * s.astype(x.dtype) for share, s in zip(shares, slopes, strict=True)
      )

    return jax.tree.map(move, state, *slopes)

  def step(state: Any, ends: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
    t, size = ends[0], ends[1] - ends[0]
    slopes = [field(state, t)]
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
  """Dormand-Prince with steps of its own for each sample, so that none depends on its batch.

  diffrax solves for one sample and is vmapped; the field, which knows only batches, is called once
  for all of them.
  """

  # They take half a second to import; in a trace, in which this may be, they must not trace.
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
