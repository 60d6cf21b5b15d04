"""The diffusion task: LightningDiT on stored latents as one pure step; paper section 5.

Reference: `train.py`. Parameters, EMA, optimizer and losses are float32, matmuls `config.dtype`.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from lightningdit_jax import latents, sampling, transport
from lightningdit_jax.model import LightningDiT
from vavae_jax import functional
from vavae_jax.errors import InputError
from vavae_jax.optimizer import make_optimizer, start_ema, update_ema

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class State:
  """All that training changes.

  Attributes:
    step: int32 scalar, updates done.
    params: LightningDiT's.
    ema: their moving average, what samples are made with; None without `ema_decay`.
    optimizer: AdamW's moments.
  """

  step: jax.Array
  params: Any
  ema: Any
  optimizer: Any


def build_model(config: FrozenConfigDict) -> functional.Build:
  """LightningDiT of a configuration, for `functional`."""
  return functools.partial(_model, config)


def _model(config: FrozenConfigDict, rngs: nnx.Rngs) -> LightningDiT:
  return LightningDiT(**config.model, dtype=jnp.dtype(config.dtype), rngs=rngs)


@functools.lru_cache
def open_store(path: str) -> latents.LatentStore:
  """The latent store of a configuration, opened once."""
  return latents.LatentStore(path)


def check(config: FrozenConfigDict) -> None:
  """Checks everything that can be checked before anything compiles.

  Raises:
    InputError: model, latents, labels or sampling settings do not fit.
  """
  check_model(config)
  store = open_store(config.latents.path)
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
  if len(store) < config.batch_size:
    raise InputError(
      f"{store.path} has {len(store)} latents, fewer than one batch of {config.batch_size}; lower "
      "config.batch_size."
    )


def check_model(config: FrozenConfigDict) -> None:
  """Raises InputError for what cannot be built or run: the part of `check` without latents."""
  functional.outline(build_model(config), "config.model")
  make_optimizer(config.optimizer)
  check_sampling(config.sample, config.model)


def check_sampling(sample: FrozenConfigDict, model: FrozenConfigDict) -> None:
  """Raises InputError for sampling settings that cannot work with this model."""
  if sample.method not in sampling.METHODS:
    raise InputError(
      f"config.sample.method is {sample.method!r}; choose one of {sampling.METHODS}."
    )
  if sample.batch_size < 1:
    raise InputError(f"config.sample.batch_size is {sample.batch_size}; at least 1 is needed.")
  if sample.num_steps < 2:
    raise InputError(f"config.sample.num_steps is {sample.num_steps}; at least 2 are needed.")
  if not 0 <= sample.cfg_channels <= model.in_channels:
    raise InputError(
      f"config.sample.cfg_channels is {sample.cfg_channels}; the latents have {model.in_channels} "
      "channels, 0 means all of them."
    )
  if not model.class_dropout_prob and sample.cfg_scale != 1 and sample.cfg_interval_start < 1:
    raise InputError(
      f"config.sample.cfg_scale is {sample.cfg_scale}, but a model trained with "
      "config.model.class_dropout_prob=0 knows no unconditional velocity; set the scale to 1."
    )


def init_state(config: FrozenConfigDict, key: jax.Array) -> State:
  """A fresh model and optimizer."""
  params = functional.init(build_model(config), key)
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=start_ema(params, config.optimizer.ema_decay),
    optimizer=make_optimizer(config.optimizer).init(params),
  )


def load_frozen(config: FrozenConfigDict) -> Any:
  """Nothing: the step sees normalised latents only."""
  del config
  return {}


def phase(config: FrozenConfigDict, step: int) -> str:
  """All steps are alike."""
  del config, step
  return "diffusion"


def train_step(
  config: FrozenConfigDict, phase: str, state: State, frozen: Any, batch: Any, key: jax.Array
) -> tuple[State, Metrics]:
  """One update.

  Args:
    config: the whole configuration.
    phase: from `phase`.
    state: from `init_state`.
    frozen: from `load_frozen`.
    batch: {"latent": float32 [B, h, w, Z] normalised, "label": int32 [B]}.
    key: of times, noise and dropped labels.

  Returns:
    (new state, scalar metrics); "mse" is what the reference logs as its training loss.
  """
  del frozen, phase
  latent, label = batch["latent"], batch["label"]
  key_time, key_noise, key_drop = jax.random.split(key, 3)
  t_B = transport.sample_time(key_time, len(latent), use_lognorm=config.transport.use_lognorm)
  noise = jax.random.normal(key_noise, latent.shape)
  dropped_B = jax.random.bernoulli(key_drop, config.model.class_dropout_prob, label.shape)
  label = jnp.where(dropped_B, config.model.num_classes, label)
  return update(config, state, latent, noise, t_B, label)


def update(
  config: FrozenConfigDict,
  state: State,
  latent_BhwZ: jax.Array,
  noise_BhwZ: jax.Array,
  t_B: jax.Array,
  label_B: jax.Array,
) -> tuple[State, Metrics]:
  """`train_step` once everything random is drawn."""
  graph = functional.graph_of(build_model(config))
  x_t = transport.interpolate(latent_BhwZ, noise_BhwZ, t_B)
  target = transport.velocity(latent_BhwZ, noise_BhwZ)

  def loss_fn(params: Any) -> tuple[jax.Array, Metrics]:
    parts = transport.velocity_losses(nnx.merge(graph, params)(x_t, t_B, label_B), target)
    loss = parts["mse"] + (parts["cosine"] if config.transport.use_cosine_loss else 0.0)
    return loss, {"loss": loss, **parts}

  grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params)
  updates, optimizer = make_optimizer(config.optimizer).update(grads, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  new = State(
    step=state.step + 1,
    params=params,
    ema=update_ema(state.ema, params, config.optimizer.ema_decay),
    optimizer=optimizer,
  )
  return new, {**metrics, "grad_norm": optax.tree.norm(grads)}


def train_data(
  config: FrozenConfigDict, process_index: int, process_count: int
) -> grain.IterDataset:
  """This process's endless batches of normalised latents."""
  store = open_store(config.latents.path)
  mean, std = latents.statistics(store, latent_norm=config.latents.latent_norm)
  return latents.training_batches(
    store,
    batch_size=config.batch_size // process_count,
    seed=config.seed,
    mean=mean,
    std=std,
    multiplier=config.latents.latent_multiplier,
    process_index=process_index,
    process_count=process_count,
  )


def sample_latents(
  config: FrozenConfigDict,
  params: Any,
  index_B: jax.Array,
  label_B: jax.Array,
  *,
  seed: int,
  sample: FrozenConfigDict,
) -> jax.Array:
  """Normalised latents of samples by their index; pure and jittable.

  Args:
    config: the training's configuration.
    params: usually the EMA.
    index_B: int32, each sample's place in the set.
    label_B: int32.
    seed: of the set.
    sample: the sampling settings, as `config.sample`.

  Returns:
    float32 [B, h, w, Z].
  """
  model = nnx.merge(functional.graph_of(build_model(config)), params)
  size, channels = config.model.input_size, config.model.in_channels
  velocity = sampling.guided(
    model,
    label_B,
    config.model.num_classes,
    cfg_scale=sample.cfg_scale,
    cfg_interval_start=sample.cfg_interval_start,
    cfg_channels=sample.cfg_channels,
  )
  return sampling.sample_ode(
    velocity,
    sampling.noise_of(seed, index_B, (size, size, channels)),
    num_steps=sample.num_steps,
    method=sample.method,
    timestep_shift=sample.timestep_shift,
  )


def evaluators(config: FrozenConfigDict) -> dict[str, Any]:
  """None of its own: latents show nothing, and decoding them takes a tokenizer's checkpoint."""
  del config
  return {}
