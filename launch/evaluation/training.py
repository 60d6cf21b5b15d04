"""What a training shows, measures and writes on its way: samples, a distance, model folders.

All processes of a job come here alike; the first one's results count.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from launch import export, restore
from launch.engine import console, processes
from launch.engine.evaluators import Evaluator, Results, best_step
from launch.engine.log import NotFinite
from launch.engine.parts import Parts
from launch.engine.writers import read_metrics
from launch.evaluation import drawn, probe
from launch.evaluation.features import EFFICIENTNET, load_network
from launch.evaluation.pictures import own_pictures
from launch.evaluation.reference import Reference, compiled, kept_gaussian
from launch.evaluation.sample_files import contact_sheet
from launch.evaluation.statistics import Part
from launch.sample import Sampler, make_sampler
from lightningdit_jax.pipeline import Pipeline
from lightningdit_jax.store import space
from lightningdit_jax.store.latents import LatentStore
from vavae_jax import folder
from vavae_jax.common import mesh
from vavae_jax.common.batches import Batches
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, is_url
from vavae_jax.common.optimizer import averaged
from vavae_jax.data import selection
from vavae_jax.metrics.distribution import Gaussian, Moments
from vavae_jax.tokenizer import Tokenizer

PICTURE_SAMPLES = 36
REFERENCE_PICTURES = 10_000
REFERENCE = "reference.npz"  # in the workdir
FEATURES_AT_ONCE = 50  # pictures on each device


def samples(config: FrozenConfigDict, store: LatentStore, workdir: Path) -> dict[str, Evaluator]:
  """Samples of the EMA as one picture and, if asked, their Frechet distance to training pictures.

  Always from the same noise; none where the tokenizer is gone.
  """
  if not config.evaluate_every_steps:
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
  total = max(PICTURE_SAMPLES, config.evaluate_samples)
  size = min(config.sample.batch_size, -(-total // devices.size))
  settings = FrozenConfigDict(config.sample.to_dict() | {"batch_size": size})
  sampler = make_sampler(
    config, space.Space.of(store), tokenizer.on(devices), settings, seed=0, devices=devices
  )
  distance = None
  if config.evaluate_samples:
    distance = _Distance(tokenizer, config.evaluate_samples, workdir / REFERENCE)
  about = [total, settings.to_dict(), tokenizer.sha256, distance and distance.network.about]

  def show(state: Any) -> Iterator[Results | None]:
    params = averaged(config.optimizer, state)
    kind = f".{drawn.identity(params, about)}.safetensors"
    parts = Parts(workdir / "samples.parts", total, size, kind)
    sample = functools.partial(_labelled, sampler, params, config.model.num_classes, total)
    keep = distance.features if distance else lambda _: {}
    try:
      found = yield from drawn.draw(sample, keep, parts, devices, PICTURE_SAMPLES)
      pictures = np.concatenate(list(drawn.in_order(found, drawn.SHOWN, PICTURE_SAMPLES)))
      yield {"grid": contact_sheet(pictures)} | (distance.of(found) if distance else {})
    except NotFinite as error:  # training goes on: its own numbers are watched by the loop
      console.say(f"warning: {error}")
      yield {}
    drawn.remove(parts.folder)

  return {"samples": (config.evaluate_every_steps, show)}


def _labelled(
  sampler: Sampler, params: Any, classes: int, total: int, index_B: np.ndarray
) -> np.ndarray:
  """The samples of these of `total` indices, of all classes in turn, or of some from all over."""
  few = total < classes
  return sampler(params, index_B, index_B * classes // total if few else index_B % classes)


def probes(config: FrozenConfigDict, workdir: Path) -> dict[str, Evaluator]:
  """Where `config.evaluate_probe` says so, a probe of the averaged tokenizer's generation.

  Its judge is EfficientNet-Lite0, with pictures that the tokenizer sees.
  """
  if not (config.get("evaluate_probe") and config.evaluate_every_steps):
    return {}
  probe.check(min(config.evaluate_probe, len(selection.share(config.data, held_out=False))))
  network, of = load_network(EFFICIENTNET), _averaged(config, workdir)

  def run(state: Any) -> Results:
    tokenizer = of(state)
    real = own_pictures(tokenizer, held_out=False, limit=REFERENCE_PICTURES)
    gaussian = kept_gaussian(real, network, workdir / REFERENCE)
    reference = Reference(real.about, {"pool": gaussian} if gaussian else {}, len(real))
    parts, count = workdir / f"probe.{tokenizer.sha256[:16]}", config.evaluate_probe
    try:
      found = probe.measure(tokenizer, parts, probe.Judge(network, reference), count=count)
    except NotFinite as error:  # of the small model
      console.say(f"warning: {error}")
      found = {}
    drawn.remove(parts)
    return found

  return {"probe": (config.evaluate_every_steps, run)}


def _averaged(config: FrozenConfigDict, workdir: Path) -> Callable[[Any], restore.Trained]:
  """A function from a state to its averaged model, which every process has."""
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  whole = jax.jit(lambda params: params, out_shardings=mesh.replicated(devices))
  decay = (*config.optimizer.ema_decays, 0.0)[0]

  def of(state: Any) -> restore.Trained:
    params = jax.tree.map(lambda x: x.addressable_data(0), whole(averaged(config.optimizer, state)))
    return restore.Trained(workdir, config, int(state.step), params, decay)

  return of


def exports(config: FrozenConfigDict, workdir: Path) -> dict[str, Evaluator]:
  """Writes the averaged weights as a model folder, where `config.export` says so."""
  if not config.get("export"):
    return {}
  if config.export == "best" and not (config.keep_best and config.evaluate_every_steps):
    raise InputError(
      'config.export is "best", which needs config.keep_best, the metric to choose by, and '
      "config.evaluate_every_steps."
    )
  tokenizer = None
  if config.task == "diffusion":
    found = restore.tokenizer_of_latents(restore.check_latents(config), config.tokenizer)
    tokenizer = found.on(mesh.local_mesh())
  of = _averaged(config, workdir)

  def is_best(step: int) -> bool:
    steps = [line["step"] for line in read_metrics(workdir)]
    return best_step(workdir, config.keep_best, steps) == step

  def write(state: Any) -> Results:
    step = int(state.step)
    if config.export == "best" and not processes.first_does(functools.partial(is_best, step)):
      return {}
    trained = of(state)
    if jax.process_index() == 0:
      model = restore.for_use(trained, tokenizer)
      try:
        _export(model, workdir)
      except InputError as error:  # the training itself is sound
        console.say(f"warning: no model folder was written: {error}")
    processes.wait_for_all()
    return {}

  every = config.evaluate_every_steps if config.export == "best" else config.num_steps
  return {"export": (every, write)}


def _export(model: Pipeline | Tokenizer, workdir: Path) -> None:
  """Writes the folder "model" of a workdir; in a bucket config.json, by which it is one, last."""
  if not is_url(workdir):
    export.export(model, workdir / "model", workdir=workdir)
    return
  with tempfile.TemporaryDirectory() as name:
    made, target = Path(name) / "model", workdir / "model"
    export.export(model, made, workdir=workdir)
    (target / folder.CONFIG).unlink(missing_ok=True)
    for path in sorted(made.iterdir(), key=lambda path: path.name == folder.CONFIG):
      with path.open("rb") as source, atomic_file(target / path.name) as file:
        shutil.copyfileobj(source, file)


class _Distance:
  """FD-EfficientNet of few samples to pictures that the tokenizer saw, to compare steps by.

  Few samples bias it upwards, so it compares only with sets of the same size.
  """

  def __init__(self, tokenizer: restore.Trained, count: int, path: Path):
    """The statistics of the pictures, which one start computes, stay in the file `path`."""
    # What is not there is missed now, not at the first evaluation.
    self.network = load_network(EFFICIENTNET)
    self._real = own_pictures(tokenizer, held_out=False, limit=REFERENCE_PICTURES)
    self._count, self._path = count, path

  @functools.cached_property
  def _reference(self) -> Gaussian | None:
    """In the first process."""
    return kept_gaussian(self._real, self.network, self._path)

  @functools.cached_property
  def _run(self) -> Callable[[np.ndarray], Iterator[Part]]:
    """Pictures to their features, by this process's devices."""
    devices = mesh.local_mesh()
    params = jax.device_put(self.network.params, mesh.replicated(devices))
    run = Batches(compiled(self.network, False), FEATURES_AT_ONCE, devices, console.say_here)
    return lambda image: run({"image": image}, params)

  def features(self, pictures: np.ndarray) -> dict[str, np.ndarray]:
    """Those of some samples, [n, F]."""
    return {"pool": np.concatenate([part.moments["pool"] for part in self._run(pictures)])}

  def of(self, found: drawn.Drawn) -> dict[str, float]:
    """That of the samples that all processes have."""
    reference, moments = self._reference, Moments()
    for features in drawn.in_order(found, "pool", self._count):
      if reference:
        moments.update(features)
    if not reference:
      return {}
    return {self.network.key: reference.distance(moments.mean, moments.cov).distance}
