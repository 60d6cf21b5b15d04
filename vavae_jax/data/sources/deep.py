"""Pictures of 16 bits a sample as those of 8, by the bits that they use.

Some programs put 8 or 12 bits into 16 as they are, and the upper 8 are dark. Pillow decodes grey
levels whole; of a colour's sample it keeps the upper or the lower 8, by the order that it is told.
"""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from vavae_jax.common.errors import printable

# TIFF's: bits of each sample, what they mean, and whether colours are kept apart.
_BITS_PER_SAMPLE, _MEANING, _PLANES = 258, 262, 284
_WHITE_IS_ZERO, _APART = 0, 2
_ORDERS = {b"II": "L", b"MM": "B"}
_SWAPPED = {"L": "B", "B": "L"}


def has_16_bits(picture: ImageFile.ImageFile) -> bool:
  """Whether a picture has more than 8 bits a sample."""
  if picture.mode.startswith("I"):
    return True
  declared = max(_tag(picture, _BITS_PER_SAMPLE) or (8,))
  return declared > 8 or (picture.format == "PNG" and ";16" in _raw_mode(picture))


def of_8_bits(picture: ImageFile.ImageFile, data: bytes, name: str) -> Image.Image:
  """A picture of `has_16_bits`, opened from `data`, with 8."""
  return _grey(picture, name) if picture.mode.startswith("I") else _colours(picture, data, name)


def _grey(picture: ImageFile.ImageFile, name: str) -> Image.Image:
  levels = np.array(picture, np.int64)
  if levels.min() < 0 or levels.max() > 65_535:
    raise ValueError(f"its grey levels go from {levels.min()} to {levels.max()}")
  grey = levels >> _shift(picture, int(levels.max()), name)
  if _tag(picture, _MEANING) == _WHITE_IS_ZERO:
    grey = 255 - grey
  clear = picture.info.get("transparency")
  if isinstance(clear, int):
    grey[levels == clear] = 255
  return Image.fromarray(grey.astype(np.uint8))


def _colours(picture: ImageFile.ImageFile, data: bytes, name: str) -> Image.Image:
  # Pillow would divide by the transparency before we know the bits.
  mode = "RGBa" if _raw_mode(picture).startswith("RGBa") else picture.mode
  upper = _half(picture, swapped=False)
  colours = 4 if mode == "CMYK" else 3
  clear = picture.info.get("transparency")  # a level of each colour, which Pillow halves wrongly
  if upper[..., :colours].max() >= 16 and clear is None:
    return picture if mode == picture.mode else _made(mode, upper)
  if _tag(picture, _PLANES) == _APART and picture.info.get("compression", "raw") != "raw":
    raise ValueError(  # Pillow keeps the upper 8, whatever it is told
      "it uses few of the 16 bits of its colours, which are compressed apart; save it with 8 bits"
    )
  with Image.open(io.BytesIO(data), formats=(str(picture.format),)) as again:
    levels = upper.astype(np.int64) << 8 | _half(again, swapped=True)
  shift = _shift(picture, int(levels[..., :colours].max()), name)
  transparency = levels[..., colours:]
  # Where that has all of its bits, as opposed to the colours.
  transparency >>= max(int(transparency.max(initial=0)).bit_length() - 8 - shift, 0)
  scaled = np.minimum(levels >> shift, 255)
  if clear is not None:
    scaled[(levels == clear).all(-1)] = 255
  return _made(mode, scaled)


def _made(mode: str, samples: np.ndarray) -> Image.Image:
  height, width, _ = samples.shape
  made = Image.frombytes(mode, (width, height), samples.astype(np.uint8).tobytes())
  return made.convert("RGBA") if mode == "RGBa" else made


def _half(picture: ImageFile.ImageFile, *, swapped: bool) -> np.ndarray:
  """The upper, or swapped the lower, 8 bits of each sample, uint8 [H, W, samples]."""
  if _raw_mode(picture) == "LA;16B":  # of PNG; swapped, Pillow does not know it
    if swapped:  # four bytes, as of one pixel of RGBA
      picture.tile = [tile._replace(args="RGBA") for tile in picture.tile]
      return np.array(picture)[..., [1, 1, 1, 3]]
    return np.array(picture)
  own = _ORDERS[picture.tag_v2.prefix] if hasattr(picture, "tag_v2") else "B"
  tiles = []
  for tile in picture.tile:
    args = (tile.args,) if isinstance(tile.args, str) else tuple(tile.args or ())
    # Of colours kept apart the order is not in the name; N is that of this machine.
    samples, _, order = args[0].partition(";16")
    order = {"": own, "N": sys.byteorder[0].upper()}.get(order, order)
    name = f"{samples.replace('RGBa', 'RGBA')};16{_SWAPPED[order] if swapped else order}"
    tiles.append(tile._replace(args=name if len(args) == 1 else (name, *args[1:])))
  picture.tile = tiles
  return np.array(picture)


def _tag(picture: Image.Image, number: int) -> Any:
  """What a TIFF says; None of other pictures."""
  return getattr(picture, "tag_v2", {}).get(number)


def _raw_mode(picture: ImageFile.ImageFile) -> str:
  """How Pillow calls the samples of the file."""
  args = picture.tile[0].args if picture.tile else ""
  return args if isinstance(args, str) else str(args[0]) if args else ""


def _shift(picture: Image.Image, largest: int, name: str) -> int:
  """How many bits of 16 to drop, by those that the file declares, or by its largest level."""
  declared = (_tag(picture, _BITS_PER_SAMPLE) or (16,))[0]
  if 8 <= declared < 16 and largest < 1 << declared:
    return int(declared) - 8
  bits = next(bits for bits in (8, 12, 16) if largest < 1 << bits)
  if bits < 16 and largest:
    _say_guess(bits, name)
  return bits - 8


def _say_guess(bits: int, name: str) -> None:
  """Says it of the first picture of that many bits in a process."""
  if bits in _guessed:
    return
  _guessed.add(bits)
  what = f"note: {name} has 16 bits a sample and uses {bits}"
  print(printable(f"{what}; it and others like it are scaled by these"), file=sys.stderr)


_guessed: set[int] = set()
