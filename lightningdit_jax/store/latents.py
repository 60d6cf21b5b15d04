"""The latent store: posterior samples of pictures, their statistics, normalisation.

Its files are the shards of `shards.py`, in the published layout, and the statistics of the channels
[1, Z, 1, 1]. NCHW ends here: records are [h, w, Z]. Only this file normalises and denormalises.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from lightningdit_jax.store import shards
from lightningdit_jax.store.shards import Shard
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place, read_note, write_json, write_safetensors
from vavae_jax.data import order
from vavae_jax.weights.torch_files import read_torch_file

if TYPE_CHECKING:
  import grain  # which takes half a second

MANIFEST = "manifest.json"
STATISTICS = "latents_stats.safetensors"
PUBLISHED_STATISTICS = "latents_stats.pt"
_STATISTICS_FILES = (STATISTICS, PUBLISHED_STATISTICS)
# REPA-E's files, mean and 1 / deviation: (latent - latents_bias) * latents_scale. Its sources have
# the same names for latent * scale + bias too, with a bias of 0, but write no file of these.
_FACTOR = ("latents_bias", "latents_scale")
# What mean and deviation are called: by the reference and here, there, and in diffusers' settings.
STATISTICS_NAMES = (("mean", "std"), _FACTOR, ("latents_mean", "latents_std"))
STATISTICS_SAMPLES = 10_000
# Records that are normalised and transposed together: as many as the processor's cache holds.
_CHUNK = 16
_NOISE = 3  # the record's random stream for noise; see order.py


class LatentStore:
  """A folder of latent shards, read record by record; with statistics alone its length is 0.

  In a bucket it can be read, too, but each record is fetched: `fetching` copies it for training.

  InputError if it has neither shards nor statistics, shards are damaged or disagree, or the
  statistics are missing.
  """

  def __init__(self, path: Path | str):
    self.path = place(str(path))
    self._files = [str(file) for file in shard_files(self.path)]
    if not self._files and not any((self.path / name).is_file() for name in _STATISTICS_FILES):
      raise InputError(f"{path} holds no latent shards; make them with python -m launch.encode.")
    opened = [_open(file, os.getpid()) for file in self._files]
    shapes = {shard.shape for shard in opened}
    if len(shapes) > 1 or len({shard.has_posteriors for shard in opened}) > 1:
      raise InputError(f"The shards of {path} disagree on the latents' shape or kind: {shapes}.")
    self._starts = np.cumsum([0, *map(len, opened)])
    self.has_posteriors = bool(opened) and opened[0].has_posteriors
    self.mean, self.std = self._statistics(opened[0].shape[0] if opened else None)
    # Statistics alone, which is all that sampling needs, have no cells.
    channels, height, width = opened[0].shape if opened else (len(self.mean), 0, 0)
    self.shape = (height, width, channels)
    self._check_manifest(opened)

  def _check_manifest(self, opened: Sequence[Shard]) -> None:
    """Raises InputError unless the shards are those that the manifest names."""
    if self.manifest.get("records", len(self)) != len(self):
      raise InputError(
        f"{self.path} has {len(self)} of the {self.manifest['records']} latents that its "
        f"{MANIFEST} names: it was not copied whole. Copy it again, or encode again."
      )
    listed = self.manifest.get("shards", {})
    for shard in opened if listed else ():
      noted = listed.get(shard.path.name)
      sha256 = (
        noted.get("sha256") if isinstance(noted, dict) else None
      )  # older ones have counts alone
      if sha256 != (shard.note.sha256 if shard.note else None):
        raise InputError(
          f"{shard.path} is not the shard that {MANIFEST} names: it is of another store. Copy the "
          "store again, or encode again."
        )

  def __len__(self) -> int:
    return int(self._starts[-1])

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{"latent": float32 [h, w, Z], "label": int}, not flipped and not normalised.

    A store of posteriors gives their mean.
    """
    return self.record(index, flip=False)

  def record(self, index: int, *, flip: bool) -> dict[str, Any]:
    """As `store[index]`, or the record of the mirrored picture."""
    latent = np.empty((1, *self.shape), np.float32)
    self.read(np.array([index]), np.array([flip]), out=latent)
    return {"latent": latent[0], "label": int(self.labels_of(np.array([index]))[0])}

  def read(
    self,
    records: np.ndarray,
    flips: np.ndarray,
    *,
    out: np.ndarray,
    mean: Any = 0.0,
    scale: Any = 1.0,
    noise: Any = None,
  ) -> None:
    """Fills `out`, contiguous float32 [B, h, w, Z], with (latent - mean) * scale per channel [Z].

    `flips` [B] says where to take the mirrored picture's; `noise` maps a place in the batch to
    standard normal [Z, h, w], to sample from posteriors; None takes their means.
    """
    outside = (records < 0) | (records >= len(self))
    if outside.any():
      raise IndexError(f"record {records[outside][0]} of a store of {len(self)}")
    names = ("mean", "mean_flip") if self.has_posteriors else shards.SAMPLES
    height, width, channels = self.shape
    chunk_BZN = np.empty((_CHUNK, channels, height * width), np.float32)
    mean_Z1, scale_Z1 = (np.asarray(x, np.float32).reshape(-1, 1) for x in (mean, scale))
    out_BND = out.reshape(len(records), height * width, channels)
    places = self._places(records)
    for begin in range(0, len(places), _CHUNK):
      some = places[begin : begin + _CHUNK]
      x_BZN = chunk_BZN[: len(some)]
      for i, (shard, row) in enumerate(some):
        flip = int(flips[begin + i])
        x_BZN[i] = shard.tensors[names[flip]][row].reshape(channels, -1)
        if noise is not None:
          std_Zhw = shard.tensors[("std", "std_flip")[flip]][row]
          x_BZN[i] += (std_Zhw * noise(begin + i)).reshape(channels, -1)
      # A sum is a third of the cost, and finite unless a number is not, or all are huge.
      with np.errstate(all="ignore"):
        total = x_BZN.sum()
      if not np.isfinite(total):
        _check_finite(x_BZN, some)
      x_BZN -= mean_Z1
      x_BZN *= scale_Z1
      out_BND[begin : begin + _CHUNK] = x_BZN.transpose(0, 2, 1)

  def labels_of(self, records: np.ndarray) -> np.ndarray:
    """Labels of some records, int64 [B]."""
    return np.array([shard.labels[row] for shard, row in self._places(records)], np.int64)

  def _places(self, records: np.ndarray) -> list[tuple[Shard, int]]:
    process = os.getpid()
    found = np.searchsorted(self._starts, records, "right") - 1
    rows = records - self._starts[found]
    places = zip(found.tolist(), rows.tolist(), strict=True)
    return [(_open(self._files[shard], process), row) for shard, row in places]

  @functools.cached_property
  def labels(self) -> np.ndarray:
    """All labels, int64 [len]."""
    labels = [_open(file, os.getpid()).labels.astype(np.int64) for file in self._files]
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
    kinds = (int, "records"), (dict, "tokenizer", "shards"), (list, "skipped", "class_names")
    may_lack: dict[str, Any] = {name: kind | None for kind, *names in kinds for name in names}
    return read_note(path, **may_lack) if path.is_file() else {}

  def _statistics(self, channels: int | None) -> tuple[np.ndarray, np.ndarray]:
    ours, published = self.path / STATISTICS, self.path / PUBLISHED_STATISTICS
    if ours.is_file():
      try:
        stored: dict[str, Any] = load(ours.read_bytes())
      except (SafetensorError, OSError) as error:
        raise InputError(f"{ours} cannot be read ({error}); encode again.") from error
    elif published.is_file():
      stored = read_torch_file(published)
    else:
      raise InputError(
        f"{self.path} has latents but no statistics ({STATISTICS} or {PUBLISHED_STATISTICS}): its "
        "encoding was not finished; run the same python -m launch.encode again."
      )
    try:
      mean, std = mean_and_std(stored)
    except InputError as error:
      raise InputError(f"The statistics of {self.path}: {error}") from error
    if channels not in (None, mean.size):
      raise InputError(
        f"The statistics of {self.path} have {mean.size} channels, its latents {channels}."
      )
    return mean.ravel(), std.ravel()


def mean_and_std(stored: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of latents by any of `STATISTICS_NAMES`, float32, as shaped there.

  InputError if there are none, or they cannot normalise anything.
  """
  names = next((names for names in STATISTICS_NAMES if set(names) <= stored.keys()), None)
  if names is None or not all(isinstance(stored[name], np.ndarray) for name in names):
    known = " or ".join(" and ".join(names) for names in STATISTICS_NAMES)
    raise InputError(f"they are called {known}, and here are {', '.join(map(str, stored))[:200]}.")
  mean, std = (np.asarray(stored[name], np.float32) for name in names)
  if names == _FACTOR and (std > 0).all():
    std = np.float32(1) / std
  if not mean.size or mean.shape != std.shape or mean.size != max(mean.shape, default=0):
    raise InputError(f"mean {mean.shape} and std {std.shape} are not one number a channel.")
  if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
    raise InputError(
      "they are not finite, or a channel never varies: no latents can be normalised so. Encode "
      "again with a trained tokenizer."
    )
  return mean, std


def _check_finite(x_BZN: np.ndarray, places: Sequence[tuple[Shard, int]]) -> None:
  """Raises InputError for the first of these records with a number that is not finite."""
  bad = ~np.isfinite(x_BZN).all((1, 2))
  if bad.any():
    shard, row = places[int(bad.argmax())]
    raise InputError(
      f"{shard.path} has numbers that are not finite, in its record {row}; python -m launch.encode "
      f"--check={shard.path.parent} lists all. Encode again, or leave the shard out."
    )


def shard_files(path: Path) -> list[Path]:
  """The shards of a store's folder, in the order of their records."""
  found = path.glob("*.safetensors")
  return sorted(file for file in found if file.name != STATISTICS and file.name[0] != ".")


@functools.cache
def _open(path: str, process: int) -> Shard:
  """A shard, kept open in each process: opening one for each record is seven times slower."""
  del process
  return Shard(place(path))


def normalise(latent: Any, mean: Any, std: Any, multiplier: float = 1.0) -> Any:
  """(latent - mean) / std * multiplier per channel, the last axis."""
  return (latent - mean) / std * multiplier


def denormalise(latent: Any, mean: Any, std: Any, multiplier: float = 1.0) -> Any:
  """The inverse of `normalise`."""
  return latent / multiplier * std + mean


class Scaled(Protocol):
  """What has mean and deviation of latents, float32 [Z]."""

  @property
  def mean(self) -> np.ndarray: ...

  @property
  def std(self) -> np.ndarray: ...


def statistics(of: Scaled, *, latent_norm: bool) -> tuple[np.ndarray, np.ndarray]:
  """The (mean, std) that normalisation uses; 0 and 1 where it is off.

  DEVIATION: with `latent_norm` off the reference still denormalises after sampling.
  """
  if latent_norm:
    return of.mean, of.std
  return np.zeros_like(of.mean), np.ones_like(of.std)


def finish_store(path: Path, manifest: dict[str, Any], seed: int, files: Sequence[Path]) -> None:
  """Writes the statistics and then the manifest of a folder whose shards are complete.

  `files` are all shards that it must have, in order; the seed chooses the 10,000 records of the
  statistics; `manifest` has entries to write beside the counts.
  """
  if differing := sorted({*files} ^ {*shard_files(path)}):
    odd = ", ".join(file.name for file in differing[:5])
    raise InputError(f"{path} should hold the shards of one encoding, but these differ: {odd}.")
  opened = [Shard(file) for file in files]
  mean, std = channel_statistics(opened, seed)
  stored = {"mean": mean.reshape(1, -1, 1, 1), "std": std.reshape(1, -1, 1, 1)}
  write_safetensors(path / STATISTICS, stored)
  notes = [shard.note for shard in opened if shard.note]
  exact = shards.merge(note.moments for note in notes)
  listed = {
    shard.path.name: {"records": len(shard), "sha256": shard.note.sha256}
    for shard in opened
    if shard.note
  }
  counts = {
    "records": sum(map(len, opened)),
    "skipped": [name for note in notes for name in note.skipped],
    "exact_mean": exact.mean.tolist(),
    "exact_std": exact.std.tolist(),
    "shards": listed,
  }
  write_json(path / MANIFEST, manifest | counts)


def channel_statistics(opened: Sequence[Shard], seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Mean and unbiased standard deviation, float32 [Z], over 10,000 random unflipped latents.

  Fewer latents are all taken; one sample is drawn from each posterior.
  """
  starts = np.cumsum([0, *map(len, opened)])
  draw = np.random.default_rng(seed)
  chosen = draw.permutation(starts[-1])[:STATISTICS_SAMPLES]
  rows = []
  for shard, start, end in zip(opened, starts, starts[1:], strict=False):
    inside = np.sort(chosen[(chosen >= start) & (chosen < end)]) - start
    if shard.has_posteriors:
      mean, std = (shard.tensors[name][inside].astype(np.float64) for name in ("mean", "std"))
      rows.append(mean + std * draw.standard_normal(mean.shape))
    else:
      rows.append(shard.tensors["latents"][inside].astype(np.float64))
  values = np.concatenate(rows)
  mean, std = values.mean((0, 2, 3)), values.std((0, 2, 3), ddof=1)
  return mean.astype(np.float32), std.astype(np.float32)


def training_batches(
  store: LatentStore,
  share: order.Share,
  *,
  seed: int,
  mean: np.ndarray,
  std: np.ndarray,
  multiplier: float,
) -> grain.IterDataset:
  """Endless shuffled batches of normalised latents, each record flipped or not by a seeded coin.

  Each epoch draws new samples from posteriors. `seed` is for order, flips and noise; a batch is
  {"latent": float32 [B, h, w, Z], "label": int32 [B]}.
  """
  places = order.Order(len(store), seed)
  height, width, channels = store.shape
  scale = (multiplier / std).astype(np.float32)

  def load(positions: np.ndarray) -> dict[str, np.ndarray]:
    records, epochs = places.records(positions)

    def noise(place: int) -> np.ndarray:
      rng = np.random.default_rng((seed, _NOISE, int(epochs[place]), int(records[place])))
      return rng.standard_normal((channels, height, width), np.float32)

    latent = np.empty((len(records), *store.shape), np.float32)
    store.read(
      records,
      places.coins(records, epochs),
      out=latent,
      mean=mean,
      scale=scale,
      noise=noise if store.has_posteriors else None,
    )
    return {"latent": latent, "label": store.labels_of(records).astype(np.int32)}

  return order.batches(share, load)
