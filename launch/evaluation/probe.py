"""A probe of generation: figures in minutes of how well a tokenizer's latents will generate.

Of 10,000 pictures nine tenths are fitted and the last one is held out. A small LightningDiT, the
same for every tokenizer, is trained for a fixed budget, by the same loop as large ones, so that a
probe that was stopped goes on. Its loss and samples stand beside figures that need no training, and
beside one Gaussian for each class. launch.lab.dilemma measures which of them predict long runs.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import FrozenConfigDict

import configs.base
import lightningdit_jax.training
from launch import restore
from launch.encode import chosen_pictures, encode
from launch.engine import console, loop
from launch.engine.log import NotFinite
from launch.engine.writers import curve, read_metrics
from launch.evaluation import figures, generation, space
from launch.evaluation.cells import StoredCells
from launch.evaluation.features import Network
from launch.evaluation.figures import GAUSSIAN, Options
from launch.evaluation.gaussians import Gaussians
from launch.evaluation.output import Output
from launch.evaluation.pictures import FromSource, decoder_of, side_of
from launch.evaluation.reference import Reference, statistics_of
from launch.report.html import Section, picture_rows
from lightningdit_jax import sampling
from lightningdit_jax.store.latents import LatentStore, denormalise
from lightningdit_jax.store.space import NOTE, Space
from vavae_jax.common import mesh
from vavae_jax.common.batches import in_shares
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place, read_note
from vavae_jax.common.sharding import whole
from vavae_jax.data import sources
from vavae_jax.metrics import linear
from vavae_jax.metrics.distribution import Gaussian, Moments

# At 16 tokens a step is 10 GFLOP and a sample 0.8: together four minutes of one core.
STEPS, BATCH, WIDTH, DEPTH, TOKENS = 1_000, 128, 128, 4, 64
COUNT, SAMPLES = 10_000, 5_000
LEAST = 60  # pictures
KIND = "probe"
_OTHERS: dict[str, Any] = {
  "lowest of others": np.min,
  "median of others": np.median,
  "highest of others": np.max,
}
CELLS = 2_000  # of the t-SNE
MOST_NUMBERS = 2_048  # of a latent: of larger ones so many random directions
PIXEL_CELLS = 100_000  # whose pixels the latents are fitted by


class Judge(NamedTuple):
  """What compares samples with real pictures."""

  network: Network
  reference: Reference


def check(count: int) -> None:
  """Raises InputError for too few pictures."""
  if count < LEAST:
    raise InputError(f"A probe needs {LEAST} pictures or more, better {COUNT:,}; here are {count}.")


def measure(
  tokenizer: restore.Trained,
  folder: Path,
  judge: Judge | None,
  *,
  count: int = COUNT,
  source: str = "",
) -> dict[str, Any]:
  """All figures of a tokenizer and a sheet, "samples", in the first process; in others none.

  Args:
    folder: where latents and model are while it is at work, which all processes see; a probe that
      was stopped goes on there.
    count: pictures at most, of `source` or, if that is "", of the tokenizer's training.

  Raises:
    InputError: there are fewer than `LEAST` pictures, or the latents are no squares.
    NotFinite: the small model diverged.
  """
  data = tokenizer.config.data if source else restore.data_of(tokenizer)
  count = min(count, len(chosen_pictures(tokenizer, source)))
  check(count)
  fitted = count * 9 // 10
  places = {"fitted": range(fitted), "held_out": range(fitted, count)}
  how: dict[str, Any] = {"source": source, "max_corrupt": data.max_corrupt}
  stores = {n: encode(tokenizer, folder / n, places=x, **how) for n, x in places.items()}
  store = stores["fitted"]
  trained = _train(stores, folder)
  # A class has a Gaussian if it has two pictures.
  counts = np.bincount(store.labels)
  classes = np.flatnonzero(counts > min(1, counts.max() - 1))
  labels = classes[np.arange(SAMPLES) % len(classes)]
  latents = _sampled(trained, store, labels)
  drawn: dict[str, Any] = {"": _Samples(latents, tokenizer, store, labels)}
  if len(counts) > 1 and counts.max() > 1:
    drawn[GAUSSIAN] = Gaussians(store, tokenizer, count=SAMPLES, labels=labels, seed=0)
  values: dict[str, Any] = {}
  for before, pictures in drawn.items():
    if not judge:
      break
    found = statistics_of(pictures, judge.network, f"{before}samples", progress=folder)
    if jax.process_index() == 0:
      options = Options(precision_recall=False)
      given = (found, judge.reference, judge.network, options, pictures.classes, None)
      values |= {before + name: x for name, x in figures.generated(*given)[0].items()}
  cells = space.measure(StoredCells(store), folder, runs=1, count=CELLS, seed=0)
  if cells is None:
    return {}
  values |= figures.compute("latents", cells[0])
  values["loss"] = curve(read_metrics(trained.workdir), "validation/mse")[-1][1]
  chosen = {n: chosen_pictures(tokenizer, source, places=x) for n, x in places.items()}
  values |= _of_pixels(stores, source or data.source, chosen, data.image_size)
  sheet = generation.sheet_of(*generation.first_of(drawn[""], *drawn[""].classes))
  return values | _linear(stores, drawn) | {"samples": sheet}


class _Samples:
  """Pictures that a tokenizer makes of latents [N, h, w, Z]: a `PictureSet`."""

  def __init__(
    self, latents: np.ndarray, tokenizer: restore.Trained, store: LatentStore, labels: np.ndarray
  ):
    self.latents, self._decode = latents, decoder_of(tokenizer)
    self.size, self.classes = side_of(tokenizer, store), (labels, list(Space.of(store).class_names))
    self.about = {"kind": "probe", "latents": store.sha256, "pictures": len(latents)}

  def __len__(self) -> int:
    return len(self.latents)

  def read(self, start: int, stop: int) -> np.ndarray:
    return self._decode(self.latents[start:stop])


def model_of(store: LatentStore, held_out: LatentStore) -> FrozenConfigDict:
  """The configuration of the small model on these latents: 1,000 steps of 1.3 M parameters."""
  height, width, channels = store.shape
  if height != width:
    raise InputError(f"The latents are {height} x {width}; LightningDiT needs squares.")
  patch = next(p for p in range(1, height + 1) if height % p == 0 and (height // p) ** 2 <= TOKENS)
  config = configs.base.diffusion()
  devices = jax.device_count()
  config.update(num_steps=STEPS, batch_size=max(min(BATCH, len(store)) // devices, 1) * devices)
  config.update(save_every_steps=max(STEPS // 4, 1), evaluate_every_steps=STEPS, log_to=())
  config.dtype = "float32"
  config.latents.update(path=str(store.path), sha256=store.sha256, valid_path=str(held_out.path))
  config.model.update(input_size=height, in_channels=channels, patch_size=patch, attention="xla")
  config.model.update(hidden_size=WIDTH, depth=DEPTH, num_heads=2, scan_unroll=DEPTH)
  config.model.num_classes = len(Space.of(store).class_names) or int(store.labels.max()) + 1
  config.optimizer.update(learning_rate=2e-3, clip_norm=1.0, ema_decays=(0.99,))
  config.optimizer.update(warmup_steps=STEPS // 10, decay_steps=STEPS)
  config.sample.update(method="heun", num_steps=17, cfg_scale=1.0, cfg_channels=0, batch_size=250)
  return FrozenConfigDict(config)


def _train(stores: dict[str, LatentStore], folder: Path) -> restore.Trained:
  config = model_of(stores["fitted"], stores["held_out"])
  # One that another version of this code began, with other keys, is left where it is.
  told = json.dumps(config.to_dict(), sort_keys=True)
  workdir = folder / f"model-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
  ready = loop.Prepared(config, {}, {NOTE: Space.of(stores["fitted"]).note()})
  loop.run(lightningdit_jax.training, config, workdir, name="probe", prepare=lambda: ready)
  return restore.load(workdir, "diffusion")


def _sampled(trained: restore.Trained, store: LatentStore, labels: np.ndarray) -> np.ndarray:
  """Latents of the model for these labels, float32 [N, h, w, Z], in all processes."""
  config, devices = trained.config, mesh.make_mesh()
  params, size = trained.on(devices).params, config.sample.batch_size

  @jax.jit
  def run(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    given = (batch["index"], batch["label"])
    x_BhwZ = sampling.sample_latents(config, params, *given, seed=0, sample=config.sample)
    return whole(denormalise(x_BhwZ, store.mean, store.std))

  def load(rows: np.ndarray) -> dict[str, np.ndarray]:
    return {"index": rows.astype(np.int32), "label": labels[rows].astype(np.int32)}

  batches = in_shares(functools.partial(run, params), load, len(labels), size, devices)
  found = console.tracked(batches, "samples", -(-len(labels) // (size * devices.size)))
  latents = np.concatenate([x for _, x in found])
  if not np.isfinite(latents).all():
    raise NotFinite("Samples of the probe's model have numbers that are not finite.")
  return latents


def _normalised(store: LatentStore, count: int | None = None) -> np.ndarray:
  """The first latents as the model sees them, every other one mirrored, float32 [n, h, w, Z]."""
  records = np.arange(len(store) if count is None else min(count, len(store)))
  x_nhwZ = np.empty((len(records), *store.shape), np.float32)
  store.read(records, records % 2 == 1, out=x_nhwZ, mean=store.mean, scale=1 / store.std)
  return x_nhwZ


def _linear(stores: dict[str, LatentStore], drawn: dict[str, Any]) -> dict[str, float]:
  """The accuracy of a linear classifier of held-out latents, and distances between latents."""
  store = stores["fitted"]
  size = int(np.prod(store.shape))
  axes: np.ndarray | None = None
  if size > MOST_NUMBERS:
    normal = np.random.default_rng(0).standard_normal((size, MOST_NUMBERS), np.float32)
    axes = np.linalg.qr(normal)[0]

  def vectors(x_nhwZ: np.ndarray) -> np.ndarray:
    x_nD = x_nhwZ.reshape(len(x_nhwZ), -1)
    return x_nD if axes is None else x_nD @ axes

  def moments(x_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = Moments()
    found.update(x_nD)
    return found.mean, found.cov

  fitted_nD = vectors(_normalised(store))
  real, values = Gaussian(*moments(fitted_nD)), {}
  for before, pictures in drawn.items():
    x_nD = vectors((pictures.latents - store.mean) / store.std)
    # For each number, so that it does not grow with their count.
    values[f"{before}fd_latents"] = real.distance(*moments(x_nD)).distance / x_nD.shape[1]
  if len(np.unique(store.labels)) > 1:
    held_out_nD = vectors(_normalised(stores["held_out"]))
    labels = store.labels, stores["held_out"].labels
    values["linear_accuracy"] = linear.accuracy(fitted_nD, labels[0], held_out_nD, labels[1])
  return values


def _of_pixels(
  stores: dict[str, LatentStore], spec: str, chosen: dict[str, np.ndarray], size: int
) -> dict[str, float]:
  """The share of the latents' variance that is linear in the pixels of their own cells."""
  opened, both = sources.open_source(spec), []
  for name, store in stores.items():
    height, width, channels = store.shape
    skipped = {*store.manifest.get("skipped", ())}
    indices = [i for i in chosen[name].tolist() if opened.name(i) not in skipped]
    pictures = FromSource(spec, size, indices=np.array(indices[: PIXEL_CELLS // (height * width)]))
    image = pictures.read(0, len(pictures)).astype(np.float32)
    image[1::2] = image[1::2, :, ::-1]  # as the latents
    shape = (len(image), height, size // height, width, size // width, 3)
    pixels = image.reshape(shape).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 3 * shape[2] * shape[4])
    both += [pixels, _normalised(store, len(image)).reshape(-1, channels)]
  return {"linear_in_pixels": linear.explained(*both)}


def read_others(paths: Sequence[str]) -> dict[str, dict[str, float]]:
  """Figures of other probes by name, of JSON files or of folders with some at any depth.

  InputError where one has none.
  """
  found: dict[str, dict[str, Any]] = {}
  for given in map(place, paths):
    files = [given] if given.is_file() else sorted(given.rglob("*.json"))
    notes = {file: read_note(file) for file in files}
    probes = {file: x for file, x in notes.items() if x.get("evaluation") == KIND}
    if not probes:
      raise InputError(f"{given} has no probes; --among takes their JSON files, or a folder.")
    root = given if given.is_dir() else given.parent
    found |= {str(file.relative_to(root).with_suffix("")): x for file, x in probes.items()}
  return {name: note["figures"] for name, note in found.items()}


def evaluate(
  tokenizer: restore.Trained,
  output: Output,
  judge: Judge | None,
  *,
  count: int = COUNT,
  source: str = "",
  others: Mapping[str, dict[str, float]] | None = None,
) -> dict[str, float]:
  """`measure` with JSON, picture and page, where the tokenizer stands among other probes' figures.

  Of several processes the first has the figures and writes.
  """
  began = time.monotonic()
  values = measure(tokenizer, output.progress, judge, count=count, source=source)
  if jax.process_index():
    return {}
  sheet = values.pop("samples")
  network = judge and judge.network
  names = [name for name in values if not name.endswith((*figures.PARTS,))]
  among = {name: [x[name] for x in (others or {}).values() if name in x] for name in names}
  places = {name: 1 + sum(x < values[name] for x in among[name]) for name in names}
  output.write(
    {
      "figures": values,
      "seconds": round(time.monotonic() - began, 1),
      "tokenizer": {"sha256": tokenizer.sha256, "step": tokenizer.step},
      "pictures": count,
      "network": network and network.about,
      "place_from_below": places if others else None,
      "model": {"steps": STEPS, "batch": BATCH, "width": WIDTH, "depth": DEPTH, "samples": SAMPLES},
    },
    title=f"Probe: loss {values['loss']:.3f}",
    summary=f"A probe of generation by {count} pictures and {SAMPLES} samples.",
    figures=figures.shown_of_probe(values, network, f"{SAMPLES} samples"),
    sections=[Section("Samples", "Of the small model.", [picture_rows({"": sheet[None]}, 1)])],
    points=[
      {"figure": name, "here": values[name], "place from below": f"{places[name]} of {1 + len(x)}"}
      | {how: float(of(x)) for how, of in _OTHERS.items()}
      for name, x in among.items()
      if x
    ],
    picture=sheet,
  )
  return values
