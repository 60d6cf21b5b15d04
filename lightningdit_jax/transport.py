"""Paths from noise to data, what the model predicts along them, and the losses: pure functions.

t=0 is noise and t=1 is data everywhere (the opposite of score-based papers), and t is not scaled by
1000. A path is x_t = alpha(t) latent + sigma(t) noise. A model predicts its velocity dx_t/dt, the
noise, or the score; `to_velocity` and `to_noise` turn any of the three into what solvers need. A
time is a scalar, or [B] with one for each sample. Paper section 5 and table 1; reference
`transport/`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = ("", "velocity", "likelihood")
DIFFUSION_FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")

# Of the VP path: the noise schedule's rate beta at t=1 and at t=0.
BETA_MIN, BETA_MAX = 0.1, 20.0


class Coefficients(NamedTuple):
  """A path at one time.

  Attributes:
    alpha: share of the latent.
    sigma: share of the noise.
    d_alpha: d alpha / dt.
    d_sigma: d sigma / dt.
    rate: d log alpha / dt, infinite where alpha is 0.
    spread: sigma^2 rate - sigma d_sigma; the velocity is rate x + spread score.
  """

  alpha: jax.Array
  sigma: jax.Array
  d_alpha: jax.Array
  d_sigma: jax.Array
  rate: jax.Array
  spread: jax.Array


def linear(t: jax.Array) -> Coefficients:
  """The straight line of rectified flow, the published path."""
  one = jnp.ones_like(t)
  return Coefficients(t, 1 - t, one, -one, rate=1 / t, spread=(1 - t) / t)


def gvp(t: jax.Array) -> Coefficients:
  """The generalised variance-preserving path of SiT: a quarter of a circle."""
  half_pi = jnp.pi / 2
  sine, cosine = jnp.sin(half_pi * t), jnp.cos(half_pi * t)
  rate = half_pi / jnp.tan(half_pi * t)
  return Coefficients(sine, cosine, half_pi * cosine, -half_pi * sine, rate, spread=rate)


def vp(t: jax.Array) -> Coefficients:
  """The variance-preserving path of score-based models, its noise schedule linear in time."""
  left = 1 - t
  beta = BETA_MIN + left * (BETA_MAX - BETA_MIN)
  log_alpha = -(left**2) / 4 * (BETA_MAX - BETA_MIN) - left / 2 * BETA_MIN
  alpha = jnp.exp(log_alpha)
  sigma = jnp.sqrt(-jnp.expm1(2 * log_alpha))
  return Coefficients(
    alpha, sigma, alpha * beta / 2, -(alpha**2) * beta / (2 * sigma), rate=beta / 2, spread=beta / 2
  )


PATHS: dict[str, Callable[[jax.Array], Coefficients]] = {"Linear": linear, "GVP": gvp, "VP": vp}


def coefficients(path: str, t: jax.typing.ArrayLike, x: jax.Array) -> Coefficients:
  """A path's coefficients, shaped so that they multiply x.

  Args:
    path: a key of `PATHS`.
    t: scalar or [B].
    x: [B, ...].

  Returns:
    Coefficients, each a scalar or [B, 1, ...].

  Raises:
    ValueError: no such path.
  """
  if path not in PATHS:
    raise ValueError(f"The path is {path!r}; choose one of {tuple(PATHS)}.")
  t = jnp.asarray(t, jnp.float32)
  return PATHS[path](t.reshape(t.shape + (1,) * (x.ndim - 1) * t.ndim))


def interval(
  path: str = "Linear",
  prediction: str = "velocity",
  eps: float | None = None,
  *,
  training: bool = False,
) -> tuple[float, float]:
  """The times between which training draws, and the ODE is solved.

  Only the velocity on the Linear and the GVP path is finite from end to end.

  Args:
    path: a key of `PATHS`.
    prediction: one of `PREDICTIONS`.
    eps: distance from the singular ends. None: 1e-3, and 1e-5 to train on the VP path.
    training: which of the two.

  Returns:
    (t0, t1).
  """
  if path == "VP":
    return 0.0, 1 - ((1e-5 if training else 1e-3) if eps is None else eps)
  if prediction == "velocity":
    return 0.0, 1.0
  eps = 1e-3 if eps is None else eps
  return eps, 1 - eps


def sample_time(
  key: jax.Array,
  batch_size: int,
  *,
  use_lognorm: bool = True,
  shifted_mu: float = 0.0,
  partial_train: tuple[float, float] | tuple[()] = (),
  partial_ratio: float = 1.0,
  interval: tuple[float, float] = (0.0, 1.0),
) -> jax.Array:
  """Training times.

  Args:
    key: of the draw.
    batch_size: how many.
    use_lognorm: logit-normal(shifted_mu, 1), which favours the middle of the path; False: uniform.
    shifted_mu: above 0 favours the data, below 0 the noise.
    partial_train: a range to which `partial_ratio` of the times are confined; () is none.
    partial_ratio: share of the times that are drawn from that range.
    interval: what [0, 1] is mapped to, where no range is given.

  Returns:
    t_B float32 in [0, 1], t=0 noise and t=1 data.

  DEVIATION: each time of a batch is confined or not; in the reference a GPU's batch is, as a whole.
  """
  key_time, key_choice = jax.random.split(key)
  # The quantile function maps a uniform share of probability, so a range needs no rejection.
  share_B = jax.random.uniform(key_time, (batch_size,), minval=1e-7)
  t0, t1 = interval
  t_B = (_quantile(share_B, shifted_mu) if use_lognorm else share_B) * (t1 - t0) + t0
  if not partial_train:
    return t_B
  low, high = partial_train
  if use_lognorm:
    low_share, high_share = (_share(jnp.float32(end), shifted_mu) for end in (low, high))
    confined_B = _quantile(low_share + share_B * (high_share - low_share), shifted_mu)
    confined_B = jnp.clip(confined_B, low, high)
  else:
    confined_B = low + share_B * (high - low)
  chosen_B = jax.random.bernoulli(key_choice, partial_ratio, (batch_size,))
  return jnp.where(chosen_B, confined_B, t_B)


def _quantile(share: jax.Array, mu: float) -> jax.Array:
  return jax.nn.sigmoid(mu + jax.scipy.special.ndtri(share))


def _share(t: jax.Array, mu: float) -> jax.Array:
  return jax.scipy.special.ndtr(jax.scipy.special.logit(t) - mu)


def interpolate(
  latent_BhwZ: jax.Array, noise_BhwZ: jax.Array, t: jax.Array, path: str = "Linear"
) -> jax.Array:
  """The point x_t = alpha latent + sigma noise of a path.

  Args:
    latent_BhwZ: normalised latents, the point at t=1.
    noise_BhwZ: standard normal, the point at t=0.
    t: scalar or [B].
    path: a key of `PATHS`.

  Returns:
    float32 [B, h, w, Z].
  """
  c = coefficients(path, t, latent_BhwZ)
  return c.alpha * latent_BhwZ + c.sigma * noise_BhwZ


def velocity(
  latent_BhwZ: jax.Array, noise_BhwZ: jax.Array, t: jax.Array, path: str = "Linear"
) -> jax.Array:
  """dx_t/dt of a path, arguments as of `interpolate`; latent - noise on the Linear one."""
  c = coefficients(path, t, latent_BhwZ)
  return c.d_alpha * latent_BhwZ + c.d_sigma * noise_BhwZ


def losses(
  predicted_BhwZ: jax.Array,
  latent_BhwZ: jax.Array,
  noise_BhwZ: jax.Array,
  t_B: jax.Array,
  *,
  path: str = "Linear",
  prediction: str = "velocity",
  loss_weight: str = "",
) -> dict[str, jax.Array]:
  """What a prediction costs, for each sample.

  Args:
    predicted_BhwZ: the model's, at `interpolate(latent, noise, t, path)`.
    latent_BhwZ: normalised latents.
    noise_BhwZ: standard normal.
    t_B: [B].
    path: a key of `PATHS`.
    prediction: what the model predicts, one of `PREDICTIONS`.
    loss_weight: "" none, "velocity" or "likelihood"; the loss of a velocity has none in any case.

  Returns:
    {"mse": [B], mean square of the error, weighted}, and where the velocity is predicted "cosine":
    [B], the direction loss, mean over positions of 1 - cosine over channels.
  """
  predicted = predicted_BhwZ.astype(jnp.float32)
  if prediction == "velocity":
    target = velocity(latent_BhwZ, noise_BhwZ, t_B, path).astype(jnp.float32)
    return {
      "mse": _sample_mean((predicted - target) ** 2),
      "cosine": _sample_mean(1 - _cosine(predicted, target)),
    }
  c = coefficients(path, t_B, predicted)
  weight = {
    "": jnp.ones_like(c.sigma),
    "velocity": (c.spread / c.sigma) ** 2,
    "likelihood": c.spread / c.sigma**2,
  }[loss_weight]
  # The score is -noise / sigma; its error is measured in units of the noise.
  error = predicted - noise_BhwZ if prediction == "noise" else predicted * c.sigma + noise_BhwZ
  return {"mse": _sample_mean(weight * error**2)}


def _sample_mean(x: jax.Array) -> jax.Array:
  return jnp.mean(x, axis=range(1, x.ndim))


def _cosine(a: jax.Array, b: jax.Array) -> jax.Array:
  # Each norm is clamped as PyTorch does: a zero-initialised head would give NaN gradients.
  norms = jnp.sqrt(jnp.maximum(jnp.sum(a**2, -1), 1e-16) * jnp.maximum(jnp.sum(b**2, -1), 1e-16))
  return jnp.sum(a * b, -1) / norms


def to_velocity(
  predicted: jax.Array, x: jax.Array, t: jax.Array, path: str, prediction: str
) -> jax.Array:
  """The velocity of the flow that a prediction at x_t implies.

  Args:
    predicted: [B, ...], the model's.
    x: [B, ...], where it was made.
    t: scalar or [B], inside of `interval`.
    path: a key of `PATHS`.
    prediction: one of `PREDICTIONS`.

  Returns:
    [B, ...].
  """
  if prediction == "velocity":
    return predicted
  c = coefficients(path, t, x)
  if prediction == "noise":
    return c.rate * x - c.spread / c.sigma * predicted
  return c.rate * x + c.spread * predicted


def to_noise(
  predicted: jax.Array, x: jax.Array, t: jax.Array, path: str, prediction: str
) -> jax.Array:
  """The noise that a prediction at x_t implies, arguments as of `to_velocity`; finite everywhere.

  The score is -noise / sigma, and the latent (x - sigma noise) / alpha.
  """
  if prediction == "noise":
    return predicted
  c = coefficients(path, t, x)
  if prediction == "score":
    return -c.sigma * predicted
  return (c.alpha * predicted - c.d_alpha * x) / (c.alpha * c.d_sigma - c.d_alpha * c.sigma)


def diffusion(form: str, norm: float, t: jax.Array, x: jax.Array, path: str) -> jax.Array:
  """The diffusion D(t) of the SDE dx = (velocity + D score) dt + sqrt(2 D) dw.

  Args:
    form: one of `DIFFUSION_FORMS`.
    norm: its magnitude.
    t: scalar or [B].
    x: [B, ...], for the shape.
    path: a key of `PATHS`.

  Returns:
    A scalar or [B, 1, ...].

  Raises:
    ValueError: no such form.
  """
  if form not in DIFFUSION_FORMS:
    raise ValueError(f"The diffusion form is {form!r}; choose one of {DIFFUSION_FORMS}.")
  c = coefficients(path, t, x)
  t = coefficients("Linear", t, x).alpha
  return {
    "constant": jnp.full_like(t, norm),
    "SBDM": norm * c.spread,
    "sigma": norm * c.sigma,
    "linear": norm * (1 - t),
    "decreasing": 0.25 * (norm * jnp.cos(jnp.pi * t) + 1) ** 2,
    "increasing-decreasing": norm * jnp.sin(jnp.pi * t) ** 2,
  }[form]
