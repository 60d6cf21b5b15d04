"""Image sources -> crops -> grain pipeline of uint8 batches.

A source is any sequence of `{"image": uint8 [H, W, 3], "label": int}` with `class_names`. Pictures
stay uint8 until they are on the device: a quarter of the bytes.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
from pathlib import Path
from typing import Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from vavae_jax.assets import load_emoji
from vavae_jax.errors import InputError

CROPS = ("random", "center")
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Source(Protocol):
  """A random-access set of labelled pictures."""

  class_names: list[str]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict:
    """`{"image": uint8 [H, W, 3], "label": int}`"""

  def identity(self) -> str:
    """Two sources with the same one have the same pictures in the same order."""


class Embedded:
  """The 1,852 Fluent emoji that the package carries, 64 px, in 9 groups."""

  def __init__(self) -> None:
    self._images, self._labels, self.names, self.class_names = load_emoji()

  def __len__(self) -> int:
    return len(self._images)

  def __getitem__(self, index: int) -> dict:
    return {"image": self._images[index], "label": int(self._labels[index])}

  def identity(self) -> str:
    """A hash of the pixels."""
    return hashlib.sha256(self._images.tobytes()).hexdigest()


class Folder:
  """A folder of class folders, nested as deep as one likes; classes and files in sorted order."""

  def __init__(self, root: Path):
    """Args:
      root: `root/CLASS/.../picture.png`.

    Raises:
      InputError: the folder is missing, or holds no pictures in class folders.
    """
    if not root.is_dir():
      raise InputError(f"The data folder {root} does not exist.")
    self.class_names = sorted(
      p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")
    )
    self._records = [
      (path, label)
      for label, name in enumerate(self.class_names)
      for path in sorted((root / name).rglob("*"))
      if path.suffix.lower() in EXTENSIONS
    ]
    if not self._records:
      raise InputError(
        f"The data folder {root} has no pictures: needed are class folders with files ending in "
        f"{', '.join(EXTENSIONS)}, such as {root}/cat/1.png."
      )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict:
    path, label = self._records[index]
    try:
      with Image.open(path) as picture:
        image = np.asarray(_as_rgb(picture))
    except Exception as error:  # decoders raise whatever a damaged file leads them to
      raise InputError(
        f"The picture {path} cannot be read ({error}); remove or replace it."
      ) from error
    return {"image": image, "label": label}

  def identity(self) -> str:
    """A hash of the files' names, sizes and times of change."""
    digest = hashlib.sha256()
    for path, _ in self._records:
      status = path.stat()
      digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _as_rgb(picture: Image.Image) -> Image.Image:
  """Upright, and on white where it is transparent."""
  picture = ImageOps.exif_transpose(picture)
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture)
  return picture.convert("RGB")


def open_source(spec: str) -> Source:
  """The source that a configuration names.

  Args:
    spec: "embedded:emoji" or "folder:DIR".

  Returns:
    The source.

  Raises:
    InputError: unknown kind, or nothing usable there.
  """
  kind, _, rest = spec.partition(":")
  if spec == "embedded:emoji":
    return Embedded()
  if kind == "folder" and rest:
    return Folder(Path(rest).expanduser())
  raise InputError(f'The image source is {spec!r}; choose "embedded:emoji" or "folder:DIR".')


def check_readable(source: Source, limit: int = 2_000) -> None:
  """Decodes all pictures of a source, or `limit` of them spread over it, and throws them away.

  A damaged one beyond those is named when its turn comes.

  Raises:
    InputError: one cannot be read.
  """
  chosen = np.unique(np.linspace(0, len(source) - 1, min(limit, len(source))).astype(int))
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for _ in pool.map(lambda index: source[int(index)] and None, chosen):
      pass


def split(count: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Seeded disjoint indices for training and evaluation.

  Args:
    count: size of the source.
    held_out: share for evaluation, in [0, 1).
    seed: of the choice.

  Returns:
    (training, held-out), each int64 and ascending.
  """
  order = np.random.default_rng(seed).permutation(count)
  size = round(count * held_out)
  return np.sort(order[size:]), np.sort(order[:size])


def center_crop(image_HWC: np.ndarray, size: int) -> np.ndarray:
  """The crop of extraction and evaluation: box halvings, bicubic to the short side, centre.

  Args:
    image_HWC: uint8.
    size: side of the result in pixels.

  Returns:
    uint8 [size, size, 3].

  Source: ADM (openai/guided-diffusion), `center_crop_arr`.
  """
  picture = Image.fromarray(image_HWC)
  while min(picture.size) >= 2 * size:
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  picture = _short_side_to(picture, size, Image.Resampling.BICUBIC)
  left, top = (picture.width - size) // 2, (picture.height - size) // 2
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def random_crop(image_HWC: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
  """The crop of tokenizer training: short side to `size`, random place, no flip.

  Args:
    image_HWC: uint8.
    size: side of the result in pixels.
    rng: chooses the place.

  Returns:
    uint8 [size, size, 3].
  """
  picture = _short_side_to(Image.fromarray(image_HWC), size, Image.Resampling.BILINEAR)
  left = int(rng.integers(picture.width - size + 1))
  top = int(rng.integers(picture.height - size + 1))
  return np.asarray(picture.crop((left, top, left + size, top + size)))


def _short_side_to(picture: Image.Image, size: int, filter_: Image.Resampling) -> Image.Image:
  scale = size / min(picture.size)
  return picture.resize((round(picture.width * scale), round(picture.height * scale)), filter_)


def training_batches(
  source: Source,
  indices: np.ndarray,
  *,
  size: int,
  batch_size: int,
  seed: int,
  crop: str = "random",
  features: np.ndarray | None = None,
) -> grain.IterDataset:
  """Endless shuffled batches of crops, the same for the same seed.

  Args:
    source: where pictures come from.
    indices: which of them, already this process's share.
    size: side of the crops in pixels.
    batch_size: of this process.
    seed: of order and crops.
    crop: one of `CROPS`.
    features: [len(indices), h, w, F], a teacher's of the pictures, to go with them.

  Returns:
    A grain dataset of `{"image": uint8 [B, size, size, 3], "label": int32 [B]}`, with "features"
    where there are some.
  """

  def load(index: int, rng: np.random.Generator) -> dict:
    record = source[int(indices[index])]
    picture = record["image"]
    image = random_crop(picture, size, rng) if crop == "random" else center_crop(picture, size)
    loaded = {"image": image, "label": np.int32(record["label"])}
    return loaded if features is None else loaded | {"features": features[index]}

  return (
    grain.MapDataset.range(len(indices))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(load)
    .batch(batch_size, drop_remainder=True)  # of an endless set; else one of 1 overflows
    # The defaults prefetch hundreds of batches; a few hide the decoding as well.
    .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))
  )


def load_crops(source: Source, indices: np.ndarray, size: int) -> np.ndarray:
  """Centre crops of some records.

  Args:
    source: where pictures come from.
    indices: which of them.
    size: side in pixels.

  Returns:
    uint8 [len(indices), size, size, 3].
  """
  if not len(indices):
    return np.zeros((0, size, size, 3), np.uint8)
  return np.stack([center_crop(source[int(i)]["image"], size) for i in indices])


def to_float(image_BHWC: jax.Array) -> jax.Array:
  """uint8 in [0, 255] -> float32 in [-1, 1]."""
  return image_BHWC.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image_BHWC: jax.Array) -> jax.Array:
  """float in [-1, 1] -> uint8 of clip(127.5 x + 128, 0, 255), truncated as the reference does."""
  return jnp.clip(127.5 * image_BHWC.astype(jnp.float32) + 128.0, 0, 255).astype(jnp.uint8)
