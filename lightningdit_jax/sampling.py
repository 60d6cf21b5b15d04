"""From noise to latents: time grids, the ODE, guidance.

Times run from t=0, noise, to t=1, data. The sample of index i is a function of (seed, i) alone:
noise is drawn by index, and the adaptive solver chooses its steps for each sample by itself.
`solvers.py` has the solvers, `likelihood.py` densities. Reference: `inference.py`,
`transport/integrators.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from lightningdit_jax import flow_map, internal_guidance, routing, transport
from lightningdit_jax.model import LightningDiT, build_model
from lightningdit_jax.solvers import check_solver, integrate, sample_sde
from vavae_jax.common import functional

Model = LightningDiT | Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Velocity = Callable[..., Any]  # of (x, t)
# Keys of `config.sample` that `sample_ode` and `sample_sde` take.
_GRID = ("num_steps", "method")
ODE_SETTINGS = (*_GRID, "timestep_shift", "atol", "rtol")
SDE_SETTINGS = (*_GRID, "diffusion_form", "diffusion_norm", "last_step", "last_step_size")


def time_grid(
  num_steps: int, timestep_shift: float = 0.0, interval: tuple[float, float] = (0.0, 1.0)
) -> np.ndarray:
  """Grid points of the solver, float32 [num_steps], denser near the noise for a shift below 1.

  As in the reference, num_steps counts points, one more than steps. The shift s moves the points of
  `interval` to t' = s t / (1 + (s - 1) t); 0 is no shift.
  """
  check_solver(num_steps=num_steps, timestep_shift=timestep_shift)
  t = np.linspace(*interval, num_steps)  # jnp would compile for each new number
  if timestep_shift:
    t = timestep_shift * t / (1 + (timestep_shift - 1) * t)
  return t.astype(np.float32)


def sample_ode(
  velocity: Velocity,
  noise: Any,
  *,
  num_steps: int = 250,
  method: str = "euler",
  timestep_shift: float = 0.3,
  interval: tuple[float, float] = (0.0, 1.0),
  reverse: bool = False,
  atol: float = 1e-6,
  rtol: float = 1e-3,
) -> Any:
  """Integrates dx/dt = velocity(x, t) from noise at t=0 to data at t=1, or back.

  Args:
    velocity: function of x and t in [0, 1], a scalar; of t [B] if the method is "dopri5"; if it is
      "map", the mean velocity as a function of x, t and the time at which the step ends.
    noise: standard normal, the batch in the leading axis; the data if `reverse`. Or a pytree.
    num_steps: grid points; 250 means 249 steps. An adaptive method uses the ends of the grid only.
    method: one of `solvers.METHODS`.
    timestep_shift: see `time_grid`.
    interval: first and last time, `transport.interval` of the prediction.
    reverse: from data to noise, along the same grid.
    atol, rtol: tolerances of "dopri5".

  The result is float32, of the shape of `noise`. InputError by `solvers.check_solver`.
  """
  check_solver(
    num_steps=num_steps, method=method, timestep_shift=timestep_shift, atol=atol, rtol=rtol
  )
  grid = jnp.asarray(time_grid(num_steps, timestep_shift, interval))
  grid = grid[::-1] if reverse else grid
  start = jax.tree.map(lambda x: x.astype(jnp.float32), noise)
  return integrate(velocity, start, grid, method, atol, rtol)


def is_guided(sample: FrozenConfigDict) -> bool:
  """Whether `guided` guides at all with settings as `config.sample`."""
  return sample.cfg_scale != 1 and sample.cfg_interval_start < 1


def numbers_of(sample: FrozenConfigDict) -> dict[str, np.float32]:
  """The numbers of the guidance that is on: a program that takes them serves with all of them."""
  names = ["cfg_scale", "cfg_interval_start"] if is_guided(sample) else []
  names += ["internal_scale", "internal_until"] if sample.internal_scale != 1 else []
  return {name: np.float32(sample[name]) for name in names}


def guided(
  model: Model,
  label: jax.Array,
  null_label: int,
  *,
  cfg_scale: float | jax.Array,
  cfg_interval_start: float | jax.Array = 0.0,
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
    guide: a weaker model whose prediction with the same label is pushed away from (autoguidance);
      None: the model itself with the null label (classifier-free guidance).

  The result is a function of x and t, scalar or [B]. At a scalar t where guidance is off, the
  second prediction is not computed. Source: `forward_with_cfg` of the reference; Karras et al.,
  Guiding a diffusion model with a bad version of itself.
  """

  def times(t: jax.Array, count: int) -> jax.Array:
    return jnp.broadcast_to(jnp.asarray(t, jnp.float32), (count,))

  def plain(x: jax.Array, t: jax.Array) -> jax.Array:
    chex.assert_shape(label, (len(x),))
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
    chex.assert_shape(label, (len(x),))
    towards, away = halves(x, t)
    on = jnp.arange(x.shape[-1]) < (cfg_channels or x.shape[-1])
    if jnp.ndim(t):
      on = on & (t >= cfg_interval_start)[:, None, None, None]
    return jnp.where(on, away + cfg_scale * (towards - away), towards)

  # Numbers that are known now save a branch; traced ones may change without compiling anew.
  known = not isinstance(cfg_interval_start, jax.Array)
  if (not isinstance(cfg_scale, jax.Array) and cfg_scale == 1) or (
    known and cfg_interval_start >= 1
  ):
    return plain
  if known and cfg_interval_start <= 0:
    return both

  def predict(x: jax.Array, t: jax.Array) -> jax.Array:
    if jnp.ndim(t):
      return both(x, t)
    return jax.lax.cond(t < cfg_interval_start, plain, both, x, t)

  return predict


def noise_of(
  seed: int | jax.Array, index_B: jax.Array, shape: tuple[int, ...], step: int | jax.Array = 0
) -> jax.Array:
  """Standard normal float32 [B, *shape] by the samples' index in the set, whatever their batch.

  Step 0 is the starting noise, the others are the kicks of an SDE; shape is (h, w, Z).
  """
  chex.assert_rank(index_B, 1)
  key = jax.random.key(seed)

  def one(index: jax.Array) -> jax.Array:
    key_of_one = jax.random.fold_in(jax.random.fold_in(key, index), step)
    return jax.random.normal(key_of_one, shape)

  return jax.vmap(one)(index_B)


def sample_latents(
  config: FrozenConfigDict,
  params: Any,
  index_B: jax.Array,
  label_B: jax.Array,
  *,
  seed: int | jax.Array,
  sample: FrozenConfigDict,
  guide: tuple[FrozenConfigDict, Any] | None = None,
  numbers: Mapping[str, jax.Array] | None = None,
) -> jax.Array:
  """Normalised latents [B, h, w, Z] of samples by their int32 index in the set; pure and jittable.

  `config` is the training's, `params` usually an EMA, `sample` settings as `config.sample`; `guide`
  has configuration and parameters of a weaker model, for autoguidance: see `guided`. `numbers` are
  in place of those of `numbers_of(sample)`.
  """
  chex.assert_equal_shape([index_B, label_B])
  of = {**sample, **(numbers or {})}

  def network(config: FrozenConfigDict, params: Any) -> LightningDiT:
    graph = functional.graph_of(build_model(config, sample.dtype))
    dtype = nnx.merge(graph, params).dtype

    def cast(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
      return x.astype(dtype) if path[-1].key == "kernel" else x

    # Once and not at each step: what multiplies in bfloat16 is read at half its size.
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(cast, params))

  path, prediction = config.transport.path_type, config.transport.prediction
  eps = config.transport.sample_eps
  size, channels = config.model.input_size, config.model.in_channels
  draw = functools.partial(noise_of, seed, index_B, (size, size, channels))
  main, other = (config, network(config, params)), guide and (guide[0], network(*guide))
  shares = (sample.routed, sample.guide_routed)
  model, away = routing.for_sampling(main, other, shares, seed, index_B)

  def predict(x: jax.Array, t: jax.Array, end: jax.Array | None = None) -> jax.Array:
    towards = flow_map.towards(model, end)
    return guided(
      internal_guidance.extrapolated(towards, of["internal_scale"], of["internal_until"]),
      label_B,
      config.model.num_classes,
      cfg_scale=of["cfg_scale"],
      cfg_interval_start=of["cfg_interval_start"],
      cfg_channels=sample.cfg_channels,
      guide=flow_map.towards(away, end),
    )(x, t)

  if sample.mode == "SDE":
    settings: dict[str, Any] = {"path": path, "prediction": prediction, "eps": eps}
    settings |= {name: sample[name] for name in SDE_SETTINGS}
    return sample_sde(predict, draw(0), lambda step: draw(step + 1), **settings)
  return sample_ode(
    lambda x, *times: transport.to_velocity(predict(x, *times), x, times[0], path, prediction),
    draw(0),
    interval=transport.interval(path, prediction, eps),
    **{name: sample[name] for name in ODE_SETTINGS},
  )
