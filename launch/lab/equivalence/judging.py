"""Weights judged by either side's code, for `launch.lab.equivalence training`.

Losses of the average on held-out latents at `validation.times`, its norm, and samples,
all with the same noise, whose distance to the latents that are trained on is taken here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from launch import restore
from launch.lab.equivalence import handover
from launch.lab.equivalence.pieces import Settings, ask, job_of
from lightningdit_jax import convert, sampling, training, validation
from lightningdit_jax.model import build_model
from lightningdit_jax.store import latents
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common import functional
from vavae_jax.common.files import atomic_file, write_json
from vavae_jax.common.optimizer import State, ema_name
from vavae_jax.data.order import spread
from vavae_jax.metrics.distribution import Gaussian, Moments
from vavae_jax.weights.state_dicts import read_content
from vavae_jax.weights.torch_writer import write_torch_file

SAMPLE_SEED = 0


def inputs(settings: Settings, output: Path) -> None:
  """What all weights are judged on: held-out latents with noise and times, noise of samples."""
  config = settings.config
  shape = (config.model.input_size,) * 2 + (config.model.in_channels,)
  held_out = LatentStore(settings.root / "held_out")
  chosen = spread(len(held_out), config.latents.valid_samples)
  every = np.arange(settings.experiment.num_samples)
  noise = [
    np.moveaxis(np.asarray(sampling.noise_of(seed, jnp.asarray(rows), shape)), -1, 1)
    for seed, rows in ((validation.SEED, np.arange(len(chosen))), (SAMPLE_SEED, every))
  ]
  arrays = {
    "latent": np.moveaxis(_normalised(settings, held_out, chosen), -1, 1),
    "label": held_out.labels_of(chosen).astype(np.int64),
    "noise": noise[0],
    "t": validation.times(config).astype(np.float32),
    "sample_noise": noise[1],
    "sample_label": every % config.model.num_classes,
  }
  np.savez(output, **arrays)


def judged_by_ours(settings: Settings, output: Path, *, weights: str, count: int = 0) -> None:
  """Losses and samples of weights, a workdir of ours or a checkpoint of theirs, by our code.

  `count` is the number of samples; 0: as many as `settings` say.
  """
  config = settings.config
  params = _average(settings, Path(weights))
  state = State(jnp.zeros(()), params, {ema_name(config.optimizer.ema_decays[0]): params}, None)
  losses = validation.evaluator(config, training.losses)(state)
  times = [f"_t{t:.2f}" for t in validation.times(config)]
  found = {kind: np.array([losses[kind + t] for t in times]) for kind in ("mse", "cosine")}
  index = np.arange(count or settings.experiment.num_samples, dtype=np.int32)
  label, size = index % config.model.num_classes, config.sample.batch_size
  for name, scale in (("plain", 1.0), ("guided", config.sample.cfg_scale)):
    sample = FrozenConfigDict(config.sample.to_dict() | {"cfg_scale": scale})
    draw = functools.partial(sampling.sample_latents, config, seed=SAMPLE_SEED, sample=sample)
    run = jax.jit(lambda params, index, label, draw=draw: draw(params, index, label))
    parts = [run(params, index[i : i + size], label[i : i + size]) for i in index[::size]]
    found[name] = np.moveaxis(np.concatenate([np.asarray(x) for x in parts]), -1, 1)
  _figures(settings, output, found, params)


def judged_by_theirs(settings: Settings, output: Path, *, weights: str, count: int = 0) -> None:
  """The same by the reference's code."""
  path, params = Path(weights), _average(settings, Path(weights))
  if path.is_dir():
    path = output.with_suffix(".pt")
    module = functional.graph_of(build_model(settings.config))
    write_torch_file(path, convert.to_torch(nnx.merge(module, jax.device_get(params))))
  names = ("num_steps", "method", "atol", "rtol", "timestep_shift", "cfg_scale")
  sample = settings.config.sample
  job = job_of(settings, 1) | {
    "weights": str(path),
    "sample": {name: sample[name] for name in (*names, "cfg_interval_start")},
    "batch_size": sample.batch_size,
    "count": count or settings.experiment.num_samples,
    "inputs": str(settings.root / "inputs.npz"),
    "outputs": str(output.with_suffix(".there.npz")),
  }
  ask("judging.py", settings, job)
  with np.load(job["outputs"]) as file:
    found = {name: file[name] for name in file.files}
  _figures(settings, output, found, params)


def _figures(settings: Settings, output: Path, found: dict[str, Any], params: Any) -> None:
  """Writes the figures of weights, and the samples beside them."""
  np.savez(output.with_suffix(".npz"), **{name: found[name] for name in ("plain", "guided")})
  distances = {name: distance(settings, found[name]) for name in ("plain", "guided")}
  squares = (np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(params))
  figures = {name: found[name].tolist() for name in ("mse", "cosine")}
  write_json(output, figures | distances | {"norm": float(np.sqrt(sum(squares)))})


def real(settings: Settings, output: Path) -> None:
  """The distance of held-out latents, as many as there are samples or fewer."""
  store = LatentStore(settings.root / "held_out")
  index = np.arange(min(settings.experiment.num_samples, len(store)))
  found = distance(settings, np.moveaxis(_normalised(settings, store, index), -1, 1))
  write_json(output, {"distance": found, "count": len(index)})


def distance(settings: Settings, latent_NZhw: np.ndarray) -> float:
  """The Frechet distance of normalised latents to those that are trained on."""
  gaussian, moments = _gaussian(settings), Moments()
  moments.update(latent_NZhw.reshape(len(latent_NZhw), -1))
  return float(gaussian.distance(moments.mean, moments.cov).distance)


def _gaussian(settings: Settings) -> Gaussian:
  """That of the latents that are trained on, normalised, all cells of a picture together."""
  store = LatentStore(settings.root / "latents")
  path = settings.root / f"moments_{store.sha256[:16]}.npz"
  if not path.exists():
    moments = Moments()
    for rows in np.array_split(np.arange(len(store)), -(-len(store) // 5_000)):
      latent = np.moveaxis(_normalised(settings, store, rows), -1, 1)
      moments.update(latent.reshape(len(rows), -1))
    with atomic_file(path) as file:  # several jobs may want it at once
      np.savez(file, mean=moments.mean, cov=moments.cov)
  with np.load(path) as stored:
    return Gaussian(stored["mean"], stored["cov"])


def _normalised(settings: Settings, store: LatentStore, rows: np.ndarray) -> np.ndarray:
  """Records of a store [N,h,w,Z], scaled as training scales them."""
  trained, given = LatentStore(settings.root / "latents"), settings.config.latents
  out = np.empty((len(rows), *store.shape), np.float32)
  store.read(rows, np.zeros(len(rows), bool), out=out)
  mean, std = latents.statistics(trained, latent_norm=given.latent_norm)
  return latents.normalise(out, mean, std, given.latent_multiplier).astype(np.float32)


def _average(settings: Settings, path: Path) -> Any:
  """The averaged weights of a workdir of ours, or of a checkpoint of the reference."""
  if path.is_dir():
    return restore.load(path, "diffusion").params
  return handover.params_of(read_content(path)["ema"], settings.config)
