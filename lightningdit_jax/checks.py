"""Refuses configurations and latents that cannot work, before anything compiles."""

from __future__ import annotations

import inspect

import jax
from ml_collections import FrozenConfigDict

from lightningdit_jax import solvers, transport
from lightningdit_jax.model import Options, build_model
from lightningdit_jax.store import LatentStore
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import check_optimizer

SOLVER_SETTINGS = tuple(inspect.signature(solvers.check_solver).parameters)
DTYPES = ("float32", "bfloat16")


def check_transport(config: FrozenConfigDict) -> None:
  """Raises InputError for an unknown path, prediction or loss, or ones that exclude each other."""
  for key, known in (
    ("path_type", tuple(transport.PATHS)),
    ("prediction", tuple(transport.PREDICTIONS)),
    ("loss_weight", tuple(transport.LOSS_WEIGHTS)),
  ):
    if config[key] not in known:
      raise InputError(f"config.transport.{key} is {config[key]!r}; choose one of {known}.")
  predicted = transport.PREDICTIONS[config.prediction]
  if config.loss_weight and not predicted.is_weighted:
    weighted = [name for name, entry in transport.PREDICTIONS.items() if entry.is_weighted]
    raise InputError(
      f"config.transport.loss_weight is {config.loss_weight!r}, but the loss of a "
      f'{config.prediction} has no weight; set it to "", or prediction to one of {weighted}.'
    )
  if config.use_cosine_loss and not predicted.has_direction:
    raise InputError(
      "config.transport.use_cosine_loss is the direction loss of a velocity; set it to False to "
      f"predict the {config.prediction}."
    )
  for key in ("train_eps", "sample_eps"):
    if config[key] is not None and not 0 <= config[key] < 0.5:
      raise InputError(f"config.transport.{key} is {config[key]}; it must lie in [0, 0.5).")
  # Noise and score become velocities by a division by alpha or sigma; loss weights divide too.
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
  """Raises InputError for sampling settings that cannot work with this model.

  With `has_guide` another model guides it, so that it needs no null label.
  """
  try:
    solvers.check_solver(**{name: sample[name] for name in SOLVER_SETTINGS})
  except InputError as error:
    raise InputError(f"config.sample: {error}") from error
  if sample.dtype not in DTYPES:
    raise InputError(f"config.sample.dtype is {sample.dtype!r}; choose one of {DTYPES}.")
  if not 0 <= sample.cfg_interval_start <= 1:
    raise InputError(
      f"config.sample.cfg_interval_start is {sample.cfg_interval_start}; guidance begins at this "
      "time, which lies in [0, 1]."
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
      "config.model.class_dropout_prob=0 has no unconditional velocity; set the scale to 1."
    )


def check_model(config: FrozenConfigDict) -> None:
  """Raises InputError for what cannot be built or run; `check_store` is for latents."""
  functional.outline(build_model(config), "config.model")
  Options(**config.model)  # the attention's name, for which `build_model` may put another
  if config.model.attention == "cudnn" and (
    config.dtype != "bfloat16" or jax.default_backend() != "gpu"
  ):
    raise InputError(
      f"config.model.attention is 'cudnn', which needs an NVIDIA GPU and config.dtype='bfloat16'; "
      f"here are {config.dtype} and {jax.default_backend()}. Set it to 'xla'."
    )
  check_optimizer(config.optimizer)
  check_transport(config.transport)
  check_sampling(config.sample, config.model)
  if config.accumulate_steps < 1 or config.batch_size % (
    config.accumulate_steps * jax.device_count()
  ):
    raise InputError(
      f"config.accumulate_steps is {config.accumulate_steps}; times the {jax.device_count()} "
      f"devices it must divide config.batch_size, which is {config.batch_size}."
    )
  if config.latents.valid_path and jax.process_count() > 1:
    raise InputError(
      "config.latents.valid_path: validation losses do not work with several processes yet; leave "
      "it empty."
    )
  if config.latents.valid_path and config.latents.valid_samples < 1:
    raise InputError(
      f"config.latents.valid_samples is {config.latents.valid_samples}; at least 1 is needed."
    )


def check_store(config: FrozenConfigDict, store: LatentStore) -> None:
  """Raises InputError for a store whose latents or labels are not those of the model."""
  if not len(store):
    raise InputError(
      f"{store.path} holds the statistics of latents and no latents, which is enough to sample; to "
      "train, make latents with python -m launch.encode."
    )
  size, channels = config.model.input_size, config.model.in_channels
  if store.shape != (size, size, channels):
    raise InputError(
      f"The latents of {store.path} are {store.shape[0]}x{store.shape[1]} with {store.shape[2]} "
      f"channels, config.model expects {size}x{size} with {channels}: they are of another "
      "tokenizer; set config.model.input_size and in_channels, or encode with the right one."
    )
  low, high = int(store.labels.min()), int(store.labels.max())
  if low < 0 or high >= config.model.num_classes:
    raise InputError(
      f"The labels of {store.path} run from {low} to {high}, but config.model.num_classes is "
      f"{config.model.num_classes}; labels must lie in 0..{config.model.num_classes - 1}."
    )
