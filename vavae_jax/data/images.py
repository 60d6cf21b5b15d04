"""Crops of pictures, and batches of them.

Pictures stay uint8 until they are on the device: a quarter of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from vavae_jax.data import order
from vavae_jax.data.sources import Source

if TYPE_CHECKING:
  import grain  # which takes half a second


A = TypeVar("A", jax.Array, np.ndarray)
KEPT = 2**30  # bytes of crops that stay in memory, of a process


class Rows(Protocol):
  """An array [N, ...], or what gives its rows."""

  def __getitem__(self, records: np.ndarray) -> np.ndarray: ...


def center_crop(picture: Image.Image, size: int) -> np.ndarray:
  """An RGB picture -> uint8 [size, size, 3], as extraction and generation's evaluation crop.

  Box halvings, bicubic to the short side, centre: ADM's `center_crop_arr`.
  """
  while min(picture.size) >= 2 * size:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  picture = _short_side_to(picture, size, Image.Resampling.BICUBIC)
  left, top = (picture.width - size) // 2, (picture.height - size) // 2
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def random_crop(picture: Image.Image, size: int, rng: np.random.Generator) -> np.ndarray:
  """The crop of tokenizer training: short side to `size`, bilinear; a random place."""
  picture = _short_side_to(picture, size, Image.Resampling.BILINEAR)
  left = int(rng.integers(picture.width - size + 1))
  top = int(rng.integers(picture.height - size + 1))
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def resize_crop(picture: Image.Image, size: int) -> np.ndarray:
  """The crop of the tokenizer's evaluation: short side to `size`, bilinear, centre.

  Source: torchvision's Resize (the long side rounded down) and CenterCrop, as the reference's
  `evaluate_tokenizer.py` has them.
  """
  short = min(picture.size)
  width, height = (size * side // short for side in picture.size)
  picture = picture.resize((width, height), Image.Resampling.BILINEAR)
  left, top = round((width - size) / 2), round((height - size) / 2)
  return np.asarray(picture.crop((left, top, left + size, top + size)))


# Those without chance; "random" is the other.
FIXED_CROPS: dict[str, Callable[[Image.Image, int], np.ndarray]] = {
  "center": center_crop,
  "resize": resize_crop,
}
CROPS = ("random", *FIXED_CROPS)


def _short_side_to(picture: Image.Image, size: int, filter_: Image.Resampling) -> Image.Image:
  scale = size / min(picture.size)
  return picture.resize((round(picture.width * scale), round(picture.height * scale)), filter_)


def training_batches(
  source: Source,
  indices: np.ndarray,
  share: order.Share,
  *,
  size: int,
  seed: int,
  crop: str = "random",
  flip: bool = False,
  features: Rows | None = None,
) -> grain.IterDataset:
  """Endless shuffled batches of crops of the pictures at `indices`, the same for the same seed.

  A batch is {"image": uint8 [B, size, size, 3], "label": int32 [B]}, with "features" where these
  are given. `crop` is one of `CROPS`; with `flip` a seeded coin mirrors each picture or not. Crops
  without chance are made once where all of them have at most `KEPT` bytes.
  """
  places = order.Order(len(indices), seed)
  keeps = crop in FIXED_CROPS and 3 * size**2 * len(indices) * max(share.workers, 1) <= KEPT
  kept: dict[int, tuple[np.ndarray, int]] = {}

  def fixed(record: int) -> tuple[np.ndarray, int]:
    found = kept.get(record)
    if found is None:
      picture, label = source.picture(int(indices[record]))
      found = FIXED_CROPS[crop](picture, size), label
      if keeps:
        kept[record] = found
    return found

  def load(positions: np.ndarray) -> dict[str, np.ndarray]:
    records, epochs = places.records(positions)
    image = np.empty((len(records), size, size, 3), np.uint8)
    label = np.empty(len(records), np.int32)
    for i, (record, epoch) in enumerate(zip(records.tolist(), epochs.tolist(), strict=True)):
      rng: Any = places.rng(record, epoch) if flip or crop == "random" else None
      if crop == "random":
        picture, label[i] = source.picture(int(indices[record]))
        cropped = random_crop(picture, size, rng)
      else:
        cropped, label[i] = fixed(record)
      image[i] = cropped[:, ::-1] if flip and rng.integers(2) else cropped
    batch: dict[str, np.ndarray] = {"image": image, "label": label}
    if features is not None:
      batch["features"] = features[records]
    return batch

  return order.batches(share, load)


def load_crops(source: Source, indices: np.ndarray, size: int) -> np.ndarray:
  """Centre crops of some records, uint8 [len(indices), size, size, 3]."""
  if not len(indices):
    return np.zeros((0, size, size, 3), np.uint8)
  return np.stack([center_crop(source.picture(int(i))[0], size) for i in indices])


def to_float(image_BHWC: A) -> A:
  """uint8 in [0, 255] -> float32 in [-1, 1], where it is: on a device or on the host."""
  return image_BHWC.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image_BHWC: A) -> A:
  """float in [-1, 1] -> uint8 of clip(127.5 x + 128, 0, 255), truncated as the reference does;
  where it is.
  """
  return (127.5 * image_BHWC.astype(jnp.float32) + 128.0).clip(0, 255).astype(jnp.uint8)
