"""A teacher's features on disk, where every picture has one crop: the teacher then runs once.

One file of float16 [pictures, h, w, F], memory-mapped, in the order of the training pictures, and
beside it what it was made from, which must be the same when it is used. For ImageNet at 256 pixels
DINOv2-L's features are 672 GB; a cache serves smaller sets and cheap disks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from vavae_jax import frozen
from vavae_jax.autoencoder import downsampling
from vavae_jax.common.addresses import local_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import at_home, atomic_path, check_free, sha256_of, write_json
from vavae_jax.data import images, sources


class Features:
  """A file of features, mapped by each process for itself: pickling it takes its path alone."""

  def __init__(self, path: Path):
    self._path = path

  def __getitem__(self, records: np.ndarray) -> np.ndarray:
    """float16 [len(records), h, w, F]."""
    return _mapped(self._path, os.getpid())[records]


@functools.lru_cache(maxsize=8)
def _mapped(path: Path, process: int) -> np.ndarray:
  del process
  return np.load(path, mmap_mode="r")


def open_cache(config: FrozenConfigDict, source: sources.Source, indices: np.ndarray) -> Features:
  """The features of a configuration; InputError if `build` has not made them of these pictures and
  weights.
  """
  path = place_of(config, source, indices)
  if not path.is_file():
    raise InputError(
      f"There are no features of these pictures and weights in {path}; start launch.train on one "
      "process first, which makes them, or leave config.teacher.cache empty."
    )
  return Features(path)


def build(
  config: FrozenConfigDict,
  source: sources.Source,
  indices: np.ndarray,
  progress: Callable[[int], None],
  batch_size: int = 64,
) -> Path:
  """Makes the features of a configuration unless they exist already; returns their file.

  They lie in the order of `indices`; `progress` is called with the number of pictures done.
  No other process may be making them. InputError if the disk is too small, or a feature is beyond
  float16.
  """
  origin = _origin(config, source, indices)
  path = place_of(config, source, indices)
  if path.is_file():
    return path
  weights = jax.device_put(frozen.load(config))
  run = jax.jit(lambda weights, image: frozen.merge(config, weights)["teacher"](image))
  size = config.data.image_size
  features: np.memmap | None = None
  with atomic_path(path) as partial:
    for begin in range(0, len(indices), batch_size):
      crops = images.load_crops(source, indices[begin : begin + batch_size], size)
      # The last batch is filled up, so that one shape is compiled.
      filled = np.concatenate([crops, np.repeat(crops[-1:], batch_size - len(crops), axis=0)])
      found = np.asarray(run(weights, images.to_float(jnp.asarray(filled))))[: len(crops)].astype(
        np.float16
      )
      if not np.isfinite(found).all():
        raise InputError(
          f"Features of {config.teacher.name} are beyond float16; leave config.teacher.cache empty."
        )
      if features is None:
        shape = (len(indices), *found.shape[1:])
        # A mapped file has holes: writing into one on a full disk kills the process without a word.
        check_free(
          path.parent,
          math.prod(shape) * found.itemsize,
          "for the features; give another config.teacher.cache, or leave it empty",
        )
        features = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
      features[begin : begin + len(crops)] = found
      progress(begin + len(crops))
    if features is not None:
      features.flush()
    write_json(path.with_suffix(".json"), origin)
  return path


def place_of(config: FrozenConfigDict, source: sources.Source, indices: np.ndarray) -> Path:
  """The file of a configuration's features, whether there is one or not."""
  origin = json.dumps(_origin(config, source, indices), sort_keys=True)
  digest = hashlib.sha256(origin.encode()).hexdigest()
  return Path(at_home(config.teacher.cache)) / f"{config.teacher.name}-{digest[:16]}.npy"


def _origin(
  config: FrozenConfigDict, source: sources.Source, indices: np.ndarray
) -> dict[str, Any]:
  """All that features depend on."""
  teacher = {key: config.teacher[key] for key in ("name", "dtype", "normalize", "scale")}
  weights = config.teacher.weights
  return teacher | {
    "weights_sha256": _sha256(local_file(weights)) if weights else "",
    "pictures": source.identity(),
    "indices_sha256": hashlib.sha256(indices.astype(np.int64).tobytes()).hexdigest(),
    "image_size": config.data.image_size,
    "cell": downsampling(config.model.ch_mult, config.model.patch_size),
  }


_sha256 = functools.lru_cache(sha256_of)
