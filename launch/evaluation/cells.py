"""Cells of a latent space: the channels at single places, normalised as models see them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from launch import restore
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common.errors import InputError
from vavae_jax.weights.state_dicts import SUFFIXES, read_content

LEAST = 50  # cells, of which each has as many neighbours as t-SNE looks at


class Cells(Protocol):
  """A source of cells with Z channels."""

  summary: str  # what it is, for people
  about: dict[str, Any]  # the same, for JSON
  names: list[str] | None  # of the classes; None: there are none
  mean: np.ndarray  # by which each channel is normalised [Z]
  std: np.ndarray

  def draw(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(float32 cells [n,Z], their class [n]) in random order; n is `count`, or all there are."""


class StoredCells:
  """Cells at random places of a store's latents; where it has posteriors, of a sample of each."""

  def __init__(self, store: LatentStore):
    if len(store) < LEAST:
      raise InputError(f"{store.path} has {len(store)} latents; at least {LEAST} are needed.")
    height, width, channels = store.shape
    self._store = store
    self.summary = f"{len(store):,} latents of {height} x {width} x {channels}."
    self.about = {"path": str(store.path), "sha256": store.sha256, "shape": list(store.shape)}
    self.names = store.manifest.get("class_names")
    self.mean, self.std = store.mean, store.std

  def draw(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of random pictures, mirrored or not, as the reference draws them."""
    store, draw = self._store, np.random.default_rng(seed)
    records = draw.permutation(len(store))[:count]
    flips = draw.random(len(records)) < 0.5
    height, width, channels = store.shape
    rows = draw.integers(height, size=len(records))
    columns = draw.integers(width, size=len(records))
    values = np.empty((len(records), channels), np.float32)
    for start in range(0, len(records), 256):
      some = slice(start, start + 256)
      z_BhwZ = np.empty((len(records[some]), *store.shape), np.float32)
      store.read(
        records[some],
        flips[some],
        out=z_BhwZ,
        mean=store.mean,
        scale=1 / store.std,
        noise=(lambda _: draw.standard_normal((channels, height, width), np.float32))
        if store.has_posteriors
        else None,
      )
      values[some] = z_BhwZ[np.arange(len(z_BhwZ)), rows[some], columns[some]]
    if not np.isfinite(values).all():
      raise InputError(
        f"{store.path} has numbers that are not finite; python -m launch.encode "
        f"--check={store.path} names its damaged shards."
      )
    return values, store.labels_of(records)


class GivenCells:
  """Normalised cells [N,Z] in a file, such as the reference's `tools/latent_demos/*.pt`."""

  def __init__(self, path: Path):
    content = read_content(path)
    if len(content) != 1:
      raise InputError(f"{path} has {len(content)} arrays; a file of cells has one, [cells, Z].")
    (values,) = content.values()
    shape = getattr(values, "shape", None)
    if shape is None or len(shape) != 2 or shape[0] < LEAST or values.dtype.kind != "f":
      raise InputError(
        f"{path} holds {f'numbers of shape {list(shape)}' if shape else 'no array'}; cells are "
        f"floating [cells, Z], normalised, at least {LEAST}."
      )
    self._values = np.asarray(values, np.float32)
    if not np.isfinite(self._values).all():
      raise InputError(f"{path} has numbers that are not finite; make or fetch it again.")
    self.summary = f"{shape[0]:,} cells of {shape[1]} channels."
    digest = hashlib.sha256(self._values.tobytes()).hexdigest()
    self.about = {"path": str(path), "sha256": digest, "shape": list(shape)}
    self.names: list[str] | None = None
    self.mean, self.std = self._values.mean(0), self._values.std(0)

  def draw(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of the file in the seed's order; their class is 0."""
    values = self._values[np.random.default_rng(seed).permutation(len(self._values))[:count]]
    return values, np.zeros(len(values), np.int32)


def open_cells(address: str) -> Cells:
  """Cells of a latent store, or in a file of weights' kind; InputError if neither."""
  path = Path(address)
  if path.suffix in SUFFIXES and path.is_file():
    return GivenCells(path)
  return StoredCells(restore.open_latents(address))
