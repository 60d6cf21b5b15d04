"""Which pictures of `config.data` are trained on, which are kept apart, and which are looked at."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import FrozenConfigDict

from vavae_jax.common.errors import InputError
from vavae_jax.data import images, order, sources
from vavae_jax.data.sources.base import hash_names

if TYPE_CHECKING:
  import grain  # which takes half a second

EVALUATION_IMAGES = 64
SPLITS = ("", "name", "position")
CHANGED = ("refuse", "allow")

opened = functools.lru_cache(sources.open_source)


def _source(data: FrozenConfigDict, spec: str, among: np.ndarray | None = None) -> sources.Source:
  """A source as tolerant as `config.data` says; `sources.Tolerant` explains `among`."""
  source = opened(spec)
  return sources.Tolerant(source, data.max_corrupt, among) if data.max_corrupt else source


def share(data: FrozenConfigDict, held_out: bool) -> np.ndarray:
  """Ascending indices in `data.source`: those that training uses, or those that it left out.

  If it left none out, both are the same.
  """
  train, rest = split(opened(data.source), data)
  return rest if held_out and len(rest) else train


def split(source: sources.Source, data: FrozenConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """Disjoint indices for (training, evaluation), int64, each ascending, as `config.data` says.

  By the hash of its name a picture stays where it is, whatever is added or removed beside it; by
  position the share is exact, but one picture more moves others.
  """
  if data.split == "position":
    order = np.random.default_rng(data.split_seed).permutation(len(source))
    size = round(len(source) * data.held_out)
    train, rest = np.sort(order[size:]), np.sort(order[:size])
  else:
    hashes = hash_names(source.keys(), f"{data.split_seed}/")
    out = hashes < np.uint64(data.held_out * 2.0**64)
    train, rest = np.flatnonzero(~out), np.flatnonzero(out)
  if data.held_out and not len(rest):
    raise InputError(
      f"config.data.held_out is {data.held_out}, which holds out none of the {len(source)} "
      f"pictures of {data.source}; give a larger share, or 0."
    )
  return train, rest


def training_pictures(config: FrozenConfigDict) -> tuple[sources.Source, np.ndarray]:
  """The source of a configuration, and the indices of the pictures that it trains on."""
  return _training_pictures(config.data)


@functools.lru_cache
def _training_pictures(data: FrozenConfigDict) -> tuple[sources.Source, np.ndarray]:
  """Cached, so that a picture that cannot be read is named once."""
  train = share(data, held_out=False)
  return _source(data, data.source, train), train


def data_source(config: FrozenConfigDict) -> str:
  """Where the training pictures are, for messages."""
  return config.data.source


def training_batches(
  config: FrozenConfigDict,
  rows: np.ndarray | None,
  start: int,
  features: images.Rows | None = None,
) -> grain.IterDataset:
  """Endless batches of crops from the batch `start` on, of each these rows (`order.Share`):
  `images.training_batches`.
  """
  return images.training_batches(
    *training_pictures(config),
    order.Share(config.batch_size, rows, start, **config.loader),
    size=config.data.image_size,
    seed=config.seed,
    crop=config.data.crop,
    flip=config.data.flip,
    features=features,
  )


def check_pictures(config: FrozenConfigDict) -> None:
  """Raises InputError if pictures of `config.data` cannot be read, or are too few."""
  source, train = training_pictures(config)
  sources.check_readable(source)
  if config.data.valid_source:
    sources.check_readable(_source(config.data, config.data.valid_source))
  if len(train) < config.batch_size:
    raise InputError(
      f"{config.data.source} has {len(train)} pictures for training, fewer than one batch of "
      f"{config.batch_size}; add pictures or lower config.batch_size."
    )


def evaluation_pictures(config: FrozenConfigDict) -> tuple[sources.Source, np.ndarray]:
  """Some pictures to look at while training, as `training_pictures`.

  They are of `data.valid_source`, else held out, else some that are trained on.
  """
  spec = config.data.valid_source or config.data.source
  if config.data.valid_source:
    there = np.arange(len(opened(spec)))
  else:
    there = share(config.data, held_out=True)
  chosen = there[order.spread(len(there), EVALUATION_IMAGES)]
  return _source(config.data, spec, chosen), chosen
