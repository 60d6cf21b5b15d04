"""A picture's file without its metadata: what counts are pixels and which side is up.

Cameras and editors write EXIF, profiles and texts that decoders refuse, although no pixel depends
on them. They are taken out before a decoder sees the file, and of them only the orientation is
read, tolerantly: what cannot be understood is upright.

Source: JPEG's markers (ITU T.81, annex B), PNG's chunks, TIFF's directory (which EXIF is).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from typing import Any

from PIL import Image

_PNG = b"\x89PNG\r\n\x1a\n"
# Chunks that make pixels; an animation's first picture is in them too.
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_COLOURS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}  # markers of JPEG
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_XMP = re.compile(rb'tiff:Orientation(?:\s*=\s*["\']|>)([1-8])')
_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def without_metadata(data: bytes) -> tuple[bytes, int]:
  """(a JPEG's or PNG's file without its metadata, its orientation); others as they are, and 1."""
  split: Callable[[bytes], Iterator[tuple[bytes, bytes]]]
  if data[:3] == b"\xff\xd8\xff":
    split = _jpeg
  elif data[:8] == _PNG:
    split = _png
  else:
    return data, 1
  kept, aside = [], []
  for pixels, metadata in split(data):
    kept.append(pixels)
    aside.append(metadata)
  return b"".join(kept), _orientation_of(aside)


def upright(picture: Image.Image, orientation: int) -> Image.Image:
  """A picture by its orientation in EXIF, from 1 to 8; or, of WebP, by that in its own."""
  exif = picture.info.get("exif")
  if picture.format == "WEBP" and isinstance(exif, bytes):
    orientation = _orientation_of([exif if exif[:6] == _EXIF else _EXIF + exif])
  return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture


def _jpeg(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  """(what is kept, what is metadata) of each segment; from the scan on, all is kept."""
  yield data[:2], b""
  begin = 2
  while data[begin : begin + 1] == b"\xff" and len(data) >= begin + 4:
    marker, (size,) = data[begin + 1], struct.unpack_from(">H", data, begin + 2)
    if marker == 0xFF:  # a byte that fills up
      begin += 1
      continue
    end = begin + 2 + size
    if marker == 0xDA or marker < 0xC0 or size < 2 or end > len(data):
      break  # the scan, or what only a decoder knows
    content = data[begin + 4 : end]
    # Applications' segments and comments; but JFIF's and Adobe's say what colours are.
    is_metadata = 0xE0 <= marker <= 0xEF or marker == 0xFE
    if content.startswith(_COLOURS.get(marker, b"?")) and len(content) >= 12:
      is_metadata = False
    yield (b"", content) if is_metadata else (data[begin:end], b"")
    begin = end
  yield data[begin:], b""


def _png(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  """As `_jpeg`, of chunks."""
  yield data[:8], b""
  begin = 8
  while len(data) >= begin + 12:
    size, name = struct.unpack_from(">I4s", data, begin)
    end = begin + 12 + size
    if end > len(data):
      break
    if name in _PNG_PIXELS:
      yield data[begin:end], b""
    else:
      content = data[begin + 8 : end - 4]
      yield b"", _EXIF + content.removeprefix(_EXIF) if name == b"eXIf" else content
    begin = end
  yield data[begin:], b""


def _orientation_of(metadata: list[bytes]) -> int:
  """That of EXIF, else of XMP, else 1."""
  for block in metadata:
    if block.startswith(_EXIF) and (found := _orientation_in_tiff(block[len(_EXIF) :])):
      return found
  for block in metadata:
    if found_in_xmp := _XMP.search(block):
      return int(found_in_xmp[1])
  return 1


def _orientation_in_tiff(data: bytes) -> int:
  """The orientation in the first directory, 0 where there is none."""
  order = {b"II": "<", b"MM": ">"}.get(data[:2])
  if order is None or len(data) < 10:
    return 0
  (first,) = struct.unpack_from(f"{order}I", data, 4)
  (count,) = struct.unpack_from(f"{order}H", data, first) if first + 2 <= len(data) else (0,)
  for place in range(first + 2, min(first + 2 + 12 * count, len(data) - 11), 12):
    tag, kind = struct.unpack_from(f"{order}HH", data, place)
    if tag == _ORIENTATION:
      value: Any = {1: "B", 3: "H", 4: "I"}.get(kind)
      found = struct.unpack_from(f"{order}{value}", data, place + 8)[0] if value else 0
      return found if found in range(1, 9) else 0
  return 0
