"""The diffusion task: LightningDiT on stored latents as one pure step; paper section 5.

Reference: `train.py`. Parameters, EMA, optimizer and losses are float32, matmuls `config.dtype`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from lightningdit_jax import sampling, transport
from lightningdit_jax.checks import check_model, check_store
from lightningdit_jax.model import build_model
from lightningdit_jax.store import latents
from lightningdit_jax.store.fetching import open_store
from vavae_jax.common import functional, mesh, optimizer
from vavae_jax.common.batches import in_shares
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import State, averaged, mean_gradients
from vavae_jax.common.sharding import whole
from vavae_jax.data import order

if TYPE_CHECKING:
  import grain  # which takes half a second

Metrics = dict[str, jax.Array]
VALIDATION_TIMES = 8
VALIDATION_SEED = 0


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
  """Which times `step` draws: logit-normal ones may end at a step, as in the 800-epoch recipe."""
  until = config.transport.lognorm_until
  is_lognorm = config.transport.use_lognorm and (not until or step <= until)
  return "logit-normal" if is_lognorm else "uniform"


def train_step(
  config: FrozenConfigDict, phase: str, state: State, frozen: Any, batch: Any, key: jax.Array
) -> tuple[State, Metrics]:
  """One update; of the scalar metrics "mse" is what the reference logs as its training loss.

  A batch is {"latent": float32 [B, h, w, Z] normalised, "label": int32 [B]}; the key is of times,
  noise and dropped labels.
  """
  del frozen
  latent, label = batch["latent"], batch["label"]
  key_time, key_noise, key_drop = jax.random.split(key, 3)
  settings = config.transport
  t_B = transport.sample_time(
    key_time,
    len(latent),
    use_lognorm=phase == "logit-normal",
    shifted_mu=settings.shifted_mu,
    partial_train=settings.partial_train,
    partial_ratio=settings.partial_ratio,
    interval=transport.interval(
      settings.path_type, settings.prediction, settings.train_eps, training=True
    ),
  )
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
  """`train_step` once everything random is drawn: the same in any number of parts."""

  def loss_fn(params: Any, part: tuple[jax.Array, ...]) -> tuple[jax.Array, Metrics]:
    metrics = {name: jnp.mean(loss) for name, loss in losses(config, params, *part).items()}
    loss = metrics["mse"]
    if config.transport.use_cosine_loss:
      loss += metrics["cosine"]
    return loss, {"loss": loss, **metrics}

  batch = (latent_BhwZ, noise_BhwZ, t_B, label_B)
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
) -> Metrics:
  """Per-sample losses [B], by `transport.losses`."""
  model = nnx.merge(functional.graph_of(build_model(config)), params)
  settings = config.transport
  x_BhwZ = transport.interpolate(latent_BhwZ, noise_BhwZ, t_B, settings.path_type)
  return transport.losses(
    model(x_BhwZ, t_B, label_B),
    latent_BhwZ,
    noise_BhwZ,
    t_B,
    path=settings.path_type,
    prediction=settings.prediction,
    loss_weight=settings.loss_weight,
  )


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
  return {"validation": (config.evaluate_every_steps, validation(config))}


def figures(config: FrozenConfigDict) -> list[str]:
  """The names of all numbers that `evaluators` give."""
  if not config.latents.valid_path:
    return []
  directed = transport.PREDICTIONS[config.transport.prediction].has_direction
  places = ["", *(f"_t{t:.2f}" for t in validation_times(config))]
  return [f"validation/{x}{at}" for x in ("mse", "cosine")[: 1 + directed] for at in places]


def validation_times(config: FrozenConfigDict) -> np.ndarray:
  """The times of `validation`, ascending."""
  low, high = transport.interval(
    config.transport.path_type, config.transport.prediction, config.transport.train_eps
  )
  return low + (high - low) * (np.arange(VALIDATION_TIMES) + 0.5) / VALIDATION_TIMES


def validation(config: FrozenConfigDict) -> Callable[[State], dict[str, float]]:
  """Losses of the averaged model on fixed latents, with fixed noise, on a fixed grid of times.

  Equal weights give equal numbers, whatever training drew. The result maps a state to {"mse": mean
  over all, "mse_t0.06": at the time 0.06, ...}, and "cosine" likewise if the loss has it.
  """
  store = open_store(config.latents.valid_path, config.latents.cache)
  # Normalised as training does it.
  mean, std = latents.statistics(
    open_store(config.latents.path, config.latents.cache), latent_norm=config.latents.latent_norm
  )
  count = min(config.latents.valid_samples, len(store))
  times = validation_times(config)
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  size = -(-min(config.batch_size // config.accumulate_steps, count) // devices.size)

  def load(rows: np.ndarray) -> dict[str, np.ndarray]:
    records = [store[int(i)] for i in rows]
    latent = np.stack([record["latent"] for record in records])
    return {
      "latent": latents.normalise(latent, mean, std, config.latents.latent_multiplier),
      "label": np.asarray([record["label"] for record in records], np.int32),
      "index": rows.astype(np.int32),
    }

  @jax.jit
  def losses_of(params: Any, t: jax.Array, batch: dict[str, jax.Array]) -> Metrics:
    latent = batch["latent"]
    noise = sampling.noise_of(VALIDATION_SEED, batch["index"], latent.shape[1:])
    found = losses(config, params, latent, noise, jnp.full(len(latent), t), batch["label"])
    return jax.tree.map(whole, found)

  def evaluate(state: State) -> dict[str, float]:
    params = averaged(config.optimizer, state)
    sums: dict[str, np.ndarray] = {}

    def run(batch: dict[str, jax.Array]) -> list[Metrics]:
      return [losses_of(params, np.float32(t), batch) for t in times]

    for _, found in in_shares(run, load, count, size, devices):
      for place, at in enumerate(found):
        for name, loss_B in at.items():
          sums.setdefault(name, np.zeros(len(times)))[place] += np.sum(loss_B)
    results = {name: float(total.mean() / count) for name, total in sums.items()}
    for name, total in sums.items():
      results |= {f"{name}_t{t:.2f}": float(x / count) for t, x in zip(times, total, strict=True)}
    return results

  return evaluate
