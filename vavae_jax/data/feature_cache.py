"""A teacher's features on disk, where every picture has one crop: the teacher then runs once.

One file of float16 [pictures, h, w, F], memory-mapped, in the order of the training pictures, and
beside it what it was made from, which must be the same when it is used, and the mean over all
pictures and positions, which `config.teacher.centre` takes off. For ImageNet at 256 pixels
DINOv2-L's features are 672 GB; a cache serves smaller sets and cheap disks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from vavae_jax import frozen
from vavae_jax.autoencoder import downsampling
from vavae_jax.common import mesh
from vavae_jax.common.addresses import local_file
from vavae_jax.common.batches import Batches
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, local_place, read_note, sha256_of, write_json
from vavae_jax.data import images, selection, sources

BATCH = 64  # pictures at once on a device


class Features:
  """A file of features, mapped by each process for itself: pickling it takes its path and `mean`.

  The mean [F] is taken off; None: the features as they are.
  """

  def __init__(self, path: Path, mean: np.ndarray | None = None):
    self._path, self._mean = path, mean

  def __getitem__(self, records: np.ndarray) -> np.ndarray:
    """float16 [len(records), h, w, F]."""
    found = _mapped(self._path, os.getpid())[records]
    return found if self._mean is None else (found - self._mean).astype(np.float16)


@functools.lru_cache(maxsize=8)
def _mapped(path: Path, process: int) -> np.ndarray:
  del process
  return np.load(path, mmap_mode="r")


def check(config: FrozenConfigDict) -> None:
  """Raises InputError for a configuration that a cache does not fit, or that lacks one."""
  if config.teacher.cache and (config.data.crop != "center" or config.data.flip):
    raise InputError(
      "config.teacher.cache keeps the features of one crop of each picture; set config.data.crop "
      'to "center" and config.data.flip to False, or the cache to "".'
    )
  if config.teacher.centre and frozen.uses_teacher(config) and not config.teacher.cache:
    raise InputError(
      "config.teacher.centre takes off the mean feature, which the cache has; give "
      "config.teacher.cache a folder, or set config.teacher.centre to False."
    )


def frozen_weights(config: FrozenConfigDict) -> dict[str, Any]:
  """As `frozen.load`, with the mean of a teacher's features that are centred."""
  weights = frozen.load(config)
  if config.teacher.centre and frozen.uses_teacher(config):
    weights["teacher"]["mean"] = mean_of(config, *selection.training_pictures(config))
  return weights


def open_cache(config: FrozenConfigDict, source: sources.Source, indices: np.ndarray) -> Features:
  """The features of a configuration; InputError if they have not been made of these pictures and
  weights.
  """
  mean = mean_of(config, source, indices) if config.teacher.centre else None
  return Features(_made(config, source, indices), mean)


def mean_of(config: FrozenConfigDict, source: sources.Source, indices: np.ndarray) -> np.ndarray:
  """The mean feature of all pictures and positions, float32 [F]; InputError as `open_cache`'s."""
  path = _made(config, source, indices)
  advice = f"delete it and {path}, which is then made again"
  note = read_note(path.with_suffix(".json"), advice=advice, mean=list)
  return np.array(note["mean"], np.float32)


def _made(config: FrozenConfigDict, source: sources.Source, indices: np.ndarray) -> Path:
  path = place_of(config, source, indices)
  if not path.is_file():
    raise InputError(
      f"There are no features of these pictures and weights in {path}, where launch.train makes "
      "them; leave config.teacher.cache empty to do without."
    )
  return path


def teacher_of(config: FrozenConfigDict) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
  """(a function from crops, uint8 [n, H, W, 3], to features, float16 [n, h, w, F]; bytes of one).

  Each device of this process runs `BATCH` at once. The function raises InputError for features that
  are beyond float16.
  """
  devices, size = mesh.local_mesh(), config.data.image_size
  weights = jax.device_put(frozen.load(config), mesh.replicated(devices))

  @jax.jit
  def run(weights: Any, image_BHWC: jax.Array) -> jax.Array:
    return frozen.merge(config, weights)["teacher"](image_BHWC)

  batches = Batches(run, BATCH, devices)

  def features(image_BHWC: np.ndarray) -> np.ndarray:
    found = np.concatenate([*batches(images.to_float(image_BHWC), weights)]).astype(np.float16)
    if not np.isfinite(found).all():
      raise InputError(
        f"Features of {config.teacher.name} are beyond float16; leave config.teacher.cache empty."
      )
    return found

  one = jax.eval_shape(run, weights, jax.ShapeDtypeStruct((1, size, size, 3), np.float32))
  return features, one.size * np.dtype(np.float16).itemsize


def write(
  config: FrozenConfigDict,
  source: sources.Source,
  indices: np.ndarray,
  pieces: Iterable[np.ndarray],
) -> None:
  """Writes the file of a configuration's features from all of them, a few rows at a time."""
  path = place_of(config, source, indices)
  total, cells = np.zeros(()), 0
  with atomic_file(path) as file:
    for number, piece in enumerate(pieces):
      if not number:
        shape = (len(indices), *piece.shape[1:])
        header = {"descr": "<f2", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
      file.write(piece.astype("<f2").tobytes())
      rows = piece.reshape(-1, piece.shape[-1])
      total, cells = total + rows.sum(0, dtype=np.float64), cells + len(rows)
    mean = {"mean": (total / cells).tolist()}
    write_json(path.with_suffix(".json"), _origin(config, source, indices) | mean)


def place_of(config: FrozenConfigDict, source: sources.Source, indices: np.ndarray) -> Path:
  """The file of a configuration's features, whether there is one or not."""
  origin = json.dumps(_origin(config, source, indices), sort_keys=True)
  digest = hashlib.sha256(origin.encode()).hexdigest()
  folder = local_place(config.teacher.cache, "config.teacher.cache")
  return folder / f"{config.teacher.name}-{digest[:16]}.npy"


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
