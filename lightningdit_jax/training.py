"""The diffusion task: LightningDiT on stored latents as one pure step; paper section 5.

Reference: `train.py`. Parameters, EMA, optimizer and losses are float32, matmuls `config.dtype`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from lightningdit_jax import flow_map, routing, transport, validation
from lightningdit_jax.checks import check_model, check_store
from lightningdit_jax.model import build_model
from lightningdit_jax.store import latents
from lightningdit_jax.store.fetching import open_store
from vavae_jax.common import functional, optimizer
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import State, mean_gradients
from vavae_jax.data import order

if TYPE_CHECKING:
  import grain  # which takes half a second

Metrics = dict[str, jax.Array]


def check(config: FrozenConfigDict) -> None:
  """Raises InputError for model, latents, labels or sampling settings that do not fit."""
  check_model(config)
  store = open_store(config.latents.path, config.latents.cache)
  check_store(config, store)
  if len(store) < config.batch_size:
    raise InputError(
      f"{store.path} has {len(store)} latents, fewer than one batch of {config.batch_size}; lower "
      "config.batch_size."
    )
  if config.latents.valid_path:
    check_store(config, open_store(config.latents.valid_path, config.latents.cache))


def init_state(config: FrozenConfigDict, key: jax.Array) -> State:
  """A fresh model and optimizer."""
  return optimizer.start(config.optimizer, functional.init(build_model(config), key))


def load_frozen(config: FrozenConfigDict) -> Any:
  """Nothing: the step sees normalised latents only."""
  del config
  return {}


def phase(config: FrozenConfigDict, step: int) -> str:
  """Which times `step` draws: logit-normal ones may end at a step, as in the 800-epoch recipe, and
  so may a route for tokens.
  """
  until = config.transport.lognorm_until
  is_lognorm = config.transport.use_lognorm and (not until or step <= until)
  times = "logit-normal" if is_lognorm else "uniform"
  return times + ", routed" * routing.lasts(config, step)


def train_step(
  config: FrozenConfigDict, phase: str, state: State, frozen: Any, batch: Any, key: jax.Array
) -> tuple[State, Metrics]:
  """One update; of the scalar metrics "mse" is what the reference logs as its training loss.

  A batch is {"latent": float32 [B, h, w, Z] normalised, "label": int32 [B]}; the key is of times,
  noise, dropped labels and tokens.
  """
  del frozen
  latent, label = batch["latent"], batch["label"]
  key_time, key_noise, key_drop = jax.random.split(key, 3)
  settings = config.transport
  t_B = transport.sample_time(
    key_time,
    len(latent),
    use_lognorm="logit-normal" in phase,
    shifted_mu=settings.shifted_mu,
    lognorm_sigma=settings.lognorm_sigma,
    partial_train=settings.partial_train,
    partial_ratio=settings.partial_ratio,
    interval=transport.interval(
      settings.path_type, settings.prediction, settings.train_eps, training=True
    ),
  )
  noise = jax.random.normal(key_noise, latent.shape)
  dropped_B = jax.random.bernoulli(key_drop, config.model.class_dropout_prob, label.shape)
  label = jnp.where(dropped_B, config.model.num_classes, label)
  kept_BN = routing.drawn(config, key, len(latent)) if "routed" in phase else None
  steps = flow_map.drawn(config, key, latent.shape) if config.model.dmf_depth else None
  return update(config, state, latent, noise, t_B, label, kept_BN, steps)


def update(
  config: FrozenConfigDict,
  state: State,
  latent_BhwZ: jax.Array,
  noise_BhwZ: jax.Array,
  t_B: jax.Array,
  label_B: jax.Array,
  kept_BN: jax.Array | None = None,
  steps: flow_map.Steps | None = None,
) -> tuple[State, Metrics]:
  """`train_step` once everything random is drawn: the same in any number of parts."""

  def loss_fn(params: Any, part: tuple[Any, ...]) -> tuple[jax.Array, Metrics]:
    found = losses(config, params, *part[:-1], steps=part[-1])
    metrics = {name: jnp.mean(loss) for name, loss in found.items()}
    loss = metrics["mse" if steps is None else "cauchy"]
    if config.transport.use_cosine_loss:
      loss += metrics["cosine"]
    if config.model.early_head:
      loss += config.transport.early_weight * metrics["early_mse"]
    return loss, {"loss": loss, **metrics}

  batch = (latent_BhwZ, noise_BhwZ, t_B, label_B, kept_BN, steps)
  grads, metrics = mean_gradients(loss_fn, state.params, batch, config.accumulate_steps)
  new = optimizer.step(config.optimizer, state, grads)
  return new, metrics | {"grad_norm": optax.tree.norm(grads)}


def losses(
  config: FrozenConfigDict,
  params: Any,
  latent_BhwZ: jax.Array,
  noise_BhwZ: jax.Array,
  t_B: jax.Array,
  label_B: jax.Array,
  kept_BN: jax.Array | None = None,
  *,
  steps: flow_map.Steps | None = None,
) -> Metrics:
  """Per-sample losses [B], by `transport.losses`; `routing` leads all but `kept_BN` around.

  "early_mse" is of the early head, if there is one. With `steps`, by `flow_map.losses`.
  """
  if steps is not None:
    points = (latent_BhwZ, noise_BhwZ, t_B, label_B)
    return flow_map.losses(config, flow_map.networks(config, params), *points, steps)
  model = nnx.merge(functional.graph_of(build_model(config)), params)
  settings = config.transport
  x_BhwZ = transport.interpolate(latent_BhwZ, noise_BhwZ, t_B, settings.path_type)
  of = functools.partial(
    transport.losses,
    latent_BhwZ=latent_BhwZ,
    noise_BhwZ=noise_BhwZ,
    t_B=t_B,
    path=settings.path_type,
    prediction=settings.prediction,
    loss_weight=settings.loss_weight,
  )
  if not config.model.early_head:
    return of(model(x_BhwZ, t_B, label_B, routing.of(config, kept_BN)))
  early, last = model.both(x_BhwZ, t_B, label_B)
  return of(last) | {"early_mse": of(early)["mse"]}


def data_source(config: FrozenConfigDict) -> str:
  """Where the latents are, for messages."""
  return config.latents.path


def train_data(config: FrozenConfigDict, rows: np.ndarray | None, start: int) -> grain.IterDataset:
  """Endless batches of normalised latents, of each these rows (`order.Share`)."""
  store = open_store(config.latents.path, config.latents.cache)
  mean, std = latents.statistics(store, latent_norm=config.latents.latent_norm)
  return latents.training_batches(
    store,
    order.Share(config.batch_size, rows, start, **config.loader),
    seed=config.seed,
    mean=mean,
    std=std,
    multiplier=config.latents.latent_multiplier,
  )


def evaluators(config: FrozenConfigDict) -> dict[str, Any]:
  """Losses of held-out latents, where `config.latents.valid_path` names some."""
  if not config.latents.valid_path:
    return {}
  return {"validation": (config.evaluate_every_steps, validation.evaluator(config, losses))}


def figures(config: FrozenConfigDict) -> list[str]:
  """The names of all numbers that `evaluators` give."""
  if not config.latents.valid_path:
    return []
  names = ["mse", *(["early_mse"] if config.model.early_head else [])]
  if transport.PREDICTIONS[config.transport.prediction].has_direction:
    names.append("cosine")
  places = ["", *(f"_t{t:.2f}" for t in validation.times(config))]
  return [f"validation/{x}{at}" for x in names for at in places]
