"""Losses of held-out latents while LightningDiT trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from lightningdit_jax import sampling, transport
from lightningdit_jax.store import latents
from lightningdit_jax.store.fetching import open_store
from vavae_jax.common import mesh
from vavae_jax.common.batches import in_shares
from vavae_jax.common.optimizer import State, averaged
from vavae_jax.common.sharding import whole
from vavae_jax.data.order import spread

Metrics = dict[str, jax.Array]
Losses = Callable[..., Metrics]  # `training.losses`
NUM_TIMES = 8
SEED = 0  # of the noise


def times(config: FrozenConfigDict) -> np.ndarray:
  """The times at which losses are taken, ascending."""
  low, high = transport.interval(
    config.transport.path_type, config.transport.prediction, config.transport.train_eps
  )
  return low + (high - low) * (np.arange(NUM_TIMES) + 0.5) / NUM_TIMES


def evaluator(config: FrozenConfigDict, losses: Losses) -> Callable[[State], dict[str, float]]:
  """Losses of the averaged model on fixed latents, with fixed noise, on a fixed grid of times.

  The latents are spread over the store, which is sorted by class. Equal weights give equal numbers,
  whatever training drew. The result maps a state to {"mse": mean over all, "mse_t0.06": at the time
  0.06, ...}, and other losses likewise.
  """
  store = open_store(config.latents.valid_path, config.latents.cache)
  # Normalised as training does it.
  mean, std = latents.statistics(
    open_store(config.latents.path, config.latents.cache), latent_norm=config.latents.latent_norm
  )
  chosen = spread(len(store), config.latents.valid_samples)
  count = len(chosen)
  places = times(config)
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  size = -(-min(config.batch_size // config.accumulate_steps, count) // devices.size)

  def load(rows: np.ndarray) -> dict[str, np.ndarray]:
    records = [store[int(i)] for i in chosen[rows]]
    latent = np.stack([record["latent"] for record in records])
    return {
      "latent": latents.normalise(latent, mean, std, config.latents.latent_multiplier),
      "label": np.asarray([record["label"] for record in records], np.int32),
      "index": rows.astype(np.int32),
    }

  @jax.jit
  def losses_of(params: Any, t: jax.Array, batch: dict[str, jax.Array]) -> Metrics:
    latent = batch["latent"]
    noise = sampling.noise_of(SEED, batch["index"], latent.shape[1:])
    found = losses(config, params, latent, noise, jnp.full(len(latent), t), batch["label"])
    return jax.tree.map(whole, found)

  def evaluate(state: State) -> dict[str, float]:
    params = averaged(config.optimizer, state)
    sums: dict[str, np.ndarray] = {}

    def run(batch: dict[str, jax.Array]) -> list[Metrics]:
      return [losses_of(params, np.float32(t), batch) for t in places]

    for _, found in in_shares(run, load, count, size, devices):
      for place, at in enumerate(found):
        for name, loss_B in at.items():
          sums.setdefault(name, np.zeros(len(places)))[place] += np.sum(loss_B)
    results = {name: float(total.mean() / count) for name, total in sums.items()}
    for name, total in sums.items():
      results |= {f"{name}_t{t:.2f}": float(x / count) for t, x in zip(places, total, strict=True)}
    return results

  return evaluate
