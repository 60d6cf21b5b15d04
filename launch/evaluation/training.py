"""What a training shows, measures and writes on its way: samples, a distance, model folders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import FrozenConfigDict

from launch import export, restore
from launch.engine import console
from launch.engine.evaluators import Evaluator, best_step
from launch.engine.log import NotFinite
from launch.engine.writers import read_metrics
from launch.evaluation.features import EFFICIENTNET, load_network
from launch.evaluation.pictures import Array, own_pictures
from launch.evaluation.reference import gaussian_of, statistics_of
from launch.evaluation.sample_files import contact_sheet
from launch.sample import make_sampler
from lightningdit_jax.store import space
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url
from vavae_jax.common.optimizer import averaged
from vavae_jax.metrics.distribution import Gaussian

PICTURE_SAMPLES = 36
REFERENCE_PICTURES = 10_000


def samples(config: FrozenConfigDict, store: LatentStore) -> dict[str, Evaluator]:
  """Samples of the EMA as one picture and, if asked, their Frechet distance to training pictures.

  Always from the same noise; none where the tokenizer is gone.
  """
  if not config.evaluate_every_steps:
    return {}
  if jax.process_count() > 1:
    console.say("training shows no samples: with several processes it cannot sample yet")
    return {}
  try:
    tokenizer = restore.tokenizer_of_latents(store, config.tokenizer)
  except InputError as error:
    if config.tokenizer or config.evaluate_samples:
      raise
    # Latents outlive their tokenizer's workdir, and training needs nothing but latents.
    console.say(f"training shows no samples: {error}")
    return {}
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  known = space.Space.of(store)
  sampler = make_sampler(config, known, tokenizer, config.sample, seed=0, devices=devices)
  distance = _distance(config, tokenizer) if config.evaluate_samples else None
  index = np.arange(max(PICTURE_SAMPLES, config.evaluate_samples))
  label = index % config.model.num_classes

  def show(state: Any) -> dict[str, Any]:
    try:
      pictures = sampler(averaged(config.optimizer, state), index, label)
    except NotFinite as error:  # training goes on: its own numbers are watched by the loop
      console.say(f"warning: {error}")
      return {}
    result = {"grid": contact_sheet(pictures[:PICTURE_SAMPLES])}
    return result | (distance(pictures) if distance else {})

  return {"samples": (config.evaluate_every_steps, show)}


def exports(config: FrozenConfigDict, workdir: Path) -> dict[str, Evaluator]:
  """Writes the averaged weights as a model folder, where `config.export` says so."""
  if not config.get("export"):
    return {}
  if config.export == "best" and not (config.keep_best and config.evaluate_every_steps):
    raise InputError(
      'config.export is "best", which needs config.keep_best, the metric to choose by, and '
      "config.evaluate_every_steps."
    )
  if is_url(workdir):
    raise InputError(
      f"config.export writes folders of this machine, but {workdir} is in a bucket; leave it "
      "empty, and use python -m launch.export when the training has ended."
    )
  tokenizer = None
  if config.task == "diffusion":
    found = restore.tokenizer_of_latents(restore.check_latents(config), config.tokenizer)
    tokenizer = found.on(mesh.local_mesh())
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  whole = jax.jit(lambda params: params, out_shardings=mesh.replicated(devices))
  decay = (*config.optimizer.ema_decays, 0.0)[0]

  def write(state: Any) -> dict[str, Any]:
    step = int(state.step)
    if config.export == "best":
      steps = [line["step"] for line in read_metrics(workdir)]
      is_best = np.array(best_step(workdir, config.keep_best, steps) == step)
      if jax.process_count() > 1:  # the first one writes the metrics, perhaps to its own disk
        is_best = multihost_utils.broadcast_one_to_all(is_best)
      if not is_best:
        return {}
    params = jax.tree.map(lambda x: x.addressable_data(0), whole(averaged(config.optimizer, state)))
    trained = restore.Trained(workdir, config, step, params, decay)
    if jax.process_index() == 0:
      model = restore.for_use(trained, tokenizer)
      samples = 0 if jax.process_count() > 1 else export.SAMPLES
      try:
        export.export(model, Path(workdir) / "model", workdir=workdir, samples=samples)
      except InputError as error:  # the training itself is sound
        console.say(f"warning: no model folder was written: {error}")
    return {}

  every = config.evaluate_every_steps if config.export == "best" else config.num_steps
  return {"export": (every, write)}


def _distance(
  config: FrozenConfigDict, tokenizer: restore.Trained
) -> Callable[[np.ndarray], dict[str, float]]:
  """FD-EfficientNet of few samples to pictures that the tokenizer saw, to compare steps by.

  Few samples bias it upwards, so it compares only with sets of the same size.
  """
  # What is not there is missed now, not at the first evaluation.
  network = load_network(EFFICIENTNET)
  real = own_pictures(tokenizer, held_out=False, limit=REFERENCE_PICTURES)

  @functools.cache
  def reference() -> Gaussian:
    return gaussian_of(statistics_of(real, network, "reference"))

  def distance(pictures: np.ndarray) -> dict[str, float]:
    drawn = Array(pictures[: config.evaluate_samples])
    moments = statistics_of(drawn, network, "samples").moments["pool"]
    return {network.key: reference().distance(moments.mean, moments.cov).distance}

  return distance
