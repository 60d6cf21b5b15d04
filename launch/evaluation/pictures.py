"""Sets of pictures, read piece by piece: 50,000 pictures of 256 px would be 10 GB in memory."""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from launch import restore
from launch.evaluation.features import Network
from launch.evaluation.sample_files import DAMAGES, FIRST, Npz
from launch.sample import Sampler, make_sampler
from lightningdit_jax.store.latents import LatentStore, shard_files
from lightningdit_jax.store.space import labels_for
from vavae_jax.common import mesh
from vavae_jax.common.batches import Batches
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import BUCKETS, at_home, is_url, place
from vavae_jax.data import changes, images, selection, sources

STATISTICS = ("mu", "sigma")


class PictureSet(Protocol):
  """Pictures of one size, in a fixed order; `size` is their side, 0 where they are no squares."""

  size: int

  @property
  def about(self) -> dict[str, Any]:
    """What they are, for a JSON file; two sets that agree in it have the same pictures."""

  def __len__(self) -> int: ...

  def read(self, start: int, stop: int) -> np.ndarray:
    """uint8 [stop - start, H, W, 3]."""


def take(pictures: PictureSet, indices: Sequence[int]) -> np.ndarray:
  """Some of them, uint8 [len(indices), H, W, 3]."""
  return np.concatenate([pictures.read(int(i), int(i) + 1) for i in indices])


def classes_of(pictures: PictureSet, network: Network) -> tuple[np.ndarray, list[str]]:
  """(label of each, names of the classes), both empty where nobody knows them.

  Those of a source, which have to be read, are known for a network that is a classifier alone.
  """
  unread = isinstance(pictures, FromSource) and "scores" not in network.sizes
  labels, names = ((), []) if unread else getattr(pictures, "classes", ((), []))
  labels = np.asarray(labels)
  return (labels, names) if labels.shape == (len(pictures),) else (np.zeros(0, int), [])


class Array:
  """Pictures in memory, for evaluations in a program."""

  def __init__(self, pictures_NHWC: np.ndarray):
    self._pictures = pictures_NHWC
    self.size = _side(pictures_NHWC.shape[1:3])
    digest = hashlib.sha256(pictures_NHWC.tobytes()).hexdigest()
    self.about = {"kind": "array", "sha256": digest, "pictures": len(self)}

  def __len__(self) -> int:
    return len(self._pictures)

  def read(self, start: int, stop: int) -> np.ndarray:
    return self._pictures[start:stop]


def _side(shape: Sequence[int]) -> int:
  height, width = shape
  return int(height) if height == width else 0


class FromSource:
  """Pictures of an image source, cropped; or as they are, if all have one size."""

  def __init__(
    self,
    spec: str,
    size: int = 0,
    *,
    crop: str = "center",
    indices: np.ndarray | None = None,
    limit: int = 0,
    max_corrupt: int = 0,
  ):
    """Args:
    size: side of the crops in pixels; 0: no crop.
    crop: one of `images.FIXED_CROPS`.
    indices: ascending; None: all.
    limit: number of them, by a seeded choice; 0: all.
    max_corrupt: how many unreadable pictures are replaced by a neighbour.
    """
    self.source = sources.open_source(spec)
    listing, identity = self.source.listing(), self.source.identity()
    chosen = np.arange(len(self.source)) if indices is None else indices
    if limit:
      chosen = np.sort(np.random.default_rng(0).permutation(chosen)[:limit])
    self.indices = chosen
    if max_corrupt:
      self.source = sources.Tolerant(self.source, max_corrupt, chosen)
    self._crop = images.FIXED_CROPS[crop]
    self._own = None if size or not len(chosen) else self.source.picture(int(chosen[0]))[0].size
    self.size = size or (_side(self._own) if self._own else 0)
    self.about = {
      "kind": "source",
      "source": spec,
      "listing": listing,
      "identity": identity,  # a file written again is another picture
      "chosen": hashlib.sha256(np.asarray(chosen, np.int64).tobytes()).hexdigest(),
      "pictures": len(self),
      "crop": f"{crop} {size} px" if size else "none",
    }

  def __len__(self) -> int:
    return len(self.indices)

  def read(self, start: int, stop: int) -> np.ndarray:
    with ThreadPoolExecutor() as pool:
      return np.stack(list(pool.map(self._one, self.indices[start:stop].tolist())))

  @functools.cached_property
  def classes(self) -> tuple[np.ndarray, list[str]]:
    """As `classes_of`."""
    if len(self.source.class_names) < 2:
      return np.zeros(0, int), []
    with ThreadPoolExecutor() as pool:
      found = pool.map(self.source.encoded, self.indices.tolist())
      return np.array([label for _, label in found], int), self.source.class_names

  def _one(self, index: int) -> np.ndarray:
    picture, _ = self.source.picture(index)
    if self._own is None:
      return self._crop(picture, self.size)
    if picture.size != self._own:
      width, height = self._own
      raise InputError(
        f"{self.source.name(index)} is {picture.width} x {picture.height} and the first picture "
        f"{width} x {height}; give pictures of one size, or --image_size to crop them."
      )
    return np.asarray(picture)


def sampler_of(
  diffusion: restore.Trained,
  tokenizer: restore.Trained,
  settings: FrozenConfigDict,
  seed: int,
  guide: restore.Trained | None = None,
) -> Sampler:
  """A sampler for all checkpoints and averages of a training, by this process's devices, which have
  the tokenizer's parameters; perhaps guided away from another model.
  """
  space, devices = restore.space_of(diffusion), mesh.local_mesh()
  away = guide and guide.on(devices)
  return make_sampler(diffusion.config, space, tokenizer, settings, seed, devices, away)


class Sampled:
  """Samples of a trained model, drawn when they are read; `settings` are as `config.sample`.

  `sampler` is `sampler_of` settings of the same `program_of`, the same seed and guide, if that is
  there already.
  """

  def __init__(
    self,
    diffusion: restore.Trained,
    tokenizer: restore.Trained,
    settings: FrozenConfigDict,
    *,
    count: int,
    labels: str,
    seed: int,
    sampler: Sampler | None = None,
    guide: restore.Trained | None = None,
  ):
    self.size = tokenizer.config.data.image_size
    space, classes = restore.space_of(diffusion), diffusion.config.model.num_classes
    self._labels = labels_for(labels, count, classes, seed, space.class_names)
    self.classes = self._labels, list(space.class_names)
    devices = mesh.local_mesh()
    sampler = sampler or sampler_of(diffusion, tokenizer.on(devices), settings, seed, guide)
    self._run = functools.partial(sampler, diffusion.on(devices).params, now=settings)
    self.about = {
      "kind": "sampled",
      "diffusion": diffusion.sha256,
      "diffusion_step": diffusion.step,
      "ema": diffusion.ema,
      "tokenizer": tokenizer.sha256,
      **({"guide": guide.sha256} if guide else {}),
      "pictures": count,
      "labels": labels,
      "seed": seed,
      **{k: v for k, v in settings.to_dict().items() if k != "batch_size"},
    }

  def __len__(self) -> int:
    return len(self._labels)

  def read(self, start: int, stop: int) -> np.ndarray:
    return self._run(np.arange(start, stop), self._labels[start:stop])


def side_of(tokenizer: restore.Trained, store: LatentStore) -> int:
  """The side of the pictures that a tokenizer makes of latents, 0 where they are no squares."""
  return tokenizer.config.data.image_size if _side(store.shape[:2]) else 0


def decoder_of(
  tokenizer: restore.Trained, batch_size: int = 64
) -> Callable[[np.ndarray], np.ndarray]:
  """A compiled function from latents, float32 [n,h,w,Z], to pictures, uint8 [n,H,W,3]."""
  devices = mesh.local_mesh()
  here = tokenizer.on(devices)

  @jax.jit
  def decode(params: Any, z_BhwZ: jax.Array) -> jax.Array:
    return restore.autoencoder(here.config, params).decode_uint8(z_BhwZ)

  batches = Batches(decode, batch_size, devices)
  return lambda z_BhwZ: np.concatenate(list(batches(z_BhwZ, here.params)))


class Decoded:
  """The pictures that a tokenizer makes of a latent store."""

  def __init__(self, store: LatentStore, tokenizer: restore.Trained):
    self.size = side_of(tokenizer, store)
    self._store, self._decode = store, decoder_of(tokenizer)
    self.about = {
      "kind": "latents",
      "latents": store.sha256,
      "posterior": "mean" if store.has_posteriors else "as stored",
      "tokenizer": tokenizer.sha256,
      "pictures": len(store),
    }

  def __len__(self) -> int:
    return len(self._store)

  def read(self, start: int, stop: int) -> np.ndarray:
    z_BhwZ = np.empty((stop - start, *self._store.shape), np.float32)
    self._store.read(np.arange(start, stop), np.zeros(stop - start, bool), out=z_BhwZ)
    return self._decode(z_BhwZ)


def own_pictures(
  tokenizer: restore.Trained,
  *,
  held_out: bool,
  size: int = 0,
  crop: str = "center",
  limit: int = 0,
) -> FromSource:
  """Pictures that a tokenizer was trained on, or those it was not; see `selection.share`.

  The crops are `FromSource`'s; a size of 0 is that of the training. InputError if the data has
  changed since.
  """
  data = restore.data_of(tokenizer)
  changes.check(tokenizer.workdir, data)
  return FromSource(
    data.source,
    size or data.image_size,
    crop=crop,
    indices=selection.share(data, held_out),
    limit=limit,
    max_corrupt=data.max_corrupt,
  )


def _place(spec: str) -> Path:
  """Of a file or folder that is named without the kind of its source."""
  return place(spec) if spec.partition("://")[0] in BUCKETS else Path(at_home(spec))


def open_pictures(spec: str, *, image_size: int = 0, tokenizer: str = "") -> PictureSet:
  """An existing set of pictures; InputError if there are none.

  `spec` is an npz, a folder of pictures or of latents, or an image source such as zip:FILE;
  `image_size` the side of ADM's centre crop, of folders and sources, 0: as they are; `tokenizer`
  the workdir of the latents' tokenizer, "": as the latents say.
  """
  path = _place(spec)
  if path.is_dir() and shard_files(path):
    store = LatentStore(path)
    pictures: PictureSet = Decoded(store, restore.tokenizer_of_latents(store, tokenizer))
  elif path.is_dir():
    pictures = FromSource(f"folder:{path}", image_size)
  elif path.suffix == ".npz" and (is_url(path) or ":" not in spec):
    if not path.is_file():
      raise InputError(f"There is no file {path}.")
    pictures = Npz(path)
  else:
    pictures = FromSource(spec, image_size)
  if not len(pictures):
    raise InputError(f"{spec} has no pictures.")
  return pictures


def stored_statistics(spec: str) -> dict[str, np.ndarray]:
  """The mean "mu" [F] and covariance "sigma" [F,F] of an npz, as ADM and pytorch-fid store them.

  If the file has them, also "mu_s", "sigma_s" of sFID's features, and what `launch.evaluate
  statistics` wrote: "about", a JSON text, and "size", as `PictureSet.size`; {} for any other file.
  """
  path = _place(spec)
  if path.suffix != ".npz" or not path.is_file():
    return {}
  try:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
      names = (*STATISTICS, "mu_s", "sigma_s", "about", "size")
      found = {name: stored[name] for name in names if name in stored}
  except DAMAGES as error:
    raise InputError(f"{path} is damaged or not an npz ({error}).") from error
  return found if all(name in found for name in STATISTICS) else {}


def has_pictures(spec: str) -> bool:
  """Whether an npz has pictures beside or instead of statistics."""
  with _place(spec).open("rb") as file, zipfile.ZipFile(file) as archive:
    return FIRST in archive.namelist()
