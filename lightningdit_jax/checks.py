"""Settings of transport and sampling that cannot work, told by name before anything compiles."""

from __future__ import annotations

from ml_collections import FrozenConfigDict

from lightningdit_jax import sampling, solvers, transport
from vavae_jax.common.errors import InputError

MODES = ("ODE", "SDE")
DTYPES = ("float32", "bfloat16")


def check_transport(config: FrozenConfigDict) -> None:
  """Raises InputError for a path, prediction or loss that does not exist or fit the others."""
  for key, known in (
    ("path_type", tuple(transport.PATHS)),
    ("prediction", transport.PREDICTIONS),
    ("loss_weight", transport.LOSS_WEIGHTS),
  ):
    if config[key] not in known:
      raise InputError(f"config.transport.{key} is {config[key]!r}; choose one of {known}.")
  if config.prediction == "velocity":
    if config.loss_weight:
      raise InputError(
        f"config.transport.loss_weight is {config.loss_weight!r}, but the loss of a velocity has "
        'no weight; set it to "", or prediction to "noise" or "score".'
      )
  elif config.use_cosine_loss:
    raise InputError(
      "config.transport.use_cosine_loss is the direction loss of a velocity; set it to False to "
      f"predict the {config.prediction}."
    )
  for key in ("train_eps", "sample_eps"):
    if config[key] is not None and not 0 <= config[key] < 0.5:
      raise InputError(f"config.transport.{key} is {config[key]}; it must lie in [0, 0.5).")
  # Noise and score become velocities by a division by alpha or sigma; loss weights by them too.
  for key, divides in (("train_eps", bool(config.loss_weight)), ("sample_eps", True)):
    is_used = transport.interval(config.path_type, config.prediction, 0.1) != (0.0, 1.0)
    if divides and is_used and config[key] == 0:
      raise InputError(
        f"config.transport.{key} is 0, where {config.prediction} on the path {config.path_type} is "
        "singular; leave it None for the default, or give one above 0."
      )
  ends = config.partial_train
  if len(ends) not in (0, 2) or (ends and not 0 <= ends[0] < ends[1] <= 1):
    raise InputError(
      f"config.transport.partial_train is {tuple(ends)}; give two times (low, high) with "
      "0 <= low < high <= 1, or () for none."
    )
  if not 0 <= config.partial_ratio <= 1:
    raise InputError(
      f"config.transport.partial_ratio is {config.partial_ratio}; it must lie in [0, 1]."
    )
  if config.lognorm_until and not config.use_lognorm:
    raise InputError(
      f"config.transport.lognorm_until is {config.lognorm_until}, but use_lognorm is False; set it "
      "to True, or lognorm_until to 0."
    )


def check_sampling(
  sample: FrozenConfigDict, model: FrozenConfigDict, *, has_guide: bool = False
) -> None:
  """Raises InputError for sampling settings that cannot work with this model, guided by another one
  if `has_guide`.
  """
  if sample.mode not in MODES:
    raise InputError(f"config.sample.mode is {sample.mode!r}; choose one of {MODES}.")
  if sample.mode == "SDE":
    sampling.check_sde(
      sample.method, sample.diffusion_form, sample.last_step, sample.last_step_size
    )
    if sample.diffusion_norm < 0:
      raise InputError(
        f"config.sample.diffusion_norm is {sample.diffusion_norm}; it must not be negative."
      )
  elif sample.method not in solvers.METHODS:
    raise InputError(f"config.sample.method is {sample.method!r}; choose one of {solvers.METHODS}.")
  sampling.check_grid(sample.num_steps, sample.timestep_shift)
  if sample.dtype not in DTYPES:
    raise InputError(f"config.sample.dtype is {sample.dtype!r}; choose one of {DTYPES}.")
  for key in ("atol", "rtol"):
    if sample[key] <= 0:
      raise InputError(f"config.sample.{key} is {sample[key]}; a tolerance is above 0.")
  if not 0 <= sample.cfg_interval_start <= 1:
    raise InputError(
      f"config.sample.cfg_interval_start is {sample.cfg_interval_start}; guidance acts from this "
      "time on, which lies in [0, 1]."
    )
  if sample.batch_size < 1:
    raise InputError(f"config.sample.batch_size is {sample.batch_size}; at least 1 is needed.")
  if not 0 <= sample.cfg_channels <= model.in_channels:
    raise InputError(
      f"config.sample.cfg_channels is {sample.cfg_channels}; the latents have {model.in_channels} "
      "channels, 0 means all of them."
    )
  if has_guide:
    return
  if not model.class_dropout_prob and sample.cfg_scale != 1 and sample.cfg_interval_start < 1:
    raise InputError(
      f"config.sample.cfg_scale is {sample.cfg_scale}, but a model trained with "
      "config.model.class_dropout_prob=0 knows no unconditional velocity; set the scale to 1."
    )
