"""What every image source offers, and how its bytes become a picture."""

from __future__ import annotations

import abc
import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from vavae_jax.common.errors import InputError
from vavae_jax.data.sources import deep
from vavae_jax.data.sources.metadata import upright, without_metadata

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Of the longer side to the shorter: a few bytes may claim a line of which a crop fills all memory.
_MAX_ASPECT = 50


class Unreadable(InputError):
  """A picture that cannot be decoded; the message names it."""


class Source(abc.ABC):
  """A random-access set of labelled pictures; it can be pickled, for worker processes."""

  class_names: list[str]
  # What was found beside the pictures, or guessed about them, for people.
  beside = ""
  # Whether `keys` are names, which stay with their records, and no positions.
  has_names = False

  @abc.abstractmethod
  def __len__(self) -> int: ...

  @abc.abstractmethod
  def encoded(self, index: int) -> tuple[bytes, int]:
    """(the picture's file as it is, label); `Unreadable` where it is damaged."""

  @abc.abstractmethod
  def name(self, index: int) -> str:
    """How a person finds the record."""

  def keys(self) -> Sequence[str]:
    """What tells the records apart, wherever the data lies: names, else positions."""
    return [str(i) for i in range(len(self))]

  def sizes(self) -> np.ndarray:
    """Bytes of each picture's file, int64 [n]; 0 where the listing says nothing of them."""
    return np.zeros(len(self), np.int64)

  @abc.abstractmethod
  def identity(self) -> str:
    """Equal for two sources if they have the same pictures in the same order."""

  def listing(self) -> str:
    """A hash that copies share; it changes if records are added, removed, reordered or resized."""
    return self.identity()  # for sources that do not note where or when they were copied

  def picture(self, index: int) -> tuple[Image.Image, int]:
    """(RGB picture, label); `Unreadable` where it is damaged."""
    data, label = self.encoded(index)
    return decode(data, self.name(index)), label

  def __getitem__(self, index: int) -> dict[str, Any]:
    """{"image": uint8 [H, W, 3], "label": int}."""
    picture, label = self.picture(index)
    return {"image": np.asarray(picture), "label": label}


def checked_label(label: Any, source: Source, index: int) -> int:
  """A record's label; InputError if it is not one of the classes."""
  if not isinstance(label, int | np.integer) or not 0 <= label < len(source.class_names):
    raise InputError(
      f"{source.name(index)} has the label {label!r} of {len(source.class_names)} classes: it is "
      "of a split without labels, or of another set."
    )
  return int(label)


class Named(Source):
  """A source that has a name for each record."""

  names: list[str]
  has_names = True

  def __len__(self) -> int:
    return len(self.names)

  def keys(self) -> Sequence[str]:
    return self.names

  def listing(self) -> str:
    sizes = self.sizes().tolist()
    return listing_of(
      f"{key}\0{size}" if size else key for key, size in zip(self.keys(), sizes, strict=True)
    )


def decode(data: bytes, name: str) -> Image.Image:
  """A picture's file, in one of `_FORMATS` -> RGB, 8 bits, as a person sees it.

  Upright by its orientation, on white if it is transparent, 16 bits scaled to 8, the first one of
  an animation; no other metadata is read. Unreadable, by its name, if it is damaged, huge, or no
  picture.
  """
  try:
    data, orientation = without_metadata(data)
    with Image.open(io.BytesIO(data), formats=_FORMATS) as picture:
      if max(picture.size) > _MAX_ASPECT * min(picture.size):
        raise ValueError(f"it is {picture.width} x {picture.height}; no crop of that makes sense")
      return upright(_as_rgb(picture, data, name), orientation)
  except UnidentifiedImageError as error:
    raise Unreadable(
      f"The picture {name} is of no format that can be read ({', '.join(_FORMATS)}), or of a rare "
      "kind of one; convert or remove it."
    ) from error
  except Exception as error:  # decoders raise whatever a damaged file leads them to
    raise Unreadable(
      f"The picture {name} cannot be read ({error}); remove or replace it."
    ) from error


def _as_rgb(opened: ImageFile.ImageFile, data: bytes, name: str) -> Image.Image:
  """RGB of an opened picture, which keeps its format and its `info`."""
  if opened.mode == "F":
    raise ValueError("its pixels are floats without a known white; save it with 8 bits")
  picture = deep.of_8_bits(opened, data, name) if deep.has_16_bits(opened) else opened
  picture.load()
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
  rgb = picture.convert("RGB")
  rgb.format, rgb.info = opened.format, opened.info
  return rgb


def listing_of(names: Iterable[str]) -> str:
  """A hash of names in their order."""
  return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()


def hash_names(names: Sequence[str], salt: str = "") -> np.ndarray:
  """A hash of each name, uint64 [n]."""
  digests = (
    hashlib.blake2b((salt + name).encode(errors="surrogateescape"), digest_size=8).digest()
    for name in names
  )
  return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def identity_of(paths: Iterable[str]) -> str:
  """A hash of files' names, sizes and times of change."""
  digest = hashlib.sha256()
  for path in paths:
    status = status_of(path)
    line = f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n"
    digest.update(line.encode(errors="surrogateescape"))
  return digest.hexdigest()


def status_of(path: str) -> os.stat_result:
  """What the system knows of a file, or of a link to nothing."""
  return os.stat(path) if os.path.exists(path) else os.lstat(path)
