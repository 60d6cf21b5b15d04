"""Image sources: every kind gives the same pictures; odd formats; what is bad is named."""

from __future__ import annotations

import functools
import inspect
import io
import json
import os
import pickle
import shutil
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from launch.prepare import prepare
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.data import images, sources
from vavae_jax.data.order import Share
from vavae_jax.data.sources import datasets, files, listing

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


def make_parquet(root, column="label"):
  rows = [
    {"image": {"bytes": data, "path": name}, column: CLASSES.index(name.partition("/")[0])}
    for name, data in FILES.items()
  ]
  feature = {column: {"names": CLASSES, "_type": "ClassLabel"}}
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
  "parquet with another column": functools.partial(make_parquet, column="animal"),
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
  import tensorflow_datasets as tfds  # which looks for TFDS_DATA_DIR now

  features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": np.float32})
  info = SimpleNamespace(features=features, full_name="x/1.0.0")
  builder = SimpleNamespace(info=info, as_data_source=lambda **_: [])
  monkeypatch.setattr(tfds, "builder", lambda name: builder)
  with pytest.raises(InputError, match=r"tfds:x has the label .*float32.*; needed is a ClassLabel"):
    sources.open_source("tfds:x/train")


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
      "set/mouse/notes.TXT",
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
  for words in ("hidden", "2 ending in .TXT", "1 without an ending", "2 folders without pictures"):
    assert words in told
  sources.open_source(spec)
  assert capsys.readouterr().err == ""  # it is said once


def test_all_that_is_ignored_is_counted():
  ignoring = listing.Listing()
  for i in range(10):
    ignoring.takes(f"a.{i}")
  note = ignoring.note([], [])
  assert note.startswith("1 ending in .0, ")
  assert note.endswith(", 2 of other kinds")


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


def test_links_in_archives_are_pictures_only_where_they_name_one(tmp_path, capsys):
  with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
    add(archive, "a/1.png", encoded("x"))
    for name, kind, target in (
      ("b/2.png", tarfile.LNKTYPE, "./a/1.png"),
      ("b/3.png", tarfile.LNKTYPE, "absent.png"),
      ("b/4.png", tarfile.SYMTYPE, "../a/1.png"),
    ):
      link = tarfile.TarInfo(name)
      link.type, link.linkname = kind, target
      archive.addfile(link)
    sparse = tarfile.TarInfo("b/5.png")
    sparse.pax_headers = {"GNU.sparse.map": "0,5", "GNU.sparse.size": str(10**6)}
    sparse.size = 5
    archive.addfile(sparse, io.BytesIO(b"start"))
  source = sources.open_source(f"tar:{tmp_path}/x.tar")
  assert source.names == ["a/1.png", "b/2.png"]
  assert source.encoded(0) == (encoded("x"), 0)
  assert source.encoded(1) == (encoded("x"), 1)
  assert "3 links and other things" in capsys.readouterr().err
  with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
    archive.writestr("a/1.png", encoded("x"))
    (link := zipfile.ZipInfo("a/2.png")).external_attr = 0o120777 << 16
    archive.writestr(link, "1.png")
  assert sources.open_source(f"zip:{tmp_path}/x.zip").names == ["a/1.png"]
  assert "1 links and other things" in capsys.readouterr().err


@pytest.mark.parametrize("how", ["joined", "damaged", "cut"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_tar_that_goes_on_behind_its_end_is_no_shorter_one(how, inside, tmp_path):
  """A header that cannot be read ends it for tarfile, and what is behind would be missing."""
  content = io.BytesIO()
  with tarfile.open(fileobj=content, mode="w") as archive:
    add(archive, "a/1.png", encoded("x"))
    place = archive.offset
    add(archive, "b/1.png", encoded("y"))
  data = bytearray(content.getvalue())
  if how == "joined":
    data = data * 2
  elif how == "damaged":
    data[place + 3] ^= 1
  else:
    del data[place + 100 :]
  with tarfile.open(tmp_path / "x.tar", "w") as archive:
    add(archive, "x.tar", bytes(data))
  if not inside:
    (tmp_path / "x.tar").write_bytes(data)
  with pytest.raises(InputError, match=r"from byte \d+ on it is damaged, or another one follows"):
    sources.open_source(f"tar:{tmp_path}/x.tar")


def test_classes_that_look_alike_are_told(tmp_path, capsys):
  for name in (
    "caf\N{LATIN SMALL LETTER E WITH ACUTE}",
    "cafe\N{COMBINING ACUTE ACCENT}",
    "Dog",
    "cat",
  ):
    (tmp_path / name).mkdir()
    (tmp_path / name / "1.png").write_bytes(encoded("x"))
  sources.open_source(f"folder:{tmp_path}")
  assert "2 classes that differ by case or by Unicode's form alone" in capsys.readouterr().err


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


def test_a_folder_that_cannot_be_listed_refuses_the_whole(tmp_path, monkeypatch):
  """Without a class's folder, those behind it would have other numbers."""
  spec, scandir = make_folder(tmp_path), os.scandir
  (tmp_path / "set" / "lost+found").mkdir()

  def denied(path):
    if str(path).rstrip("/").endswith(("cat", "lost+found")):
      raise PermissionError(13, "Permission denied", path)
    return scandir(path)

  monkeypatch.setattr(os, "scandir", denied)
  with pytest.raises(InputError, match=r"set/cat/ cannot be listed .*denied.* move it away"):
    sources.open_source(spec)


def test_folders_that_link_to_each_other_are_refused_in_time(tmp_path, monkeypatch):
  monkeypatch.setattr(files, "_MOST_WAYS", 50)
  make_folder(tmp_path)
  for i in range(12):
    (tmp_path / "set" / f"{i}").mkdir()
  for i in range(12):
    for j in range(12):
      (tmp_path / "set" / f"{i}" / f"x{j}").symlink_to(tmp_path / "set" / f"{j}")
  with pytest.raises(InputError, match=r"links lead to one folder, .* in more than 50 ways"):
    sources.open_source(f"folder:{tmp_path}/set")


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_pictures_beside_class_folders_are_refused_by_every_kind(kind, tmp_path):
  for name in ("x/1.png", "x/cat/2.png"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(encoded(name))
  made = shutil.make_archive(tmp_path / "y", kind, tmp_path / "x") if kind != "folder" else ""
  with pytest.raises(InputError, match=r"class folders, such as cat, and pictures beside them"):
    sources.open_source(f"{kind}:{made or tmp_path / 'x'}")


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
    ({"label": ["b", "a", "b"]}, ["a", "b"], [1, 0, 1], ""),
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


def test_a_row_of_parquet_without_a_label_is_unreadable(tmp_path, capsys):
  tolerant = sources.Tolerant(sources.open_source(parquet_of(tmp_path, label=["b", None, "a"])), 1)
  assert [tolerant.picture(i)[1] for i in range(3)] == [1, 0, 0]
  assert "#1 has no label" in capsys.readouterr().err


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


def labels_of_parquet(*labels):
  def make(root):
    return parquet_of(root, label=labels)

  return make


def no_rows(root):
  pq.write_table(pa.table({"image": pa.array([], pa.binary())}), root / "x.parquet")
  return f"hf:{root}"


def numbers_and_names(root):
  for i, label in enumerate((1, "cat")):
    pq.write_table(pa.table({"image": [b"x"], "label": [label]}), root / f"{i}.parquet")
  return f"hf:{root}"


def named_class(root):
  with tarfile.open(root / "x.tar", "w") as archive:
    add(archive, "0.png", encoded("x"))
    add(archive, "0.cls", b"cat")
  return f"tar:{root}/x.tar"


def only_classes(root):
  with tarfile.open(root / "x.tar", "w") as archive:
    add(archive, "0.cls", b"1")
  return f"tar:{root}/x.tar"


def lost_shard(root):
  spec = make_records(root)
  next((root / "records").glob("*.array_record")).unlink()
  return spec


def pipe_of_parquet(root):
  os.mkfifo(root / "x.parquet")
  return f"hf:{root}"


@pytest.mark.parametrize(
  "name", ["{}-00000-of-00001.parquet", "{}.parquet", "{}/0000.parquet", "cats-{}-0.parquet"]
)
def test_splits_are_told_apart_and_one_can_be_named(name, tmp_path):
  """However others lay them out; in a folder whose own name says nothing of them."""
  root = tmp_path / "train"
  for count, split in enumerate(("test", "train"), 1):
    (path := root / name.format(split)).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": [b"x"] * count}), path)
  with pytest.raises(InputError, match=r"has the splits (cats-)?test, .*; choose one") as refused:
    sources.open_source(f"hf:{root}")
  advised = str(refused.value).rpartition("such as ")[2].rstrip(".")
  assert len(sources.open_source(advised)) == 1


def test_a_split_of_the_hub_is_that_alone(tmp_path, monkeypatch):
  """Its cache may have others, and without a network gives what it has."""

  def fetched(*_, **__):
    return str(tmp_path / "snapshot")

  monkeypatch.setattr(datasets.huggingface_hub, "snapshot_download", fetched)
  with pytest.raises(InputError, match=r"me/pics has no .*begin with test; its split"):
    sources.open_source("hf:me/pics/test")
  (tmp_path / "snapshot" / "data").mkdir(parents=True)
  train = tmp_path / "snapshot" / "data" / "train-00000-of-00001.parquet"
  pq.write_table(pa.table({"image": [b"x"]}), train)
  with pytest.raises(InputError, match=r"me/pics has no .*begin with test; its split"):
    sources.open_source("hf:me/pics/test")
  pq.write_table(pa.table({"image": [b"x", b"y"]}), train.with_name("test.parquet"))
  for spec, count in (("hf:me/pics/train", 1), ("hf:me/pics/test", 2)):
    assert len(sources.open_source(spec)) == count
  with pytest.raises(InputError, match=r"splits test, train; choose one, such as hf:me/pics/test"):
    sources.open_source("hf:me/pics")
  pq.write_table(pa.table({"image": [b"x"] * 5}), train.with_name("train_extra-0.parquet"))
  assert len(sources.open_source("hf:me/pics/train")) == 1
  assert len(sources.open_source("hf:me/pics/train_extra")) == 5


def test_pictures_beside_the_folders_of_a_single_class_are_told(tmp_path):
  """Which are classes, one folder deeper than they should be, or not."""
  for name in ("photos/cat/1.png", "photos/dog/2.png", "photos/preview.png"):
    (path := tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(name))
  source = sources.open_source(f"folder:{tmp_path}")
  assert source.class_names == ["photos"]
  told = "one class, photos, since photos/preview.png lies beside the folders cat, dog"
  assert told in source.beside
  shutil.rmtree(tmp_path / "photos/dog")
  assert sources.open_source(f"folder:{tmp_path}").beside == ""  # one folder tells no classes


def test_records_of_this_folder_are_found_by_a_pattern(tmp_path, monkeypatch):
  make_records(tmp_path)
  monkeypatch.chdir(tmp_path / "records")
  assert len(sources.open_source("arrayrecord:pictures-*")) == len(
    sources.open_source("arrayrecord:.")
  )


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
    (labels_of_parquet([1], [2], [3]), r"has the label \[1\]; needed are numbers or names"),
    (labels_of_parquet(1.0, 2.0, 3.0), r"has the label 1\.0; needed are"),
    (no_rows, "has no rows"),
    (numbers_and_names, "numbers and names as labels"),
    (named_class, r"x\.tar: 0\.cls holds b'cat'; needed is the number of a class"),
    (only_classes, "no pictures are in it"),
    (lambda root: f"folder:{make_zip(root)[4:]}", "is no folder"),
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


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_in_a_zip_is_told(compression, tmp_path):
  """As no decoder of BMP can."""
  source = sources.open_source(make_zip(tmp_path, compression))
  place = source.names.index("set/cat/3.bmp")
  content = bytearray((tmp_path / "set.zip").read_bytes())
  content[source._start[place] + 30 + len("set/cat/3.bmp") + 100] ^= 1
  (tmp_path / "set.zip").write_bytes(content)
  with pytest.raises(sources.Unreadable, match=r"3\.bmp is damaged"):
    source.encoded(place)


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


def test_a_prepared_set_needs_a_path_in_utf8(tmp_path):
  folder = tmp_path / "\udcff"
  with pytest.raises(InputError, match=r"\\xff: ArrayRecord's files need a path in UTF-8"):
    prepare("embedded:emoji", folder)
  assert not folder.exists()
  with pytest.raises(InputError, match="need a path in UTF-8"):
    sources.open_source(f"arrayrecord:{folder}")


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


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
  """Such as one of /proc, where somebody gave hf:/."""

  def scandir(path):
    raise OSError(22, "Invalid argument", path)

  monkeypatch.setattr(os, "scandir", scandir)
  with pytest.raises(InputError, match=f"The folder {tmp_path} cannot be read"):
    sources.open_source(f"hf:{tmp_path}")
