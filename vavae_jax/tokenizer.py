"""A trained tokenizer for use from Python: pictures in, latents out, and back.

  tokenizer = Tokenizer.load("model/")        # a model folder, USER/NAME on the hub, or a workdir
  z = tokenizer.encode(picture)               # float32 [h, w, Z]
  again = tokenizer.decode(z)                 # a PIL picture

Compiled once for each size; several devices share a batch; a batch that memory does not hold is
halved, and a large picture runs in tiles.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import ExifTags, Image

from vavae_jax import folder, tiling, training
from vavae_jax.autoencoder import Autoencoder, Options
from vavae_jax.common import functional, keys, mesh
from vavae_jax.common.batches import as_fits
from vavae_jax.common.checkpoints import load_weights
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import at_home
from vavae_jax.common.keys import DTYPES, Key
from vavae_jax.data import images
from vavae_jax.data.sources.base import decode
from vavae_jax.data.sources.metadata import upright
from vavae_jax.update import build_autoencoder

Picture = Image.Image | np.ndarray | str | os.PathLike[str]

# What is not fixed of the network.
MODEL: dict[str, Key] = {
  name: key
  for name, key in keys.of(Options).items()
  if name not in ("in_channels", "out_ch", "double_z", "dropout")
} | {"z_channels": Key(32, "[1, 65536]", "Channels between encoder and bottleneck.")}
# The tokenizer's section of a model folder: keys of its training that say how it is used.
SETTINGS: dict[str, Any] = {
  "model": MODEL,
  "data": {"image_size": Key(256, "[1, 65536]", "Of the pictures that it was trained on.")},
  "dtype": Key("float32", DTYPES, "Of convolutions."),
}
_PIXELS_AT_ONCE = 2**20  # 16 pictures of 256 x 256
_LARGEST = 1024  # pixels along a side that run in one pass
_TILE, _OVERLAP = 32, 4  # cells


class Tokenizer:
  """An autoencoder with its weights.

  Attributes:
    config: the keys of `SETTINGS`, as a training's configuration has them.
    image_size: pixels along each side of the pictures that it was trained on.
    downsampling: pixels of a latent's cell along each side.
    channels: of a latent, Z.
  """

  def __init__(self, config: FrozenConfigDict, params: Any, origin: dict[str, Any] | None = None):
    """`params` are the autoencoder's nested dicts of arrays, `origin` as in `folder.Part`."""
    self.config, self.params = folder.frozen(SETTINGS, config), params
    self.origin = origin or {"sha256": functional.fingerprint({"autoencoder": params})}
    outline = functional.outline(build_autoencoder(self.config), "model")
    self.image_size, self.downsampling = config.data.image_size, outline.downsampling
    self.channels = outline.embed_dim
    self._devices = mesh.local_mesh()
    self._placed = jax.device_put(params, mesh.replicated(self._devices))

  @classmethod
  def load(
    cls, source: str | os.PathLike[str], *, step: int | None = None, ema: float | None = None
  ) -> Tokenizer:
    """The tokenizer of a model folder, by its path or USER/NAME on the hub, or of a workdir.

    `step` and `ema` choose a workdir's checkpoint and average: the newest, the first. InputError if
    there is none, it is damaged, or of an unknown version.
    """
    path = folder.find(source)
    if folder.is_model(path):
      part, _ = folder.load(path, "tokenizer", SETTINGS, build_autoencoder, step, ema)
      config = FrozenConfigDict(ConfigDict(part.settings))
      return cls(config, part.params, part.origin)
    config = folder.workdir_config(path, "tokenizer")
    params, step, ema = load_weights(path, config, training.init_state, step, ema)
    origin = {"step": step, "ema": ema, "sha256": functional.fingerprint(params)}
    return cls(config, params["autoencoder"], origin)

  @property
  def sha256(self) -> str:
    """Identifies its weights."""
    return self.origin["sha256"]

  def save(
    self,
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    files: dict[str, bytes] | None = None,
  ) -> None:
    """Writes a model folder; `dtype`, "float32" or "bfloat16", is of the weights on disk."""
    there = Path(at_home(os.fspath(path)))
    folder.save(there, {"tokenizer": self.part}, dtype=dtype, about={}, files=files)

  @property
  def part(self) -> folder.Part:
    """What a model folder keeps of it."""
    return folder.Part(self.config.to_dict(), self.params, self.origin)

  def encode(self, pictures: Picture | Sequence[Picture]) -> Any:
    """Latents of pictures: the means of their posteriors, not normalised.

    Args:
      pictures: one or a list: PIL pictures, files, or uint8 arrays [H, W, 3] or [B, H, W, 3], of
        any sizes. What the cells do not divide is cropped at the edges.

    Returns:
      float32 [h, w, Z] of one picture; of several [B, h, w, Z], or a list if their sizes differ.
    """
    given, is_one = _several(pictures)
    latents = self._by_shape(self._encode, [self._cropped(picture) for picture in given])
    if is_one:
      return latents[0]
    return np.stack(latents) if len({z.shape for z in latents}) == 1 else latents

  def decode(self, latents: Any) -> Any:
    """The PIL picture of a latent [h, w, Z], or a list of those of [B, h, w, Z] or a list."""
    is_one = not isinstance(latents, Sequence) and np.ndim(latents) == 3
    several = [latents] if is_one or not np.iterable(latents) else latents
    given = [keys.floats(z, "A latent") for z in several]
    for z in given:
      if z.ndim != 3 or z.shape[-1] != self.channels or not z.size:
        raise InputError(f"A latent is {z.shape}; this tokenizer's are [h, w, {self.channels}].")
      if not np.isfinite(z).all():
        raise InputError("A latent has numbers that are not finite; no picture comes of it.")
    pictures = [Image.fromarray(x) for x in self._by_shape(self._decode, given)]
    return pictures[0] if is_one else pictures

  def _cropped(self, picture: Picture) -> np.ndarray:
    """uint8 [H, W, 3], of whole cells."""
    if isinstance(picture, str | os.PathLike):
      picture = decode(Path(picture).read_bytes(), os.fspath(picture))
    if isinstance(picture, Image.Image):
      picture = np.asarray(_rgb(picture))
    image = np.asarray(picture)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
      raise InputError(
        f"A picture is {image.dtype} {image.shape}; give uint8 [H, W, 3], a PIL picture or a file."
      )
    sides = [side // self.downsampling * self.downsampling for side in image.shape[:2]]
    if not all(sides):
      raise InputError(
        f"A picture is {image.shape[1]} x {image.shape[0]} pixels; a cell of this tokenizer has "
        f"{self.downsampling} x {self.downsampling}. Enlarge it."
      )
    top, left = ((side - kept) // 2 for side, kept in zip(image.shape, sides, strict=False))
    return image[top : top + sides[0], left : left + sides[1]]

  def _by_shape(
    self, run: Callable[[np.ndarray], np.ndarray], arrays: list[np.ndarray]
  ) -> list[np.ndarray]:
    """The results of arrays, those of one shape together."""
    found: dict[int, np.ndarray] = {}
    for shape in dict.fromkeys(x.shape for x in arrays):
      places = [i for i, x in enumerate(arrays) if x.shape == shape]
      found |= zip(places, run(np.stack([arrays[i] for i in places])), strict=True)
    return [found[i] for i in range(len(arrays))]

  def _encode(self, image_BHWC: np.ndarray) -> np.ndarray:
    if max(image_BHWC.shape[1:3]) <= _LARGEST:
      return self._as_fits(1, self._run_encode, image_BHWC)
    image = images.to_float(image_BHWC)  # on the host, as below: devices see one tile at a time
    return np.asarray(tiling.encode_tiled(self._network(), image, **self._tiles(1)).mode())

  def _decode(self, z_BhwZ: np.ndarray) -> np.ndarray:
    scale = self.downsampling
    if max(z_BhwZ.shape[1:3]) * scale <= _LARGEST:
      return self._as_fits(scale, self._run_decode, z_BhwZ)
    return images.to_uint8(tiling.decode_tiled(self._network(), z_BhwZ, **self._tiles(scale)))

  def _as_fits(self, scale: int, run: Callable[[Any], Any], batch: np.ndarray) -> np.ndarray:
    """run(batch) [B, h, w, ...], of `scale` x `scale` pixels each, in parts and on all devices."""
    pixels = batch.shape[1] * batch.shape[2] * scale**2
    return as_fits(run, batch, max(_PIXELS_AT_ONCE // pixels, 1), self._devices)

  def _tiles(self, scale: int) -> dict[str, Any]:
    sizes = {"tile": _TILE * self.downsampling, "overlap": _OVERLAP * self.downsampling}
    return {**sizes, "through": functools.partial(self._as_fits, scale)}

  def _network(self) -> Autoencoder:
    return nnx.merge(functional.graph_of(build_autoencoder(self.config)), self._placed)

  def _run_encode(self, image_BHWC: jax.Array) -> jax.Array:
    return _encode_mode(self.config, self._placed, image_BHWC)

  def _run_decode(self, z_BhwZ: jax.Array) -> jax.Array:
    return _decode_uint8(self.config, self._placed, z_BhwZ)


@jax.jit(static_argnums=0)
def _encode_mode(config: FrozenConfigDict, params: Any, image_BHWC: jax.Array) -> jax.Array:
  model = nnx.merge(functional.graph_of(build_autoencoder(config)), params)
  return model.encode(images.to_float(image_BHWC)).mode()


@jax.jit(static_argnums=0)
def _decode_uint8(config: FrozenConfigDict, params: Any, z_BhwZ: jax.Array) -> jax.Array:
  model = nnx.merge(functional.graph_of(build_autoencoder(config)), params)
  return model.decode_uint8(z_BhwZ)


def _several(pictures: Any) -> tuple[Sequence[Picture], bool]:
  """(a list of pictures, whether only one was given)."""
  if hasattr(pictures, "ndim"):  # NumPy's or another's
    pictures = np.asarray(pictures)
    is_one = pictures.ndim != 4
  else:
    is_one = isinstance(pictures, Image.Image | str | os.PathLike) or not np.iterable(pictures)
  return ([pictures] if is_one else pictures), is_one


def _rgb(picture: Image.Image) -> Image.Image:
  """Three channels of 8 bits, upright, on white where the picture is transparent."""
  if picture.mode[0] in "IF" or picture.mode == "La":
    raise InputError(f"A picture has the mode {picture.mode}; convert it to RGB first.")
  picture = upright(picture, picture.getexif().get(ExifTags.Base.Orientation, 1))
  if picture.has_transparency_data:
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture.convert("RGBA"))
  return picture.convert("RGB")
