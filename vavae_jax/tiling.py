"""Pictures too large for one pass, encoded and decoded in overlapping tiles.

All tiles of a picture have one size, so that the network compiles once: the last one of a row or
column is moved inwards, not padded. Overlaps are blended linearly. The device holds one tile of
each picture at a time, or of fewer as `through` says; pictures stay in the host's memory.

Notable: GroupNorm and attention see a tile instead of the picture, so that the result differs from
that of one pass; larger tiles differ less. The overlap hides the seams.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vavae_jax.autoencoder import Autoencoder, Posterior
from vavae_jax.common.errors import InputError

Run = Callable[[Any], Any]  # from tiles of a batch to what comes of them, both [B, ...]
Through = Callable[[Run, np.ndarray], Any]


def _as_one(run: Run, batch: np.ndarray) -> Any:
  return run(batch)


def encode_tiled(
  model: Autoencoder,
  image_BHWC: Any,
  *,
  tile: int = 512,
  overlap: int = 64,
  through: Through = _as_one,
) -> Posterior:
  """The posterior of a large picture's latent, as `Autoencoder.encode` has it.

  `tile`, the height and width of a tile, and `overlap`, the least that neighbours share, are pixels
  and multiples of `model.downsampling`; in the overlap means and log variances are blended. A
  picture no larger than a tile runs in one pass. `through(run, batch)` is run(batch), perhaps in
  parts, for the tiles of all pictures at one place. InputError if anything does not fit.
  """
  factor = model.downsampling
  cells = _in_cells(tile, overlap, factor)
  moments = _in_tiles(
    _moments, model, image_BHWC, *cells, scale_in=factor, scale_out=1, through=through
  )
  return Posterior.from_moments(jnp.asarray(moments))


def decode_tiled(
  model: Autoencoder,
  z_BhwZ: Any,
  *,
  tile: int = 512,
  overlap: int = 64,
  through: Through = _as_one,
) -> np.ndarray:
  """The picture of a large latent, float32 on the host; arguments as for `encode_tiled`."""
  factor = model.downsampling
  cells = _in_cells(tile, overlap, factor)
  return _in_tiles(_decode, model, z_BhwZ, *cells, scale_in=1, scale_out=factor, through=through)


@jax.jit
def _moments(model: Autoencoder, image_BHWC: jax.Array) -> jax.Array:
  posterior = model.encode(image_BHWC)
  return jnp.concatenate([posterior.mean, posterior.logvar], axis=-1)


@jax.jit
def _decode(model: Autoencoder, z_BhwZ: jax.Array) -> jax.Array:
  return model.decode(z_BhwZ)


def _in_cells(tile: int, overlap: int, factor: int) -> tuple[int, int]:
  """Tile and overlap in latent cells."""
  if not 0 <= overlap < tile or tile % factor or overlap % factor:
    raise InputError(
      f"tile={tile} and overlap={overlap} do not fit this tokenizer: both are pixels, multiples of "
      f"{factor}, and the overlap is less than the tile and not negative."
    )
  return tile // factor, overlap // factor


def _in_tiles(
  run: Callable[[Autoencoder, Any], jax.Array],
  model: Autoencoder,
  x: Any,
  tile: int,
  overlap: int,
  *,
  scale_in: int,
  scale_out: int,
  through: Through,
) -> np.ndarray:
  """run(model, x), tile by tile, put together on the host.

  `run` is jitted, from [B, scale_in * h, scale_in * w, ...] to [B, scale_out * h, scale_out * w,
  ...] float32, for any h and w; `tile` and `overlap` are in the same unit as these.
  """
  whole = jax.eval_shape(run, model, x)  # which refuses an x that does not fit, as one pass would
  x = np.asarray(x)  # slices of device arrays would compile, each for itself
  h, w = (size // scale_in for size in x.shape[1:3])
  tile_h, tile_w = min(tile, h), min(tile, w)
  out = np.empty(whole.shape, np.float32)
  row = np.empty((out.shape[0], tile_h * scale_out, *out.shape[2:]), np.float32)
  covered_h = 0
  for top in _starts(h, tile_h, overlap):
    covered_w = 0
    for left in _starts(w, tile_w, overlap):
      rows = slice(top * scale_in, (top + tile_h) * scale_in)
      columns = slice(left * scale_in, (left + tile_w) * scale_in)
      part = np.asarray(through(functools.partial(run, model), x[:, rows, columns]))
      covered_w = _lay(row, part, left * scale_out, covered_w, axis=2)
    covered_h = _lay(out, row, top * scale_out, covered_h, axis=1)
  return out


def _starts(size: int, tile: int, overlap: int) -> list[int]:
  """Where tiles begin along an axis: evenly, but for the last, which ends with the picture."""
  step = max(tile - overlap, 1)  # a tile as large as the picture may be no larger than the overlap
  return [*range(0, size - tile, step), size - tile]


def _lay(canvas: np.ndarray, part: np.ndarray, start: int, covered: int, axis: int) -> int:
  """Lays a part onto a canvas along an axis, in place; returns how far the canvas is filled then.

  It is filled up to `covered`; the part begins at `start`, fades in up to there and ends beyond.
  """
  canvas, part = np.moveaxis(canvas, axis, 0), np.moveaxis(part, axis, 0)
  shared = covered - start
  seam = canvas[start:covered]
  # At the middles of the positions, so that neither side has a weight of 0 or 1.
  weight = (np.arange(shared, dtype=np.float32) + 0.5) / max(shared, 1)
  seam += weight.reshape(-1, 1, 1, 1) * (part[:shared] - seam)
  canvas[covered : start + len(part)] = part[shared:]
  return start + len(part)
