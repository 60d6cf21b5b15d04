"""Refuses configurations and latents that cannot work, before anything compiles."""

from __future__ import annotations

from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

from lightningdit_jax import attention, routing, sampling, solvers, transport
from lightningdit_jax.model import build_model
from lightningdit_jax.store import LatentStore
from lightningdit_jax.store.space import Space, check_classes
from vavae_jax.common import functional, keys
from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import DTYPES, Key
from vavae_jax.common.optimizer import learning_rate

# The keys of `config.sample`.
SAMPLE: dict[str, Key] = {
  **solvers.SETTINGS,
  "cfg_scale": Key(10.0, "[0, 1e4]", "Guidance; 1: none."),
  "cfg_interval_start": Key(0.1, "[0, 1]", "No guidance where t is smaller."),
  "cfg_channels": Key(
    3,
    "[0, 65536]",
    "Guidance acts on the first channels only; the published scale of 10 is right only for 3. 0: "
    "all channels, where about 4 serves.",
  ),
  "internal_scale": Key(
    1.0, "[0, 1e4]", "Internal Guidance, of a model with an early head; 1: none."
  ),
  "internal_until": Key(1.0, "[0, 1]", "No Internal Guidance where t is larger."),
  "routed": Key(
    0.0, "[0, 1)", "Share of the tokens led around config.route's blocks; docs/beyond.md."
  ),
  "guide_routed": Key(
    0.0,
    "[0, 1)",
    "Likewise in what a sample is guided away from, then by its own label; 0: by the null label.",
  ),
  "dtype": Key(
    "float32",
    DTYPES,
    "Of matrix products; float32 as the reference samples, whatever the training's is. TPUs round "
    "the factors of float32 products to bfloat16, unless jax_default_matmul_precision forbids it.",
  ),
  "batch_size": Key(64, "[1, 1e6]", "Samples at once on each device."),
}

# The keys of `config.published`: with `config.sample`, how the number that a recipe names was made.
PUBLISHED: dict[str, Key] = {
  "num_samples": Key(50_000, "[1, 1e9]", "Samples of launch.sample --published."),
  "labels": Key("uniform", ("uniform", "balanced"), "Their labels."),
}
# Of a training and of that of its guide.
SHARED_WITH_GUIDE = (
  *("model.input_size", "model.in_channels", "model.num_classes"),
  *("transport.path_type", "transport.prediction"),
  *("latents.sha256", "latents.latent_norm", "latents.latent_multiplier"),
)
_EPS = Key(None, "[0, 0.5)", "From the path's singular ends; None: as it needs.", kind=float)
# The keys of `config.transport`.
TRANSPORT: dict[str, Key] = {
  "path_type": Key("Linear", tuple(transport.PATHS)),
  "prediction": Key("velocity", tuple(transport.PREDICTIONS)),
  "loss_weight": Key("", tuple(transport.LOSS_WEIGHTS), "To predict noise or score."),
  "train_eps": _EPS,
  "sample_eps": _EPS,
  "use_lognorm": Key(True, text="Logit-normal times; False: uniform."),
  "shifted_mu": Key(0.0, "[-20, 20]", "Of the normal behind them; below 0 favours the noise."),
  "lognorm_sigma": Key(1.0, "(0, 10]", "Its deviation; above 1 favours both ends."),
  "lognorm_until": Key(0, keys.MAYBE, "The last step with logit-normal times; 0: all."),
  "partial_train": Key((), "[0, 1]", "A range (low, high) of times,", kind=float),
  "partial_ratio": Key(1.0, "[0, 1]", "to which this share of them is confined."),
  "use_cosine_loss": Key(True, text="Direction of the velocity beside its mean squared error."),
  "early_weight": Key(0.5, "[0, 1e9]", "Of the mean squared error of model.early_head, if any."),
  "map_mu": Key(
    -0.4, "[-20, 20]", "Of the normal behind one end of the steps that model.dmf_depth trains,"
  ),
  "map_end_mu": Key(1.2, "[-20, 20]", "and behind the other; the earlier time is the beginning."),
  "map_guidance": Key(
    0.6, "[0, 1e4]", "How far their targets are led away from the prediction without label; 0: not."
  ),
  "map_guidance_start": Key(0.3, "[0, 1]", "Not where t is smaller."),
}


def check_transport(config: FrozenConfigDict) -> None:
  """Raises InputError for path, prediction, loss and times that exclude each other."""
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
  # Noise and score become velocities by a division by alpha or sigma; loss weights divide too.
  for key, divides in (("train_eps", bool(config.loss_weight)), ("sample_eps", True)):
    is_used = transport.interval(config.path_type, config.prediction, 0.1) != (0.0, 1.0)
    if divides and is_used and config[key] == 0:
      raise InputError(
        f"config.transport.{key} is 0, where {config.prediction} on the path {config.path_type} is "
        "singular; leave it None for the default, or give one above 0."
      )
  ends = config.partial_train
  if len(ends) not in (0, 2) or (ends and ends[0] >= ends[1]):
    raise InputError(
      f"config.transport.partial_train is {tuple(ends)}; give two times (low, high), or none: ()."
    )
  if config.lognorm_until and not config.use_lognorm:
    raise InputError(
      f"config.transport.lognorm_until is {config.lognorm_until}, but use_lognorm is False; set it "
      "to True, or lognorm_until to 0."
    )


def changed(sample: FrozenConfigDict, **changes: Any) -> FrozenConfigDict:
  """`config.sample` with changes, for `check_sampling`.

  Guidance that they switch off takes the model's own guide_routed along.
  """
  ends = [changes.get(name) for name in ("cfg_scale", "cfg_interval_start")]
  off = {"guide_routed": 0.0} if any(isinstance(x, int | float) and x == 1 for x in ends) else {}
  return FrozenConfigDict(ConfigDict(sample.to_dict() | off | changes))


def check_sampling(
  sample: FrozenConfigDict, config: FrozenConfigDict, guide: FrozenConfigDict | None = None
) -> None:
  """Raises InputError for sampling settings that cannot work with the model of a training.

  Where another training's model is its `guide`, it needs no null label.
  """
  keys.check(SAMPLE, sample, "config.sample.")
  solvers.check_solver(**{name: sample[name] for name in solvers.SETTINGS})
  model = config.model
  if sample.cfg_channels > model.in_channels:
    raise InputError(
      f"config.sample.cfg_channels is {sample.cfg_channels}; the latents have {model.in_channels} "
      "channels, 0 means all of them."
    )
  if sample.internal_scale != 1 and not model.early_head:
    raise InputError(
      f"config.sample.internal_scale is {sample.internal_scale}, but the model has no early head "
      "that could guide it; set the scale to 1, or train with config.model.early_head above 0."
    )
  if sample.internal_scale != 1 and (sample.routed or sample.guide_routed):
    raise InputError(
      "config.sample.internal_scale is for samples with all tokens; set it to 1, or routed and "
      "guide_routed to 0."
    )
  if sample.guide_routed and not sampling.is_guided(sample):
    raise InputError(
      f"config.sample.guide_routed is {sample.guide_routed}, but config.sample.cfg_scale is "
      f"{sample.cfg_scale} and config.sample.cfg_interval_start {sample.cfg_interval_start}, which "
      "is no guidance; set guide_routed to 0, or give a scale other than 1 and a start before 1."
    )
  are_maps = all(one.model.dmf_depth for one in (config, guide) if one)
  if sample.method == solvers.MAP and (sample.routed or sample.guide_routed or not are_maps):
    raise InputError(
      f"config.sample.method is {sample.method!r}, for flow maps and all their tokens: it needs "
      "config.model.dmf_depth above 0 where the model was trained, and a guide, and routed and "
      'guide_routed of 0; or give another method, such as "euler".'
    )
  if sample.routed or sample.guide_routed:
    if sample.routed or not guide:
      routing.stretch(config.route, model.depth)
    if sample.guide_routed and guide:
      routing.stretch(guide.route, guide.model.depth, "The guide's ")
    if sample.mode == "ODE" and sample.method not in solvers.TABLEAUX:
      raise InputError(
        f"config.sample.method is {sample.method!r}, which takes tokens drawn anew at every "
        "time for errors of its steps; with routed or guide_routed give a method on a grid: "
        f"{', '.join(name for name in solvers.TABLEAUX if name != solvers.MAP)}."
      )
  if guide or sample.guide_routed:
    return
  if not model.class_dropout_prob and sampling.is_guided(sample):
    raise InputError(
      f"config.sample.cfg_scale is {sample.cfg_scale}, but a model trained with "
      "config.model.class_dropout_prob=0 has no unconditional velocity; set the scale to 1."
    )


def check_guide(
  config: FrozenConfigDict, guide: FrozenConfigDict, sample: FrozenConfigDict | None = None
) -> None:
  """Raises InputError where a guide was trained on other latents than the model, or otherwise, or
  where the settings `sample` guide by nothing.
  """
  if sample and not sampling.is_guided(sample):
    raise InputError(
      f"A guide is given, but config.sample.cfg_scale is {sample.cfg_scale} and "
      f"config.sample.cfg_interval_start {sample.cfg_interval_start}, which is no guidance; give a "
      "scale other than 1 and a start before 1, or no guide."
    )
  for name in SHARED_WITH_GUIDE:
    part, key = name.split(".")
    mine, other = config[part][key], guide[part][key]
    if mine != other:
      raise InputError(
        f"The guide was trained with config.{name}={other!r}, but the model with {mine!r}; a guide "
        "must see the same latents in the same way."
      )


def check_model(config: FrozenConfigDict) -> None:
  """Raises InputError for what cannot be built or run; `check_store` is for latents."""
  functional.outline(build_model(config), "config.model")
  model = config.model
  needed = {"cudnn": "an NVIDIA GPU", "pallas": "a TPU"}.get(model.attention, "")
  place = {"cudnn": "gpu", "pallas": "tpu"}.get(model.attention)
  if needed and (config.dtype != "bfloat16" or jax.default_backend() != place):
    raise InputError(
      f"config.model.attention is {model.attention!r}, which needs {needed} and "
      f"config.dtype='bfloat16'; here are {config.dtype} and {jax.default_backend()}. Set it to "
      "'xla'."
    )
  tokens = (model.input_size // model.patch_size) ** 2
  reason = attention.refusal(tokens, model.hidden_size, model.num_heads)
  if model.attention == "pallas" and reason:
    raise InputError(f"config.model.attention is 'pallas', but here are {reason}. Set it to 'xla'.")
  if config.evaluate_samples == 1:
    raise InputError("config.evaluate_samples is 1; 0 or at least 2.")
  learning_rate(config.optimizer)
  check_transport(config.transport)
  check_sampling(config.sample, config)
  path = config.transport
  if model.dmf_depth and (
    config.route.share
    or path.use_cosine_loss
    or (path.path_type, path.prediction) != ("Linear", "velocity")
    or (path.map_guidance and not model.class_dropout_prob)
  ):
    raise InputError(
      "config.model.dmf_depth trains the velocity of the path Linear, by a loss of its own, on all "
      "tokens, guided by the null label: set config.transport.path_type to 'Linear', prediction to "
      "'velocity', use_cosine_loss to False, config.route.share to 0, and "
      "config.model.class_dropout_prob above 0 or config.transport.map_guidance to 0."
    )
  if config.route.share:
    routing.stretch(config.route, model.depth)
    if model.early_head:
      raise InputError(
        "config.model.early_head reads all tokens, and config.route leads some around it; set "
        "early_head or route.share to 0."
      )
  if config.batch_size % (config.accumulate_steps * jax.device_count()):
    raise InputError(
      f"config.accumulate_steps is {config.accumulate_steps}; times the {jax.device_count()} "
      f"devices it must divide config.batch_size, which is {config.batch_size}."
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
  check_classes(Space.of(store).class_names, config.model.num_classes, str(store.path))
  low, high = int(store.labels.min()), int(store.labels.max())
  if low < 0 or high >= config.model.num_classes:
    raise InputError(
      f"The labels of {store.path} run from {low} to {high}, but config.model.num_classes is "
      f"{config.model.num_classes}; labels must lie in 0..{config.model.num_classes - 1}."
    )
