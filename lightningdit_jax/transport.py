"""Paths from noise to data, what the model predicts along them, and the losses: pure functions.

t=0 is noise and t=1 is data everywhere (the opposite of score-based papers), and t is not scaled by
1000. A path is x_t = alpha(t) latent + sigma(t) noise. A model predicts its velocity dx_t/dt, the
noise, or the score. `PATHS` and `PREDICTIONS` hold all that differs between them: a new one is one
entry; arguments `path` and `prediction` are their keys. A time t is a scalar, or [B] with one for
each sample. Paper section 5 and table 1; reference `transport/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

Array = jax.Array

# Of the VP path: the noise schedule's rate beta at t=1 and at t=0.
BETA_MIN, BETA_MAX = 0.1, 20.0


class Coefficients(NamedTuple):
  """A path at one time."""

  alpha: Array  # share of the latent
  sigma: Array  # share of the noise
  d_alpha: Array  # d alpha / dt
  d_sigma: Array  # d sigma / dt
  rate: Array  # d log alpha / dt, infinite where alpha is 0
  spread: Array  # sigma^2 rate - sigma d_sigma; the velocity is rate x + spread score


def linear(t: Array) -> Coefficients:
  """The straight line of rectified flow, the published path."""
  one = jnp.ones_like(t)
  return Coefficients(t, 1 - t, one, -one, rate=1 / t, spread=(1 - t) / t)


def gvp(t: Array) -> Coefficients:
  """The generalised variance-preserving path of SiT: a quarter of a circle."""
  half_pi = jnp.pi / 2
  sine, cosine = jnp.sin(half_pi * t), jnp.cos(half_pi * t)
  rate = half_pi / jnp.tan(half_pi * t)
  return Coefficients(sine, cosine, half_pi * cosine, -half_pi * sine, rate, spread=rate)


def vp(t: Array) -> Coefficients:
  """The variance-preserving path of score-based models, its noise schedule linear in time."""
  left = 1 - t
  beta = BETA_MIN + left * (BETA_MAX - BETA_MIN)
  log_alpha = -(left**2) / 4 * (BETA_MAX - BETA_MIN) - left / 2 * BETA_MIN
  alpha = jnp.exp(log_alpha)
  sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
  return Coefficients(
    alpha, sigma, alpha * beta / 2, -(alpha**2) * beta / (2 * sigma), rate=beta / 2, spread=beta / 2
  )


class Path(NamedTuple):
  """A path from noise, at t=0, to data, at t=1, where sigma is 0."""

  at: Callable[[Array], Coefficients]  # by time
  starts_at_zero: bool = True  # alpha is 0 at t=0: nothing can be divided by it there
  is_smooth: bool = True  # the velocity is finite at t=1
  train_eps: float = 1e-3  # default distance of training times from singular ends


PATHS = {
  "Linear": Path(linear),
  "GVP": Path(gvp),
  "VP": Path(vp, starts_at_zero=False, is_smooth=False, train_eps=1e-5),
}


class Prediction(NamedTuple):
  """What a model may predict at a point x of a path with coefficients c; `Array`s are [B, ...]."""

  # (c, predicted, latent, noise) -> the prediction and its training target, in the units in which
  # the loss measures their difference.
  compared: Callable[[Coefficients, Array, Array, Array], tuple[Array, Array]]
  # (c, predicted, x) -> the velocity of the flow, and the noise in x.
  to_velocity: Callable[[Coefficients, Array, Array], Array]
  to_noise: Callable[[Coefficients, Array, Array], Array]
  # Whether the velocity or the loss is singular at t=0, if alpha is 0 there, and at t=1.
  singular: tuple[bool, bool] = (True, True)
  is_weighted: bool = False  # `LOSS_WEIGHTS` apply, made for errors in units of the noise
  has_direction: bool = False  # there is a direction loss: 1 - cosine to the target


PREDICTIONS = {
  "velocity": Prediction(
    compared=lambda c, v, latent, noise: (v, c.d_alpha * latent + c.d_sigma * noise),
    to_velocity=lambda c, v, x: v,
    to_noise=lambda c, v, x: (
      (c.alpha * v - c.d_alpha * x) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)
    ),
    singular=(False, False),
    has_direction=True,
  ),
  "noise": Prediction(
    compared=lambda c, predicted, latent, noise: (predicted, noise),
    to_velocity=lambda c, noise, x: c.rate * x - c.spread / c.sigma * noise,
    to_noise=lambda c, noise, x: noise,
    is_weighted=True,
  ),
  # The score is -noise / sigma.
  "score": Prediction(
    compared=lambda c, score, latent, noise: (score * c.sigma, -noise),
    to_velocity=lambda c, score, x: c.rate * x + c.spread * score,
    to_noise=lambda c, score, x: -c.sigma * score,
    is_weighted=True,
  ),
}

LOSS_WEIGHTS: dict[str, Callable[[Coefficients], Array]] = {
  "": lambda c: jnp.ones_like(c.sigma),
  "velocity": lambda c: (c.spread / c.sigma) ** 2,
  "likelihood": lambda c: c.spread / c.sigma**2,
}

# (c, t, norm) -> the diffusion D(t) of an SDE.
DIFFUSION_FORMS: dict[str, Callable[[Coefficients, Array, float], Array]] = {
  "constant": lambda c, t, norm: jnp.full_like(t, norm),
  "SBDM": lambda c, t, norm: norm * c.spread,
  "sigma": lambda c, t, norm: norm * c.sigma,
  "linear": lambda c, t, norm: norm * (1 - t),
  "decreasing": lambda c, t, norm: 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
  "increasing-decreasing": lambda c, t, norm: norm * jnp.sin(jnp.pi * t) ** 2,
}


def coefficients(path: str, t: jax.typing.ArrayLike, x: Array) -> Coefficients:
  """The coefficients at t, a scalar or [B], shaped for x [B, ...]; ValueError for no such path."""
  if path not in PATHS:
    raise ValueError(f"The path is {path!r}; choose one of {tuple(PATHS)}.")
  return PATHS[path].at(_aligned(t, x))


def _aligned(t: jax.typing.ArrayLike, x: Array) -> Array:
  t = jnp.asarray(t, jnp.float32)
  chex.assert_rank(t, {0, 1})
  if t.ndim:
    chex.assert_equal_shape_prefix([t, x], 1)
  return t.reshape(t.shape + (1,) * (x.ndim - 1) * t.ndim)


def interval(
  path: str = "Linear",
  prediction: str = "velocity",
  eps: float | None = None,
  *,
  training: bool = False,
) -> tuple[float, float]:
  """The times (t0, t1) between which training draws, and the ODE is solved.

  They keep `eps` away from singular ends; None: 1e-3, and for training the path's `train_eps`.
  """
  p, singular = PATHS[path], PREDICTIONS[prediction].singular
  if eps is None:
    eps = p.train_eps if training else 1e-3
  t0 = eps if singular[0] and p.starts_at_zero else 0.0
  t1 = 1 - eps if singular[1] or not p.is_smooth else 1.0
  return t0, t1


def sample_time(
  key: Array,
  batch_size: int,
  *,
  use_lognorm: bool = True,
  shifted_mu: float = 0.0,
  lognorm_sigma: float = 1.0,
  partial_train: tuple[float, float] | tuple[()] = (),
  partial_ratio: float = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
) -> Array:
  """Training times t_B, float32 in [0, 1].

  Args:
    use_lognorm: logit-normal, which favours the middle of the path; False: uniform.
    shifted_mu: of the normal; above 0 favours the data, below 0 the noise.
    lognorm_sigma: its deviation, above 0.
    partial_train: a range to which `partial_ratio` of the times are confined; () is none.
    partial_ratio: share of the times that are drawn from that range.
    interval: what [0, 1] is mapped to, where no range is given.

  DEVIATION: each time of a batch is confined or not; in the reference a GPU's batch is, as a whole.
  """
  key_time, key_choice = jax.random.split(key)
  # The quantile function maps a uniform share of probability, so a range needs no rejection.
  share_B = jax.random.uniform(key_time, (batch_size,), minval=1e-7)
  t0, t1 = interval
  normal = (shifted_mu, lognorm_sigma)
  t_B = (_quantile(share_B, *normal) if use_lognorm else share_B) * (t1 - t0) + t0
  if not partial_train:
    return t_B
  low, high = partial_train
  if use_lognorm:
    low_share, high_share = (_share(jnp.float32(end), *normal) for end in (low, high))
    confined_B = _quantile(low_share + share_B * (high_share - low_share), *normal)
    confined_B = jnp.clip(confined_B, low, high)
  else:
    confined_B = low + share_B * (high - low)
  chosen_B = jax.random.bernoulli(key_choice, partial_ratio, (batch_size,))
  return jnp.where(chosen_B, confined_B, t_B)


def _quantile(share: Array, mu: float, sigma: float) -> Array:
  return jax.nn.sigmoid(mu + sigma * jax.scipy.special.ndtri(share))


def _share(t: Array, mu: float, sigma: float) -> Array:
  return jax.scipy.special.ndtr((jax.scipy.special.logit(t) - mu) / sigma)


def interpolate(latent: Array, noise: Array, t: Array, path: str = "Linear") -> Array:
  """The point x_t = alpha latent + sigma noise of a path; both ends are [B, h, w, Z]."""
  chex.assert_equal_shape([latent, noise])
  c = coefficients(path, t, latent)
  return c.alpha * latent + c.sigma * noise


def losses(
  predicted_BhwZ: Array,
  latent_BhwZ: Array,
  noise_BhwZ: Array,
  t_B: Array,
  *,
  path: str = "Linear",
  prediction: str = "velocity",
  loss_weight: str = "",
) -> dict[str, Array]:
  """Per-sample training losses of a prediction at `interpolate(latent, noise, t, path)`.

  {"mse": [B], mean square of the error, weighted}, and where the prediction has a direction
  "cosine": [B], the marginal cosine loss, mean over positions of 1 - cosine over channels.
  `loss_weight` is a key of `LOSS_WEIGHTS`; predictions that are not weighted ignore it.
  """
  chex.assert_equal_shape([predicted_BhwZ, latent_BhwZ, noise_BhwZ])
  chex.assert_shape(t_B, latent_BhwZ.shape[:1])
  kind = PREDICTIONS[prediction]
  c = coefficients(path, t_B, latent_BhwZ)
  predicted = predicted_BhwZ.astype(jnp.float32)
  given, target = kind.compared(c, predicted, latent_BhwZ, noise_BhwZ)
  target = target.astype(jnp.float32)
  weight = LOSS_WEIGHTS[loss_weight](c) if kind.is_weighted else 1.0
  found = {"mse": _sample_mean(weight * (given - target) ** 2)}
  if kind.has_direction:
    found["cosine"] = _sample_mean(1 - _cosine(given, target))
  return found


def _sample_mean(x: Array) -> Array:
  return jnp.mean(x, axis=range(1, x.ndim))


def _cosine(a: Array, b: Array) -> Array:
  # Each norm is clamped as PyTorch does: a zero-initialised head would give NaN gradients.
  norms = jnp.sqrt(jnp.maximum(jnp.sum(a**2, -1), 1e-16) * jnp.maximum(jnp.sum(b**2, -1), 1e-16))
  return jnp.sum(a * b, -1) / norms


def to_velocity(predicted: Array, x: Array, t: Array, path: str, prediction: str) -> Array:
  """The velocity [B, ...] of the flow that a prediction at x implies; t is inside `interval`."""
  return PREDICTIONS[prediction].to_velocity(coefficients(path, t, x), predicted, x)


def to_noise(predicted: Array, x: Array, t: Array, path: str, prediction: str) -> Array:
  """The noise [B, ...] that a prediction at x implies.

  The score is -noise / sigma, and the latent (x - sigma noise) / alpha.
  """
  return PREDICTIONS[prediction].to_noise(coefficients(path, t, x), predicted, x)


def diffusion(form: str, norm: float, t: Array, x: Array, path: str) -> Array:
  """The diffusion D(t) of the SDE dx = (velocity + D score) dt + sqrt(2 D) dw, shaped for x."""
  return DIFFUSION_FORMS[form](coefficients(path, t, x), _aligned(t, x), norm)
