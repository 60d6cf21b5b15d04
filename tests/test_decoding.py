"""Pictures' files of odd kinds are seen as a person would; what is no picture is named."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import skimage.data
import tifffile
from PIL import Image

from tests.test_sources import encoded
from vavae_jax.data import sources
from vavae_jax.data.sources import base, deep


def test_a_transparent_level_of_16_bits_is_white():
  picture = Image.fromarray(np.array([[0, 700, 25_600]], np.uint16))
  buffer = io.BytesIO()
  picture.save(buffer, "PNG", transparency=700)
  assert np.asarray(base.decode(buffer.getvalue(), "clear"))[0, :, 0].tolist() == [0, 255, 100]


def grey_16():
  return Image.fromarray(np.array([[0, 256, 65_535]], np.uint16)), [[0], [1], [255]]


def red_half_clear():
  return Image.new("RGBA", (1, 1), (255, 0, 0, 128)), [[255, 127, 127]]


def palette_clear():
  picture = Image.new("P", (1, 1), 0)
  picture.putpalette([10, 20, 30])
  picture.info["transparency"] = 0
  return picture, [[255, 255, 255]]


@pytest.mark.parametrize(
  ("make", "kind"), [(grey_16, "PNG"), (grey_16, "TIFF"), (red_half_clear, "PNG"),
                     (palette_clear, "PNG"), (red_half_clear, "WEBP")]
)  # fmt: skip
def test_odd_pixels_are_seen_as_a_person_would(make, kind):
  picture, expected = make()
  buffer = io.BytesIO()
  options = {"transparency": 0} if picture.mode == "P" else {}
  picture.save(buffer, kind, **options, **({"lossless": True} if kind == "WEBP" else {}))
  found = np.asarray(base.decode(buffer.getvalue(), "x")).astype(int)
  np.testing.assert_allclose(found[0], np.broadcast_to(expected, found[0].shape), atol=1)


CORNERS = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)


def chunk(name: bytes, data: bytes, crc: int | None = None) -> bytes:
  crc = zlib.crc32(name + data) if crc is None else crc
  return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)


def png(array: np.ndarray, *beside: bytes) -> bytes:
  """A PNG of 8 or 16 bits with chunks after the header."""
  height, width, channels = array.shape
  head = (width, height, array.itemsize * 8, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
  rows = b"".join(b"\0" + row.astype(array.dtype.newbyteorder(">")).tobytes() for row in array)
  parts = chunk(b"IHDR", struct.pack(">IIBBBBB", *head)), *beside
  end = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + end


def tiff_header(orientation: bytes = b"\x03\0\x01\0\0\0\x06\0\0\0", *entries: bytes) -> bytes:
  """EXIF's directory: that of the orientation, and entries as they are."""
  all_ = [struct.pack("<H", 0x112) + orientation, *entries]
  return b"II*\0\x08\0\0\0" + struct.pack("<H", len(all_)) + b"".join(all_) + bytes(4)


TURNED = np.rot90(CORNERS, -1)
LONG = struct.pack("<HIHH", 4, 1, 6, 0)
EXIFS = {
  "short": (tiff_header(), TURNED),
  "long": (tiff_header(LONG), TURNED),
  "out of range": (tiff_header(struct.pack("<HIHH", 3, 1, 9, 0)), CORNERS),
  "a text": (tiff_header(struct.pack("<HI4s", 2, 4, b"six\0")), CORNERS),
  "an odd pointer": (tiff_header(LONG, struct.pack("<HHII", 0x8769, 4, 1, 2**32 - 1)), TURNED),
  "an odd ratio": (tiff_header(LONG, struct.pack("<HHII", 0x11A, 5, 2**31, 2**31)), TURNED),
  "an unknown type": (tiff_header(LONG, struct.pack("<HHII", 0x10F, 99, 7, 7)), TURNED),
  "cut": (tiff_header()[:18], CORNERS),
  "no directory": (b"II*\0\xff\xff\xff\xff\0\0", CORNERS),
  "nothing": (b"", CORNERS),
  "no order": (b"XX" + tiff_header()[2:], CORNERS),
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", EXIFS)
def test_exif_decides_nothing_but_which_side_is_up(kind, exif):
  content, expected = EXIFS[exif]
  buffer = io.BytesIO()
  picture = Image.fromarray(CORNERS)
  options = {"lossless": True} if kind == "WEBP" else {"subsampling": 0, "quality": 100}
  picture.save(buffer, kind, exif=b"Exif\0\0" + content, **options)
  found = np.asarray(base.decode(buffer.getvalue(), "x")).astype(int)
  np.testing.assert_allclose(found, expected, atol=3 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
  "segment",
  [
    b"\xe0\0\x08JFIF\0\1",
    b"\xee\0\x07Adobe",
    b"\xe1\0\2",
    b"\xe2\0\x10ICC_PROFILE\0\xff\xff",
    b"\xe2\0\x0eMPF\0II*\0\xff\xff\xff\xff",
    b"\xff\xff\xe1\0\x0aExif\0\0II",
    b"\xed\0\x10Photoshop 3.0\0",
  ],
)
def test_segments_beside_the_pixels_are_no_reason(segment):
  data = encoded("x", "JPEG")
  odd = data[:2] + b"\xff" + segment + data[2:]
  expected = np.asarray(base.decode(data, "x"))
  np.testing.assert_array_equal(np.asarray(base.decode(odd, "x")), expected)


@pytest.mark.parametrize(
  "beside",
  [
    chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**23))),
    chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2**23))),
    chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**23))),
    chunk(b"iCCP", b"a\0\0damaged"),
    chunk(b"tEXt", bytes(2**21)) * 40,
    chunk(b"tEXt", b"a\0b", crc=7),
    chunk(b"gAMA", b"\0"),
    chunk(b"pHYs", b""),
  ],
)
def test_chunks_beside_the_pixels_are_no_reason(beside):
  np.testing.assert_array_equal(np.asarray(base.decode(png(CORNERS, beside), "x")), CORNERS)


def test_a_bad_checksum_of_the_pixels_is_one():
  data = bytearray(png(CORNERS))
  data[-20] ^= 1
  with pytest.raises(sources.Unreadable):
    base.decode(bytes(data), "x")


def test_an_orientation_in_xmp_counts():
  xmp = b'XML:com.adobe.xmp\0\0\0\0\0<rdf tiff:Orientation="6"/>'
  found = np.asarray(base.decode(png(CORNERS, chunk(b"iTXt", xmp)), "x"))
  np.testing.assert_array_equal(found, TURNED)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_samples_of_16_bits_are_scaled_by_those_they_use(bits, channels, capsys):
  deep._guessed.clear()
  levels = np.linspace(0, 2**bits - 1, 6 * 8 * channels).astype(np.uint16)
  levels = levels.reshape(6, 8, channels)
  if channels in (2, 4):
    levels[..., -1] = 2**16 - 1
  found = np.asarray(base.decode(png(levels), "here/1.png"))
  colours = levels[..., : 3 if channels > 2 else 1] >> (bits - 8)
  np.testing.assert_array_equal(found, np.broadcast_to(colours, found.shape))
  base.decode(png(levels), "here/2.png")
  told = capsys.readouterr().err
  assert told.count(f"here/1.png has 16 bits a sample and uses {bits}") == (bits < 16)
  assert "here/2.png" not in told  # it is said once


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [None, "zlib"])
@pytest.mark.parametrize("kind", ["contig", "separate", "assocalpha", "unassalpha", "separated"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_tiff_s_16_bits_are_scaled_by_those_they_use(bits, kind, packed, order):
  """Of which Pillow keeps the upper 8, or mistakes their order."""
  samples = 3 if kind in ("contig", "separate") else 4
  levels = np.linspace(0, 2**bits - 1, 6 * 8 * samples).astype(np.uint16).reshape(6, 8, samples)
  options = {"photometric": kind if kind == "separated" else "rgb"}
  if kind in ("contig", "separate"):
    options["planarconfig"] = kind
  elif kind != "separated":
    levels[..., 3] = 2**bits - 1
    options["extrasamples"] = [kind]
  given = np.moveaxis(levels, -1, 0) if kind == "separate" else levels
  tifffile.imwrite(file := io.BytesIO(), given, compression=packed, byteorder=order, **options)
  if kind == "separate" and packed and bits < 16:
    with pytest.raises(sources.Unreadable, match="uses few of the 16 bits"):
      base.decode(file.getvalue(), "x")
    return
  scaled = (levels >> (bits - 8)).astype(np.uint8)
  if kind == "separated":
    scaled = np.asarray(Image.fromarray(scaled, "CMYK").convert("RGB"))
  np.testing.assert_array_equal(np.asarray(base.decode(file.getvalue(), "x")), scaled[..., :3])


def test_a_tiff_whose_white_is_zero_is_no_negative():
  levels = np.array([[0, 2**15], [2**16 - 1, 0]], np.uint16)
  tifffile.imwrite(file := io.BytesIO(), levels, photometric="miniswhite")
  found = np.asarray(base.decode(file.getvalue(), "x"))[..., 0]
  assert found.tolist() == [[255, 127], [0, 255]]


def test_a_transparent_colour_of_16_bits_is_white():
  levels = np.array([[[700, 700, 700], [188, 188, 188]]], np.uint16)  # 700 is 188 modulo 256
  clear = chunk(b"tRNS", struct.pack(">HHH", 700, 700, 700))
  found = np.asarray(base.decode(png(levels, clear), "x"))[0, :, 0]
  assert found.tolist() == [255, 188 >> 4]


def test_bits_that_a_tiff_declares_are_no_guess(capsys):
  deep._guessed.clear()
  buffer = io.BytesIO()
  Image.fromarray(np.full((2, 2), 255, np.uint16)).save(buffer, "TIFF")
  data = bytearray(buffer.getvalue())
  place = data.index(struct.pack("<HHI", 258, 3, 1)) + 8
  data[place : place + 2] = struct.pack("<H", 12)
  packed = bytes(data).replace(b"\xff\0" * 4, b"\x0f\xf0\xff" * 2 + bytes(2))
  assert np.asarray(base.decode(packed, "x"))[..., 0].tolist() == [[15, 15]] * 2
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_counts(kind):
  frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
  buffer = io.BytesIO()
  frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
  red = np.asarray(base.decode(buffer.getvalue(), "x"))[0, 0]
  assert red[0] > 200
  assert red[2] < 60


@pytest.mark.parametrize("mode", ["CMYK", "L", "1", "LA", "P"])
def test_other_modes_become_rgb(mode):
  picture = Image.fromarray(skimage.data.astronaut()).convert(mode)
  kind = "JPEG" if mode == "CMYK" else "PNG"
  buffer = io.BytesIO()
  picture.save(buffer, kind)
  found = base.decode(buffer.getvalue(), "x")
  assert found.mode == "RGB"
  grey = np.asarray(Image.fromarray(skimage.data.astronaut()).convert("L"), float)
  # The same picture, not its negative.
  assert np.corrcoef(np.asarray(found, float).mean(-1).ravel(), grey.ravel())[0, 1] > (
    0.4 if mode == "1" else 0.8
  )


def floats():
  buffer = io.BytesIO()
  Image.fromarray(np.zeros((2, 2), np.float32)).save(buffer, "TIFF")
  return buffer.getvalue()


def huge():
  """A PNG of a gigapixel in a few bytes."""
  head = struct.pack(">IIBBBBB", 2**15, 2**15, 8, 2, 0, 0, 0)
  data = encoded("x")
  return data[:16] + head + data[16 + len(head) :]


LINE = encoded("line", size=(1, 65_000))  # whose crop would be of 16 million columns


@pytest.mark.parametrize(
  "data", [b"", b"no picture", encoded("x", "JPEG")[:300], floats(), huge(), LINE]
)
def test_what_is_no_picture_is_named(data):
  with pytest.raises(sources.Unreadable, match=r"The picture here/1\.png (cannot|is of no format)"):
    base.decode(data, "here/1.png")
