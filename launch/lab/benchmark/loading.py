r"""Measures loading: latents beside the PyTorch reference's loader, pictures beside bare Pillow.

  python -m launch.lab.benchmark loading --reference=LIGHTNINGDIT --torch_python=PYTHON \
    --output=benchmark.json

Latents are shuffled, normalised float32 batches of 256 from a store of 20,000 random records of
32x16x16, which is in memory after the first round, as after an epoch. The reference opens the file
again for each record: its own PyTorch loader is timed if --reference is given, and its way in NumPy
in one thread always. Pictures are JPEGs of 500x375, decoded and cropped to 256 as ADM does, beside
a loop of Pillow calls. All ways take turns.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from safetensors import safe_open

from launch.engine import command_line, console
from launch.lab.benchmark.measuring import in_turns, keep
from launch.lab.torch_process import SCRIPTS, TorchProcess
from lightningdit_jax.store import latents, shards
from vavae_jax.data import images, order
from vavae_jax.data.sources.base import Source
from vavae_jax.weights.torch_writer import write_torch_file

FLAGS = flags.FLAGS
NEEDS = "torch, numpy and safetensors"
BATCH = 256
SHARD = 5_000
SHAPE = (16, 16, 32)
PICTURE_BATCH = 32
PICTURES = 256
# Name -> a function of a number of batches that returns the seconds they took.
Works = dict[str, Callable[[int], float]]


def make_store(
  folder: Path, count: int, shape: tuple[int, int, int] = SHAPE
) -> latents.LatentStore:
  """A store of random latents in the published layout."""
  rng = np.random.default_rng(0)
  for number, start in enumerate(range(0, count, SHARD)):
    size = min(SHARD, count - start)
    samples = {n: rng.standard_normal((size, *shape), np.float32) for n in shards.SAMPLES}
    path = folder / shards.shard_name(number, count // SHARD)
    shards.write_shard(path, samples, rng.integers(1000, size=size), [])
  opened = [shards.Shard(file) for file in latents.shard_files(folder)]
  columns = zip(("mean", "std"), latents.channel_statistics(opened, 0), strict=True)
  stored = {name: x.reshape(1, -1, 1, 1) for name, x in columns}
  # As published, since the reference takes every other .safetensors for a shard.
  write_torch_file(folder / latents.PUBLISHED_STATISTICS, stored)
  return latents.LatentStore(folder)


def _ours(begin: Callable[[dict[str, int]], Callable[[], Iterator[Any]]], ahead: int) -> Works:
  """Our loader with 1, 2 and 4 threads or workers, each of which has `ahead` batches ready."""
  return {
    f"ours, {number} {kind}": timed_batches(begin({"threads": 1} | {kind: number}), ahead * number)
    for kind in ("threads", "workers")
    for number in (1, 2, 4)
  }


def latent_batches(
  store: latents.LatentStore, batch_size: int, loader: Mapping[str, Any]
) -> Callable[[], Iterator[Any]]:
  """Begins the batches of a training on a store; `loader` as `config.loader`."""
  share = order.Share(batch_size, **loader)

  def begin() -> Iterator[Any]:
    mean, std = store.mean, store.std
    return iter(latents.training_batches(store, share, seed=0, mean=mean, std=std, multiplier=1.0))

  return begin


def picture_batches(
  batch_size: int, loader: Mapping[str, Any], size: int = 256
) -> Callable[[], Iterator[Any]]:
  """Begins the batches of a tokenizer's training on photographs; `loader` as `config.loader`."""
  source, share = Photographs(), order.Share(batch_size, **loader)

  def begin() -> Iterator[Any]:
    indices = np.arange(PICTURES)
    return iter(images.training_batches(source, indices, share, size=size, seed=0, crop="center"))

  return begin


def _reopening(store: latents.LatentStore) -> Iterator[Any]:
  """As the reference's ImgLatentDataset reads a record."""
  rng = np.random.default_rng(0)
  files = latents.shard_files(store.path)
  mean, std = (x.reshape(1, -1, 1, 1) for x in (store.mean, store.std))
  while True:
    rows = []
    for record in rng.integers(len(store), size=BATCH).tolist():
      with safe_open(files[record // SHARD], framework="numpy") as file:
        name = "latents" if rng.uniform() > 0.5 else "latents_flip"
        row = record % SHARD
        latent = file.get_slice(name)[row : row + 1]
        label = file.get_slice("labels")[row : row + 1]
      rows.append(((latent - mean) / std)[0])
    yield {"latent": np.stack(rows), "label": label}


class Photographs(Source):
  """Random but photograph-like JPEGs, in memory."""

  def __init__(self) -> None:
    self.class_names = ["all"]
    rng = np.random.default_rng(0)
    self._files = []
    for _ in range(16):
      coarse = rng.integers(256, size=(30, 40, 3), dtype=np.uint8)
      smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
      noisy = np.clip(np.asarray(smooth, int) + rng.normal(0, 8, (375, 500, 3)), 0, 255)
      buffer = io.BytesIO()
      Image.fromarray(noisy.astype(np.uint8)).save(buffer, "JPEG", quality=90)
      self._files.append(buffer.getvalue())

  def __len__(self) -> int:
    return PICTURES

  def encoded(self, index: int) -> tuple[bytes, int]:
    return self._files[index % len(self._files)], 0

  def name(self, index: int) -> str:
    return str(index)

  def identity(self) -> str:
    return "photographs"


def _bare(source: Photographs) -> Iterator[Any]:
  """ADM's crop by nothing but Pillow; of these pictures no box halving is due."""
  for start in itertools.count(0, PICTURE_BATCH):
    batch = []
    for index in range(start, start + PICTURE_BATCH):
      picture = Image.open(io.BytesIO(source.encoded(index)[0])).convert("RGB")
      picture = picture.resize((341, 256), Image.Resampling.BICUBIC).crop((42, 0, 298, 256))
      batch.append(np.asarray(picture))
    yield np.stack(batch)


def timed_batches(begin: Callable[[], Iterator[Any]], warmup: int = 2) -> Callable[[int], float]:
  """Seconds for a number of batches after `warmup` others."""

  def run(count: int) -> float:
    batches = begin()
    for _ in range(warmup):
      next(batches)
    began = time.perf_counter()
    for _ in range(count):
      next(batches)
    return time.perf_counter() - began

  return run


def _show(
  what: str, works: Works, base: str, batches: int, size: int, rounds: int
) -> dict[str, float]:
  """Measures records a second of each way, the median of the rounds, and shows them."""
  turns = {name: functools.partial(work, batches) for name, work in works.items()}
  seconds = in_turns(turns, rounds)
  rates = {name: batches * size / float(np.median(x)) for name, x in seconds.items()}
  rows = [(n, f"{rate:,.0f}", f"{rate / rates[base]:.2f}") for n, rate in rates.items()]
  console.table(what, ("way", "records/s", f"of {base}"), rows)
  return rates


def define_flags() -> None:
  flags.DEFINE_string("reference", "", "A checkout of hustvl/LightningDiT.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has PyTorch.")
  flags.DEFINE_integer("records", 20_000, "Latents in the store.", lower_bound=SHARD)
  flags.DEFINE_integer("batches", 80, "Batches of latents in a round; of pictures a quarter.", 1)
  flags.DEFINE_integer("rounds", 5, "Rounds; in each, all ways take a turn.", lower_bound=1)
  command_line.define_output("output", None, "A JSON file for the results.")


def main() -> None:
  with tempfile.TemporaryDirectory() as name:
    store = make_store(Path(name), FLAGS.records)
    slow, theirs = "reference's way in NumPy, 1 thread", "reference in PyTorch, 2 workers"
    works = _ours(lambda loader: latent_batches(store, BATCH, loader), 2)
    works[slow] = timed_batches(functools.partial(_reopening, store))
    with contextlib.ExitStack() as stack:
      if FLAGS.reference:
        job = {"checkout": FLAGS.reference, "store": name, "batch_size": BATCH}
        script = SCRIPTS / "loading.py"
        works[theirs] = stack.enter_context(
          TorchProcess(FLAGS.torch_python, script, job, NEEDS)
        ).ask
      rates = _show("latents", works, slow, FLAGS.batches, BATCH, FLAGS.rounds)
  bare = "bare Pillow, 1 thread"
  works = {bare: timed_batches(functools.partial(_bare, Photographs()))}
  works |= _ours(lambda loader: picture_batches(PICTURE_BATCH, loader), 1)
  fewer = max(FLAGS.batches // 4, 1)
  pictures = _show("pictures", works, bare, fewer, PICTURE_BATCH, FLAGS.rounds)
  keep({"latents": rates, "pictures": pictures}, FLAGS.output)
