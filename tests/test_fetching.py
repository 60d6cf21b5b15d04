"""Latents in a bucket or in a tar, split and packed, are copied once and are then a store."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from types import SimpleNamespace

import fsspec
import numpy as np
import pytest

from configs import quickstart
from launch import tasks
from launch.engine import configuration
from launch.engine.ownership import owned
from launch.train import train
from lightningdit_jax.options import Options
from lightningdit_jax.store import fetching
from lightningdit_jax.store.latents import LatentStore
from tests import cases
from vavae_jax.common.errors import InputError

PUBLISHED = cases.FOLDER / "formats" / "latents"
FILES = sorted(PUBLISHED.iterdir())


def tar(mode="w:gz", files=FILES):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode=mode) as archive:
    for file in files:
      archive.add(file, f"imagenet_train_256/{file.name}")
    evil = tarfile.TarInfo("../../evil.safetensors")
    evil.type, evil.linkname = tarfile.SYMTYPE, "/etc/passwd"
    archive.addfile(evil)
  return buffer.getvalue()


def split_into(folder, data, parts=3):
  """As `split` does."""
  folder.mkdir()
  size = len(data) // parts + 1
  for i in range(parts):
    (folder / f"split_a{'abc'[i]}").write_bytes(data[i * size : (i + 1) * size])
  return str(folder)


def assert_published(folder):
  found, expected = LatentStore(folder), LatentStore(PUBLISHED)
  assert len(found) == len(expected)
  for i in range(len(found)):
    np.testing.assert_array_equal(found[i]["latent"], expected[i]["latent"])


def test_a_folder_of_shards_stays_where_it_is(tmp_path):
  assert fetching.local_folder(str(PUBLISHED), str(tmp_path / "cache")) == PUBLISHED
  assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_split_tar_is_a_store(mode, tmp_path):
  path = split_into(tmp_path / "splits", tar(mode))
  told = []
  folder = fetching.local_folder(path, str(tmp_path / "cache"), lambda *x: told.append(x))
  assert_published(folder)
  assert told[-1][1] == told[-1][2] == len(tar(mode))
  assert not list(tmp_path.rglob("evil*"))
  before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
  assert fetching.local_folder(path, str(tmp_path / "cache")) == folder
  assert before == {file: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"mesh.fsdp": 3}, "config.mesh asks for"),
    ({"model.num_heads": 5}, "config.model cannot be built"),
    ({"init_from": "no/such"}, "config.init_from: no/such"),
    ({"optimizer.b1": 0.75}, r"another configuration \(config.optimizer.b1: .* there, 0.75 now\)"),
    ({"model.num_classes": 7}, r"\(config.model.num_classes: 9 there, 7 now\)"),
    ({}, "is being written by"),
    # What is known by the latents alone.
    ({"model.num_classes": Options.num_classes}, "another tokenizer"),
  ],
)
def test_mistakes_are_found_before_latents_are_copied(changes, named, tmp_path):
  config = quickstart.diffusion(tiny=True)
  if "init_from" not in changes:
    configuration.claim_workdir(tmp_path / "run", tasks.frozen(config))
  path = split_into(tmp_path / "splits", tar())
  config.latents.update(path=path, cache=str(tmp_path / "cache"))
  config.update_from_flattened_dict(changes)
  other = contextlib.nullcontext() if changes else owned(tmp_path / "run")
  with other, pytest.raises(InputError, match=named):
    train(config, tmp_path / "run")
  assert (tmp_path / "cache").exists() == (named == "another tokenizer")


def test_one_tar_is_a_store(tmp_path):
  (tmp_path / "latents.tar.gz").write_bytes(tar())
  folder = fetching.local_folder(str(tmp_path / "latents.tar.gz"), str(tmp_path / "cache"))
  assert_published(folder)


@pytest.mark.parametrize("lost", [0, 1, 2])
@pytest.mark.parametrize("mode", ["w:gz", "w"])
def test_a_missing_part_is_told(mode, lost, tmp_path):
  path = split_into(tmp_path / "splits", tar(mode))
  (tmp_path / "splits" / f"split_a{'abc'[lost]}").unlink()
  with pytest.raises(InputError, match=r"is not a tar|could not be copied|are missing"):
    fetching.local_folder(path, str(tmp_path / "cache"))


def test_a_flipped_byte_in_a_packed_tar_is_told(tmp_path):
  data = bytearray(tar())
  data[-6] ^= 1  # of the checksum
  (tmp_path / "latents.tar.gz").write_bytes(data)
  with pytest.raises(InputError, match="could not be copied"):
    fetching.local_folder(str(tmp_path / "latents.tar.gz"), str(tmp_path / "cache"))


def test_another_file_at_the_same_place_is_copied_anew(tmp_path):
  path = tmp_path / "latents.tar"
  path.write_bytes(tar("w"))
  folder = fetching.local_folder(str(path), str(tmp_path / "cache"))
  (folder / "left_over").touch()
  path.write_bytes(tar("w", FILES[::-1]))
  os.utime(path, ns=(1, 1))
  assert fetching.local_folder(str(path), str(tmp_path / "cache")) == folder
  assert not (folder / "left_over").exists()


def test_what_lies_beside_latents_is_nothing_to_a_copy(bucket, tmp_path):
  for file in FILES:
    bucket.pipe(f"/shards/{file.name}", file.read_bytes())
  folder = fetching.local_folder("memory://shards", str(tmp_path / "cache"))
  (folder / "kept").touch()
  bucket.pipe("/shards/README.md", b"of whom they are")
  bucket.pipe("/shards/pictures/1.png", b"x")
  assert fetching.local_folder("memory://shards", str(tmp_path / "cache")) == folder
  assert (folder / "kept").exists()


def test_a_copy_of_an_earlier_version_is_kept(bucket, tmp_path):
  """It noted what lay beside the latents, too, and no marks where the hub tells no times."""
  for file in FILES:
    bucket.pipe(f"/shards/{file.name}", file.read_bytes())
  folder = fetching.local_folder("memory://shards", str(tmp_path / "cache"))
  (folder / "kept").touch()
  note = json.loads((folder / "copied.json").read_text())
  before = {name: [size, ""] for name, (size, _) in note.items()} | {"/shards/README.md": [1, ""]}
  (folder / "copied.json").write_text(json.dumps(before))
  fetching.local_folder("memory://shards", str(tmp_path / "cache"))
  assert (folder / "kept").exists()
  first = next(iter(note))
  assert json.loads((folder / "copied.json").read_text()) == note  # so that a change is seen
  (folder / "copied.json").write_text(json.dumps(before | {first: [note[first][0], "another"]}))
  fetching.local_folder("memory://shards", str(tmp_path / "cache"))
  assert not (folder / "kept").exists()


@pytest.mark.parametrize("name", ["shard.safetensors", "latents.tar"])
def test_another_file_on_the_hub_is_known_by_its_hash(name, monkeypatch):
  """The hub tells no times, and a hash only where it lists files."""

  def seen(blob):
    about = {"name": f"datasets/O/N/{name}", "size": 7, "type": "file"}
    system = SimpleNamespace(
      ls=lambda root, detail: [about | {"blob_id": blob, "lfs": None, "last_commit": None}],
      info=lambda root: about,
    )
    monkeypatch.setattr(fetching.fsspec.core, "url_to_fs", lambda _: (system, ""))
    return fetching._entries(f"hf://datasets/O/N/{name if name.endswith('.tar') else ''}")

  assert seen("a" * 40) != seen("b" * 40)


def test_what_a_killed_copy_left_is_removed(tmp_path):
  path = split_into(tmp_path / "splits", tar())
  folder = fetching.local_folder(path, str(tmp_path / "cache"))
  (folder / "complete.json").unlink()
  (folder / f".{FILES[0].name}.12.partial").mkdir()
  assert fetching.local_folder(path, str(tmp_path / "cache")) == folder
  assert not list(folder.glob(".*"))


def test_a_cache_in_a_bucket_is_refused():
  with pytest.raises(InputError, match=r"^config\.latents\.cache is gs://b/c: .*of this machine"):
    fetching.local_folder("memory://shards", "gs://b/c")


@pytest.mark.parametrize("content", ["", "[1]", "[" * 10**5])
def test_a_damaged_note_of_a_copy_is_told_with_what_to_do(content, tmp_path):
  path = split_into(tmp_path / "splits", tar())
  folder = fetching.local_folder(path, str(tmp_path / "cache"))
  (folder / "copied.json").write_text(content)
  with pytest.raises(InputError, match=r"copied\.json is damaged .*delete the folder .*anew\.$"):
    fetching.local_folder(path, str(tmp_path / "cache"))
  shutil.rmtree(folder)
  assert_published(fetching.local_folder(path, str(tmp_path / "cache")))


def test_an_encoding_that_was_killed_is_no_split_tar(tmp_path):
  (tmp_path / ".latents_rank00_shard000.safetensors.12.partial").mkdir()
  assert fetching.local_folder(str(tmp_path), str(tmp_path / "cache")) == tmp_path


@pytest.fixture
def bucket():
  """A bucket in memory."""
  system = fsspec.filesystem("memory")
  yield system
  system.rm("/", recursive=True)


def test_a_bucket_of_shards_and_one_of_parts_are_stores(bucket, tmp_path):
  for file in FILES:
    bucket.pipe(f"/shards/{file.name}", file.read_bytes())
  assert_published(fetching.local_folder("memory://shards", str(tmp_path / "cache")))
  data = tar()
  for i in range(2):
    bucket.pipe(f"/splits/split_a{'ab'[i]}", data[i * 900 : 900 if i == 0 else None])
  assert_published(fetching.local_folder("memory://splits", str(tmp_path / "cache")))


def test_a_copy_that_was_cut_off_goes_on(bucket, tmp_path, monkeypatch):
  for file in FILES:
    bucket.pipe(f"/shards/{file.name}", file.read_bytes())
  copied = []
  copy = fetching._copy

  def copy_one(source, target, *rest):
    if copied:
      raise OSError("the network is gone")
    copied.append(target)
    copy(source, target, *rest)

  monkeypatch.setattr(fetching, "_copy", copy_one)
  with pytest.raises(InputError, match="the network is gone"):
    fetching.local_folder("memory://shards", str(tmp_path / "cache"))
  monkeypatch.undo()
  before = copied[0].stat().st_mtime_ns
  assert_published(fetching.local_folder("memory://shards", str(tmp_path / "cache")))
  assert copied[0].stat().st_mtime_ns == before


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda root: split_into(root / "x", tar()[:-400]), "could not be copied|is not a tar"),
    (lambda root: split_into(root / "x", b"no tar" * 300), "is not a tar"),
    (lambda root: split_into(root / "x", tar(files=())), "holds no latent shards"),
    (lambda root: "memory://nothing", "could not be copied"),
    (lambda root: "nonsense://nothing", "could not be copied"),
  ],
)
def test_what_holds_no_latents_is_named(make, message, tmp_path):
  with pytest.raises(InputError, match=message):
    fetching.local_folder(make(tmp_path), str(tmp_path / "cache"))


def test_a_small_disk_is_named_before_anything_is_copied(tmp_path, monkeypatch):
  path = split_into(tmp_path / "splits", tar())
  usage = type("Usage", (), {"free": 10})
  monkeypatch.setattr(fetching.shutil, "disk_usage", lambda folder: usage)
  with pytest.raises(InputError, match=r"config\.latents\.cache"):
    fetching.local_folder(path, str(tmp_path / "cache"))


def test_a_data_set_of_the_hub_is_copied_as_from_a_bucket(tmp_path, monkeypatch):
  path = split_into(tmp_path / "splits", tar())
  opened = []

  def url_to_fs(url):
    opened.append(url)
    return fsspec.filesystem("file"), path

  monkeypatch.setattr(fetching.fsspec.core, "url_to_fs", url_to_fs)
  store = LatentStore(fetching.local_folder("hf:OWNER/NAME", str(tmp_path / "cache")))
  assert len(store) == len(LatentStore(PUBLISHED))
  assert {*opened} == {"hf://datasets/OWNER/NAME"}


@pytest.mark.parametrize("path", ["hf:OWNER/NAME", "gs://bucket/latents", "hf://datasets/O/N"])
def test_an_error_of_a_client_is_one_line(tmp_path, monkeypatch, path):
  class ClientError(Exception):
    pass

  def unreachable(url):
    raise ClientError("no such host")

  monkeypatch.setattr(fetching.fsspec.core, "url_to_fs", unreachable)
  with pytest.raises(InputError, match=r"could not be copied .*no such host"):
    fetching.local_folder(path, str(tmp_path))
