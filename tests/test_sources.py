"""Image sources: every kind gives the same pictures; odd formats; what is bad is named."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image

from launch.prepare import prepare
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.data import images, sources
from vavae_jax.data.order import Share
from vavae_jax.data.sources import base

CLASSES = ["cat", "dog"]
# A folder's name, which is no pattern.
ODD = "-lr[1e-4] *?{a} %20~#\nb"


def encoded(name: str, kind: str = "PNG", size: tuple[int, int] = (9, 12)) -> bytes:
  picture = Image.fromarray((255 * procedural.uniform(name, (*size, 3))).astype(np.uint8))
  buffer = io.BytesIO()
  picture.save(buffer, kind)
  return buffer.getvalue()


# Names as in a data set; the same picture bytes for every kind of source.
FILES = {
  f"{name}/{i}.{kind.lower()}": encoded(f"{name}{i}", kind)
  for name in CLASSES
  for i, kind in enumerate(("PNG", "JPEG", "WEBP", "BMP"))
}


def make_folder(root):
  for name, data in FILES.items():
    path = root / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  (root / "set" / "dog" / "notes.txt").write_text("no picture")
  return f"folder:{root / 'set'}"


def make_zip(root, compression=zipfile.ZIP_STORED):
  with zipfile.ZipFile(root / "set.zip", "w", compression) as archive:
    for name, data in reversed(FILES.items()):
      archive.writestr(f"set/{name}", data)
    archive.writestr("__MACOSX/set/cat/._0.png", b"no picture")
  return f"zip:{root / 'set.zip'}"


def add(archive, name, data):
  info = tarfile.TarInfo(name)
  info.size = len(data)
  archive.addfile(info, io.BytesIO(data))


def make_tar(root):
  with tarfile.open(root / "set.tar", "w") as archive:
    for name, data in reversed(FILES.items()):
      add(archive, f"./set/{name}", data)
    link = tarfile.TarInfo("set/cat/9.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(link)
  return f"tar:{root / 'set.tar'}"


def class_tar(name):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as archive:
    for file, data in FILES.items():
      if file.startswith(name):
        add(archive, f"{name}_{file.rpartition('/')[2]}", data)
  return buffer.getvalue()


def make_tar_of_tars(root):
  """As ILSVRC2012_img_train.tar is."""
  with tarfile.open(root / "all.tar", "w") as archive:
    for name in CLASSES:
      add(archive, f"{name}.tar", class_tar(name))
  return f"tar:{root / 'all.tar'}"


def make_tars(root):
  for name in CLASSES:
    (root / f"{name}.tar").write_bytes(class_tar(name))
  return f"tar:{root / '*.tar'}"


def make_webdataset(root):
  names = list(FILES)
  for shard in range(2):
    with tarfile.open(root / f"{shard:05d}.tar", "w") as archive:
      for i in range(shard, len(names), 2):
        add(archive, f"{i:04d}.{names[i].rpartition('.')[2]}", FILES[names[i]])
        add(archive, f"{i:04d}.cls", str(CLASSES.index(names[i].partition("/")[0])).encode())
  return f"tar:{root / '*.tar'}"


def make_parquet(root):
  rows = [
    {"image": {"bytes": data, "path": name}, "label": CLASSES.index(name.partition("/")[0])}
    for name, data in FILES.items()
  ]
  feature = {"label": {"names": CLASSES, "_type": "ClassLabel"}}
  noted = {b"huggingface": json.dumps({"info": {"features": feature}}).encode()}
  for part in range(2):
    table = pa.Table.from_pylist(rows[part * 4 : part * 4 + 4]).replace_schema_metadata(noted)
    pq.write_table(table, root / f"train-{part:05d}-of-00002.parquet", row_group_size=3)
  return f"hf:{root}"


def make_records(root):
  make_folder(root)
  prepare(f"folder:{root / 'set'}", root / "records", shard_size=3)
  return f"arrayrecord:{root / 'records'}"


MAKERS = {
  "folder": make_folder,
  "zip": make_zip,
  "deflated zip": functools.partial(make_zip, compression=zipfile.ZIP_DEFLATED),
  "tar": make_tar,
  "tar of tars": make_tar_of_tars,
  "tars": make_tars,
  "webdataset": make_webdataset,
  "parquet": make_parquet,
  "records": make_records,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_gives_the_same_pictures_and_labels(kind, tmp_path):
  (root := tmp_path / ODD).mkdir()
  source = sources.open_source(MAKERS[kind](root))
  assert len(source) == len(FILES)
  labels = [source[i]["label"] for i in range(len(source))]
  if kind == "webdataset":
    assert source.class_names == ["0", "1"]
    labels = sorted(labels)  # its order is that of the numbers
  else:
    assert source.class_names == CLASSES
  assert labels == [0] * 4 + [1] * 4
  there = {source.encoded(i)[0] for i in range(len(source))}
  assert there == set(FILES.values())
  for i in range(len(source)):
    expected = np.asarray(Image.open(io.BytesIO(source.encoded(i)[0])).convert("RGB"))
    np.testing.assert_array_equal(source[i]["image"], expected)
  again = pickle.loads(pickle.dumps(source))  # as worker processes get it
  assert again.encoded(3) == source.encoded(3)
  assert again.identity() == source.identity()


def test_tensorflow_datasets_are_read_without_tensorflow(tmp_path, monkeypatch, command):
  """Made in another process, since TensorFlow's absence is only known in a fresh one."""
  made = command("tests.make_tfds", tmp_path / ODD)
  assert made.returncode == 0, made.stderr
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / ODD))
  source = sources.open_source("tfds:tiny/train")
  assert source.class_names == CLASSES
  found = {source.encoded(i)[0]: source.encoded(i)[1] for i in range(len(source))}
  assert found == {data: CLASSES.index(name.partition("/")[0]) for name, data in FILES.items()}
  with pytest.raises(InputError, match=r"tfds:tiny/nothing cannot be opened"):
    sources.open_source("tfds:tiny/nothing")
  with pytest.raises(InputError, match="names no split"):
    sources.open_source("tfds:tiny")


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


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_samples_of_16_bits_are_scaled_by_those_they_use(bits, channels, capsys):
  base._guessed.clear()
  levels = np.linspace(0, 2**bits - 1, 6 * 8 * channels).astype(np.uint16)
  levels = levels.reshape(6, 8, channels)
  if channels == 4:
    levels[..., 3] = 2**16 - 1
  found = np.asarray(base.decode(png(levels), "here/1.png"))
  colours = levels[..., : min(channels, 3)] >> (bits - 8)
  np.testing.assert_array_equal(found, np.broadcast_to(colours, found.shape))
  base.decode(png(levels), "here/2.png")
  told = capsys.readouterr().err
  assert told.count(f"here/1.png has 16 bits a sample and uses {bits}") == (bits < 16)
  assert "here/2.png" not in told  # it is said once


def test_bits_that_a_tiff_declares_are_no_guess(capsys):
  base._guessed.clear()
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


def test_unreadable_pictures_have_their_neighbours_up_to_a_limit(tmp_path, capsys):
  root = tmp_path / "set"
  spec = make_folder(tmp_path)
  (root / "cat" / "1.jpeg").write_bytes(b"no picture")
  tolerant = sources.Tolerant(sources.open_source(spec), limit=1)
  assert tolerant.picture(1)[0].tobytes() == tolerant.picture(2)[0].tobytes()
  assert "skipped (1 of at most 1)" in capsys.readouterr().err
  tolerant.picture(1)
  assert capsys.readouterr().err == ""  # it is said once
  (root / "dog" / "3.webp").write_bytes(b"no picture")
  (root / "dog" / "2.webp").write_bytes(b"no picture")
  with pytest.raises(InputError, match=r"2 pictures cannot be read, more than .*max_corrupt = 1"):
    [tolerant.picture(i) for i in range(len(tolerant))]


def test_no_picture_from_elsewhere_stands_for_one(tmp_path):
  """Of the held-out ones, for instance."""
  spec = make_folder(tmp_path)
  (tmp_path / "set" / "cat" / "1.jpeg").write_bytes(b"no picture")
  tolerant = sources.Tolerant(sources.open_source(spec), 1, np.array([0, 1, 5]))
  assert tolerant.picture(1)[0].tobytes() == tolerant.picture(5)[0].tobytes()


def test_damaged_records_are_tolerated_too(tmp_path):
  spec = make_records(tmp_path)
  shard = min((tmp_path / "records").glob("*.array_record"))
  data = bytearray(shard.read_bytes())
  data[200] ^= 0xFF
  shard.write_bytes(data)
  tolerant = sources.Tolerant(sources.open_source(spec), len(FILES))
  [tolerant.picture(i) for i in range(len(tolerant))]
  assert tolerant.bad


def test_a_pattern_takes_some_of_the_records(tmp_path):
  make_records(tmp_path)
  source = sources.open_source(f"arrayrecord:{tmp_path}/records/pictures-00001-*")
  assert len(source) == 3


def test_pictures_without_folders_are_of_one_class(tmp_path):
  (tmp_path / "a.png").write_bytes(encoded("a"))
  source = sources.open_source(f"folder:{tmp_path}")
  assert (source.class_names, source[0]["label"]) == (["all"], 0)
  (tmp_path / "cat").mkdir()
  (tmp_path / "cat" / "b.png").write_bytes(encoded("b"))
  with pytest.raises(InputError, match=r"class folders, such as cat, and pictures beside them"):
    sources.open_source(f"folder:{tmp_path}")


# A data set as people have it: what systems put beside pictures, an empty class, a common folder.
MESSY = {
  **{f"set/{name}": data for name, data in FILES.items()},
  **dict.fromkeys(
    (
      "set/.ipynb_checkpoints/0.png",
      "set/cat/.thumbnails/0.png",
      "set/@eaDir/0.png",
      "set/cat/@eaDir/0.png",
      "set/dog/._0.png",
      "__MACOSX/set/cat/._0.png",
      "set/cat/Thumbs.db",
      "set/cat/notes.TXT",
      "set/README",
    ),
    b"no picture",
  ),
}


def messy_folder(root):
  for name, data in MESSY.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
  (root / "set" / "bird").mkdir()
  return f"folder:{root}"


def messy_zip(root):
  with zipfile.ZipFile(root / "x.zip", "w") as archive:
    for name, data in MESSY.items():
      archive.writestr(f"./{name}", data)
    archive.writestr("set/bird/", b"")
  return f"zip:{root / 'x.zip'}"


def messy_tar(root):
  with tarfile.open(root / "x.tar", "w") as archive:
    for name, data in MESSY.items():
      add(archive, f"./{name}", data)
    info = tarfile.TarInfo("set/bird")
    info.type = tarfile.DIRTYPE
    archive.addfile(info)
  return f"tar:{root / 'x.tar'}"


@pytest.mark.parametrize("make", [messy_folder, messy_zip, messy_tar])
def test_every_kind_has_one_rule_of_classes_and_hidden_files(make, tmp_path, capsys):
  spec = make(tmp_path)
  source = sources.open_source(spec)
  assert source.class_names == CLASSES
  assert len(source) == len(FILES)
  assert [source[i]["label"] for i in range(len(source))] == [0] * 4 + [1] * 4
  told = capsys.readouterr().err
  for words in ("hidden", "1 ending in .TXT", "1 without an ending", "1 folders without pictures"):
    assert words in told
  sources.open_source(spec)
  assert capsys.readouterr().err == ""  # it is said once


def test_a_tar_in_a_tar_ends_where_it_does(tmp_path):
  """Read on, an empty one has the pictures behind it once more, and 22 of them never end."""

  def inner(*names):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
      for name in names:
        add(archive, name, encoded(name))
    return buffer.getvalue()

  with tarfile.open(tmp_path / "x.tar", "w") as archive:
    for i in range(30):
      add(archive, f"empty{i}.tar", b"" if i % 2 else inner()[:512])
    add(archive, "cut.tar", inner("a.png")[:600])
    add(archive, "whole.tar", inner("b.png", "c.png"))
  with pytest.raises(InputError, match=r"not a plain tar file .*beyond its archive"):
    sources.open_source(f"tar:{tmp_path / 'x.tar'}")
  with tarfile.open(tmp_path / "y.tar", "w") as archive:
    for i in range(30):
      add(archive, f"empty{i}.tar", b"" if i % 2 else inner()[:512])
    add(archive, "whole.tar", inner("b.png", "c.png"))
  source = sources.open_source(f"tar:{tmp_path / 'y.tar'}")
  assert [source.encoded(i)[0] for i in range(len(source))] == [encoded("b.png"), encoded("c.png")]


def tars(root, *shards, inside=False):
  """Tars, or tars in a tar, that each have pictures of these names and contents."""
  for number, content in enumerate(shards):
    with tarfile.open(root / f"{number}.tar", "w") as archive:
      for name, data in content:
        add(archive, name, data)
  if not inside:
    return f"tar:{root}/*.tar"
  with tarfile.open(root / "all.tar", "w") as archive:
    for number in range(len(shards)):
      archive.add(root / f"{number}.tar", f"{number}.tar")
  return f"tar:{root}/all.tar"


@pytest.mark.parametrize("inside", [False, True])
def test_pictures_of_one_name_in_several_archives_are_told_apart(inside, tmp_path):
  shards = [[("a.png", encoded(f"{i}a")), ("b.png", encoded(f"{i}b"))] for i in range(3)]
  before = sources.open_source(tars(tmp_path, *shards, inside=inside))
  assert len(set(before.keys())) == len(before) == 6
  (more := tmp_path / "more").mkdir()
  shards[1][0] = ("a.png", encoded("other", size=(20, 20)))
  changed = sources.open_source(tars(more, *shards, shards[0], inside=inside))
  assert set(before.keys()) < set(changed.keys())  # what is added moves no other one
  sizes = [dict(zip(s.keys(), s.sizes(), strict=True)) for s in (before, changed)]
  assert [key for key, size in sizes[0].items() if sizes[1][key] != size] == ["1.tar//a.png"]


@pytest.mark.parametrize("make", [make_folder, make_zip, make_tar, make_tar_of_tars])
def test_keys_of_one_archive_are_its_names(make, tmp_path):
  """As they were when the splits of trainings were drawn from them."""
  source = sources.open_source(make(tmp_path))
  assert source.keys() == source.names


def test_of_entries_of_one_name_the_last_counts(tmp_path, capsys):
  entries = [("a/1.png", encoded("old")), ("a/2.png", encoded("x")), ("./a//1.png", encoded("new"))]
  with (
    tarfile.open(tmp_path / "x.tar", "w") as tarred,
    zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped,
  ):
    for name, data in entries:
      add(tarred, name, data)
      zipped.writestr(name, data)
  for kind in ("tar", "zip"):
    source = sources.open_source(f"{kind}:{tmp_path}/x.{kind}")
    assert [source.encoded(i)[0] for i in range(len(source))] == [encoded("new"), encoded("x")]
    assert "1 replaced by a later entry of the same name" in capsys.readouterr().err


def test_names_that_lead_out_of_an_archive_are_counted_as_that(tmp_path, capsys):
  names = ("../a/1.png", "a/../../b/1.png", "/a/1.png", "..a/.hidden.png")
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    for name in names:
      archive.writestr(name, encoded("x"))
  assert sources.open_source(f"zip:{tmp_path}/x.zip").names == ["a/1.png"]
  assert "2 with .. in their path, 1 hidden" in capsys.readouterr().err


def odd_names(root):
  folder = root / "set" / os.fsdecode(b"caf\xe9")
  folder.mkdir(parents=True)
  (folder / os.fsdecode(b"\xff.png")).write_bytes(encoded("x"))
  (root / "set" / "dog").mkdir()
  (root / "set" / "dog" / "1.png").write_bytes(encoded("y"))
  return root / "set"


def test_names_that_are_not_utf_8_are_names(tmp_path, capsys):
  folder = odd_names(tmp_path)
  archive_path = tmp_path / os.fsdecode(b"s\xe9t.tar")
  with tarfile.open(archive_path, "w") as archive:
    archive.add(folder, "set")
  for spec in (f"folder:{folder}", f"tar:{archive_path}"):
    source = sources.open_source(spec)
    assert source.class_names == ["caf\\udce9", "dog"]
    assert [source[i]["label"] for i in range(2)] == [0, 1]
    assert len(source.identity()) == len(source.listing()) == 64
    json.dumps(source.class_names).encode()
  (folder / os.fsdecode(b"caf\xe9") / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
  tolerant = sources.Tolerant(sources.open_source(f"folder:{folder}"), 1)
  tolerant.picture(0)
  assert "skipped (1 of at most 1)" in capsys.readouterr().err
  (spec, made) = f"folder:{folder}", tmp_path / "made"
  prepare(spec, made, shard_size=3, max_corrupt=1)
  assert sources.open_source(f"arrayrecord:{made}").class_names == ["caf\\udce9", "dog"]


def test_links_and_devices_among_the_pictures_are_unreadable_or_left_out(tmp_path, capsys):
  spec = make_folder(tmp_path)
  cat = tmp_path / "set" / "cat"
  (cat / "loop").symlink_to(tmp_path / "set")
  (cat / "self.png").symlink_to(cat / "self.png")
  (cat / "nothing.png").symlink_to(cat / "absent.png")
  (cat / "device.png").symlink_to("/dev/zero")
  os.mkfifo(cat / "pipe.png")
  (tmp_path / "elsewhere").mkdir()
  (tmp_path / "elsewhere" / "9.png").write_bytes(encoded("x"))
  (cat / "linked").symlink_to(tmp_path / "elsewhere")
  source = sources.open_source(spec)
  assert "1 links to a folder above" in capsys.readouterr().err
  assert len(source) == len(FILES) + 5
  assert len(source.identity()) == 64
  tolerant = sources.Tolerant(source, 4)
  [tolerant.picture(i) for i in range(len(source))]
  assert len(tolerant.bad) == 4


def parquet_of(root, **columns):
  rows = [{"image": {"bytes": encoded(str(i)), "path": ""}} for i in range(3)]
  rows = [row | {k: v[i] for k, v in columns.items()} for i, row in enumerate(rows)]
  pq.write_table(pa.Table.from_pylist(rows), root / "x.parquet")
  return f"hf:{root}"


@pytest.mark.parametrize(
  ("columns", "class_names", "labels", "note"),
  [
    ({"label": [1, 0, 2]}, ["0", "1", "2"], [1, 0, 2], ""),
    ({"cls": [1, 0, 2]}, ["0", "1", "2"], [1, 0, 2], "taken are image and cls"),
    ({"fine_label": [1, 0, 1]}, ["0", "1"], [1, 0, 1], "taken are image and fine_label"),
    ({"label_name": ["b", "a", "b"]}, ["a", "b"], [1, 0, 1], "taken are image and label_name"),
    ({"text": ["b", "a", "b"]}, ["all"], [0, 0, 0], "text; taken are image and one class"),
    ({"label": [0, 1, 0], "label_name": ["b", "a", "b"]}, ["0", "1"], [0, 1, 0], "label_name; tak"),
  ],
)
def test_labels_of_parquet_are_found_and_guesses_told(columns, class_names, labels, note, tmp_path):
  source = sources.open_source(parquet_of(tmp_path, **columns))
  assert source.class_names == class_names
  assert [source.encoded(i)[1] for i in range(3)] == labels
  assert note in source.beside
  assert bool(source.beside) == bool(note)


def test_labels_of_records_are_checked(tmp_path):
  spec = make_records(tmp_path)
  description = tmp_path / "records" / "dataset.json"
  noted = json.loads(description.read_text())
  description.write_text(json.dumps(noted | {"class_names": ["cat"]}))
  source = sources.open_source(spec)
  with pytest.raises(InputError, match="has the label 1 of 1 classes"):
    [source.encoded(i) for i in range(len(source))]


def encrypted(root):
  spec = make_zip(root)
  path = root / "set.zip"
  data = bytearray(path.read_bytes())
  place = data.index(b"PK\x01\x02")
  while place >= 0:
    data[place + 8] |= 1
    place = data.find(b"PK\x01\x02", place + 1)
  path.write_bytes(data)
  return spec


def cut(root):
  spec = make_zip(root)
  path = root / "set.zip"
  path.write_bytes(path.read_bytes()[:-30])
  return spec


def packed_tar(root):
  make_tar(root)
  with tarfile.open(root / "packed.tar", "w:gz") as archive:
    archive.add(root / "set.tar", "set.tar")
  return f"tar:{root / 'packed.tar'}"


def empty_zip(root):
  zipfile.ZipFile(root / "empty.zip", "w").close()
  return f"zip:{root / 'empty.zip'}"


def no_columns(root):
  pq.write_table(pa.table({"text": ["a"]}), root / "x.parquet")
  return f"hf:{root}"


def two_pictures_a_record(root):
  make_webdataset(root)
  with tarfile.open(root / "00000.tar", "a") as archive:
    add(archive, "0000.mask.png", encoded("mask"))
  return f"tar:{root / '*.tar'}"


def two_splits(root):
  make_parquet(root)
  (root / "train-00000-of-00002.parquet").rename(root / "test-00000-of-00001.parquet")
  return f"hf:{root}"


def no_labels(root):
  rows = [{"image": {"bytes": encoded("x"), "path": ""}, "label": -1}]
  pq.write_table(pa.Table.from_pylist(rows), root / "x.parquet")
  sources.open_source(f"hf:{root}").picture(0)
  return ""


def lost_shard(root):
  spec = make_records(root)
  next((root / "records").glob("*.array_record")).unlink()
  return spec


def pipe_of_parquet(root):
  os.mkfifo(root / "x.parquet")
  return f"hf:{root}"


def test_a_folder_may_be_deeper_than_calls(tmp_path):
  deep = tmp_path / "/".join("d" * 250)
  deep.mkdir(parents=True)
  (deep / "1.png").write_bytes(encoded("x"))
  before = sys.getrecursionlimit()
  sys.setrecursionlimit(len(inspect.stack(0)) + 150)
  try:
    assert len(sources.open_source(f"folder:{tmp_path}")) == 1
  finally:
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (pipe_of_parquet, "has no parquet files"),
    *((lambda root, kind=kind: f"{kind}:{root}/{'a' * 5_000}", "aaa") for kind in sources._KINDS),
    (encrypted, "is encrypted"),
    (cut, "is damaged or not a zip file"),
    (packed_tar, "not a plain tar file"),
    (empty_zip, "no pictures are in it"),
    (lambda root: f"zip:{root}/nothing.zip", "There is no file"),
    (no_columns, r"has the columns text; needed are image and label"),
    (lambda root: f"hf:{root}", "has no parquet files"),
    (lost_shard, "was not copied whole"),
    (two_pictures_a_record, "has several pictures"),
    (two_splits, "has the splits test, train"),
    (no_labels, "has the label -1"),
    (lambda root: f"arrayrecord:{root}", r"has no dataset\.json"),
  ],
)
def test_sources_that_cannot_be_read_are_named(make, message, tmp_path):
  with pytest.raises(InputError, match=message):
    sources.open_source(make(tmp_path))


def test_a_zip_with_the_separators_of_windows_has_its_classes(tmp_path):
  with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
    for name, data in FILES.items():
      info = zipfile.ZipInfo("x")
      info.filename = name.replace("/", "\\")
      archive.writestr(info, data)
  assert sources.open_source(f"zip:{tmp_path / 'set.zip'}").class_names == CLASSES


def test_a_zip_that_lies_about_places_and_sizes_is_named(tmp_path):
  source = sources.open_source(make_zip(tmp_path, zipfile.ZIP_DEFLATED))
  source._start[0] += 7
  with pytest.raises(sources.Unreadable, match="is not where the archive says"):
    source.encoded(0)
  source._size[1] += 1
  with pytest.raises(sources.Unreadable, match="not of the size it says"):
    source.encoded(1)
  source._stored[2] = 2**50
  with pytest.raises(sources.Unreadable, match="would have"):
    source.encoded(2)


def test_preparing_goes_on_where_it_was_and_leaves_out_what_is_bad(tmp_path, monkeypatch):
  root = tmp_path / "set"
  spec = make_folder(tmp_path)
  (root / "dog" / "1.jpeg").write_bytes(b"no picture")
  with pytest.raises(InputError, match="max_corrupt allows"):
    prepare(spec, tmp_path / "out", shard_size=3)
  before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
  found = prepare(spec, tmp_path / "out", shard_size=3, max_corrupt=1)
  after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
  assert before.items() <= after.items()  # the first shard was not made again
  assert len(found) == len(FILES) - 1
  description = json.loads((tmp_path / "out" / "dataset.json").read_text())
  assert "1.jpeg" in description["skipped"][0]
  (root / "cat" / "more.png").write_bytes(encoded("more"))
  with pytest.raises(InputError, match="begun with another identity"):
    prepare(spec, tmp_path / "out", shard_size=3)


def test_prepared_pictures_keep_their_names(tmp_path):
  """So that a set prepared anew from changed pictures has the same ones held out."""
  spec = make_folder(tmp_path)
  (tmp_path / "set" / "dog" / "1.jpeg").write_bytes(b"no picture")
  found = prepare(spec, tmp_path / "out", shard_size=3, max_corrupt=1)
  assert found.has_names
  assert found.keys() == sorted({*FILES} - {"dog/1.jpeg"})
  assert "(dog/3.bmp)" in found.name(6)
  part = sources.open_source(f"arrayrecord:{tmp_path}/out/*-00001-*")
  assert part.keys() == found.keys()[3:5]
  assert part.identity() != found.identity()
  (tmp_path / "set" / "cat" / "0.png").write_bytes(encoded("another"))
  other = prepare(spec, tmp_path / "other", shard_size=3, max_corrupt=1)
  assert other.keys() == found.keys()
  assert other.listing() != found.listing()
  os.replace(tmp_path / "other" / "preparing.json", tmp_path / "out" / "preparing.json")
  note = tmp_path / "out" / "pictures-00000-of-00003.array_record.json"
  note.write_text(json.dumps({"records": 3, "skipped": []}))  # of an earlier version
  found = prepare(spec, tmp_path / "out", shard_size=3, max_corrupt=1)
  assert list(found.keys()) == [str(i) for i in range(7)]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_by_threads_and_by_worker_processes(workers, tmp_path):
  source = sources.open_source(make_zip(tmp_path))
  share = Share(6, threads=1 + workers, workers=workers)
  data = images.training_batches(source, np.arange(8), share, size=8, seed=1, flip=True)
  iterator = iter(data)
  found = [next(iterator) for _ in range(4)]
  plain = iter(
    images.training_batches(source, np.arange(8), Share(6, threads=1), size=8, seed=1, flip=True)
  )
  for batch in found:
    expected = next(plain)
    np.testing.assert_array_equal(batch["image"], expected["image"])
    np.testing.assert_array_equal(batch["label"], expected["label"])


def test_the_evaluation_s_crop_is_torchvisions():
  """Sizes from torchvision 0.24: Resize(256) of 500x375 is 341x256, CenterCrop takes from 42."""
  picture = Image.fromarray((255 * procedural.uniform("crop", (375, 500, 3))).astype(np.uint8))
  resized = picture.resize((341, 256), Image.Resampling.BILINEAR)
  expected = np.asarray(resized)[:, 42 : 42 + 256]
  np.testing.assert_array_equal(images.resize_crop(picture, 256), expected)
