"""The latent store: safetensors shards of posterior samples, their statistics, normalisation.

The published layout: `latents`, `latents_flip` [n, Z, h, w] float32 and `labels` [n] int64 a shard,
statistics [1, Z, 1, 1] beside them. NCHW ends here: what comes out is [h, w, Z]. This file alone
normalises and denormalises.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from vavae_jax.errors import InputError
from vavae_jax.files import atomic_file, write_json
from vavae_jax.torch_files import read_torch_file

MANIFEST = "manifest.json"
STATISTICS = "latents_stats.safetensors"
PUBLISHED_STATISTICS = "latents_stats.pt"
_STATISTICS_FILES = (STATISTICS, PUBLISHED_STATISTICS)
STATISTICS_SAMPLES = 10_000


class LatentStore:
  """A folder of latent shards, read record by record; or of their statistics alone, of length 0."""

  def __init__(self, path: Path | str):
    """Args:
      path: the folder, written by `launch.encode` or as published.

    Raises:
      InputError: it has neither shards nor statistics, shards are damaged or disagree, or the
        statistics are missing.
    """
    self.path = Path(path)
    self._files = _shards(self.path)
    if not self._files and not any((self.path / name).is_file() for name in _STATISTICS_FILES):
      raise InputError(f"{path} holds no latent shards; make them with python -m launch.encode.")
    shapes, counts = [], []
    for file in self._files:
      shard = _open(file)
      shapes.append(tuple(shard.get_slice("latents").get_shape()[1:]))
      counts.append(_count(file))
    if len(set(shapes)) > 1:
      raise InputError(f"The shards of {path} disagree on the latents' shape: {set(shapes)}.")
    self._starts = np.cumsum([0, *counts])
    self.mean, self.std = self._statistics(shapes[0][0] if shapes else None)
    # Of statistics alone, which sampling needs, without cells: none is stored.
    channels, height, width = shapes[0] if shapes else (len(self.mean), 0, 0)
    self.shape = (height, width, channels)
    if self.manifest.get("records", len(self)) != len(self):
      raise InputError(
        f"{path} has {len(self)} of the {self.manifest['records']} latents that its {MANIFEST} "
        "names: it was not copied whole. Copy it again, or encode again."
      )

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    """One record as encoded, not flipped and not normalised.

    Args:
      index: in [0, len).

    Returns:
      {"latent": float32 [h, w, Z], "label": int}.
    """
    return self.record(index, flip=False)

  def record(self, index: int, *, flip: bool) -> dict[str, Any]:
    """Like `store[index]`, of the mirrored picture if `flip`."""
    if not 0 <= index < len(self):
      raise IndexError(f"record {index} of a store of {len(self)}")
    place = bisect.bisect_right(self._starts, index) - 1
    shard, row = _open(self._files[place]), index - int(self._starts[place])
    name = "latents_flip" if flip else "latents"
    latent_Zhw = shard.get_slice(name)[row : row + 1][0]
    label = int(shard.get_slice("labels")[row : row + 1][0])
    return {"latent": np.ascontiguousarray(latent_Zhw.transpose(1, 2, 0)), "label": label}

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """All labels, int64 [len]."""
    labels = [_open(f).get_tensor("labels") for f in self._files]
    return np.concatenate([np.empty(0, np.int64), *labels])

  @functools.cached_property
  def sha256(self) -> str:
    """Identifies the latents: a hash of their statistics, their shape and their labels."""
    digest = hashlib.sha256(repr(self.shape).encode())
    for array in (self.mean, self.std, self.labels):
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()

  @functools.cached_property
  def manifest(self) -> dict[str, Any]:
    """What `launch.encode` noted; empty for a published store."""
    path = self.path / MANIFEST
    return json.loads(path.read_text()) if path.is_file() else {}

  def _statistics(self, channels: int | None) -> tuple[np.ndarray, np.ndarray]:
    ours, published = self.path / STATISTICS, self.path / PUBLISHED_STATISTICS
    if ours.is_file():
      try:
        stored: dict[str, Any] = load_file(ours)
      except (SafetensorError, OSError) as error:
        raise InputError(f"{ours} cannot be read ({error}); encode again.") from error
    elif published.is_file():
      stored = read_torch_file(published)
    else:
      raise InputError(
        f"{self.path} has latents but no statistics ({STATISTICS} or {PUBLISHED_STATISTICS}): its "
        "encoding was not finished; run the same python -m launch.encode again."
      )
    if channels is None:
      channels = np.size(stored.get("mean", ()))
    for name in ("mean", "std"):
      if name not in stored or np.size(stored[name]) != channels:
        raise InputError(
          f"The statistics of {self.path} have no {name} of {channels} channels, as its latents do."
        )
    mean, std = (np.asarray(stored[name], np.float32).ravel() for name in ("mean", "std"))
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
      raise InputError(
        f"The statistics of {self.path} are not finite, or a channel never varies: latents cannot "
        "be normalised by them. Encode again with a trained tokenizer."
      )
    return mean, std


def _shards(path: Path) -> list[Path]:
  return sorted(file for file in path.glob("*.safetensors") if file.name != STATISTICS)


@functools.lru_cache(maxsize=4096)
def _open(path: Path) -> Any:
  """A kept handle: opening a shard for each record is seven times slower."""
  try:
    shard = safe_open(path, framework="numpy")
    missing = {"latents", "latents_flip", "labels"} - set(shard.keys())
  except (SafetensorError, OSError) as error:
    raise InputError(f"The latent shard {path} cannot be read ({error}); encode again.") from error
  if missing:
    raise InputError(f"The latent shard {path} lacks {sorted(missing)}.")
  return shard


def normalise(latent: Any, mean: Any, std: Any, multiplier: float = 1.0) -> Any:
  """(latent - mean) / std * multiplier per channel, the last axis."""
  return (latent - mean) / std * multiplier


def denormalise(latent: Any, mean: Any, std: Any, multiplier: float = 1.0) -> Any:
  """The inverse of `normalise`."""
  return latent / multiplier * std + mean


def statistics(store: LatentStore, *, latent_norm: bool) -> tuple[np.ndarray, np.ndarray]:
  """The (mean, std) that normalisation uses; 0 and 1 where it is off.

  DEVIATION: with `latent_norm` off the reference still denormalises after sampling.
  """
  if latent_norm:
    return store.mean, store.std
  return np.zeros_like(store.mean), np.ones_like(store.std)


def write_shard(
  path: Path, latents_BhwZ: np.ndarray, flipped_BhwZ: np.ndarray, labels_B: np.ndarray
) -> None:
  """Writes one shard, whole or not at all.

  Args:
    path: its name, `latents_rank00_shard000.safetensors` for the first.
    latents_BhwZ: float32 posterior samples.
    flipped_BhwZ: those of the mirrored pictures.
    labels_B: int.
  """
  tensors: dict[str, np.ndarray] = {
    "latents": np.ascontiguousarray(latents_BhwZ.transpose(0, 3, 1, 2), np.float32),
    "latents_flip": np.ascontiguousarray(flipped_BhwZ.transpose(0, 3, 1, 2), np.float32),
    "labels": np.asarray(labels_B, np.int64),
  }
  with atomic_file(path) as file:
    file.write(save(tensors))


def finish_store(path: Path, manifest: dict[str, Any], seed: int) -> None:
  """Writes the statistics and then the manifest of a folder whose shards are complete.

  Args:
    path: the folder.
    manifest: what to note beside the counts.
    seed: chooses the 10,000 records of the statistics.
  """
  files = _shards(Path(path))
  mean, std = channel_statistics(files, seed)
  stored = {"mean": mean.reshape(1, -1, 1, 1), "std": std.reshape(1, -1, 1, 1)}
  with atomic_file(Path(path) / STATISTICS) as file:
    file.write(save(stored))
  counts = {file.name: _count(file) for file in files}
  write_json(Path(path) / MANIFEST, {**manifest, "records": sum(counts.values()), "shards": counts})


def channel_statistics(files: Sequence[Path], seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Mean and unbiased standard deviation of each channel over 10,000 random unflipped latents.

  Args:
    files: the shards, in order.
    seed: of the choice; with fewer latents all are taken.

  Returns:
    (mean, std), float32 [Z].
  """
  starts = np.cumsum([0, *(_count(file) for file in files)])
  chosen = np.random.default_rng(seed).permutation(starts[-1])[:STATISTICS_SAMPLES]
  rows = []
  for file, start, end in zip(files, starts, starts[1:], strict=False):
    inside = np.sort(chosen[(chosen >= start) & (chosen < end)]) - start
    rows.append(_open(file).get_tensor("latents")[inside].astype(np.float64))
  values = np.concatenate(rows)
  mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3), ddof=1)
  return mean.astype(np.float32), std.astype(np.float32)


def _count(file: Path) -> int:
  return _open(file).get_slice("labels").get_shape()[0]


def training_batches(
  store: LatentStore,
  *,
  batch_size: int,
  seed: int,
  mean: np.ndarray,
  std: np.ndarray,
  multiplier: float,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.IterDataset:
  """Endless shuffled batches of normalised latents, each record flipped or not by a seeded coin.

  Args:
    store: the latents.
    batch_size: of this process.
    seed: of order and flips.
    mean: what to subtract, [Z].
    std: what to divide by, [Z].
    multiplier: what to multiply by.
    process_index: which share of the records is this process's.
    process_count: number of shares.

  Returns:
    A grain dataset of {"latent": float32 [B, h, w, Z], "label": int32 [B]}.
  """

  def load(index: int, rng: np.random.Generator) -> dict[str, Any]:
    record = store.record(int(index), flip=bool(rng.integers(2)))
    latent = normalise(record["latent"], mean, std, multiplier).astype(np.float32)
    return {"latent": latent, "label": np.int32(record["label"])}

  return (
    grain.MapDataset.range(len(store))[process_index::process_count]
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(load)
    .batch(batch_size, drop_remainder=True)  # of an endless set; else one of 1 overflows
    .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
  )
