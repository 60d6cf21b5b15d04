"""Damaged and hostile weight files: an InputError or right numbers, never a crash, hang or file."""

from __future__ import annotations

import argparse
import pickle
import zipfile
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.convert import convert
from tests import attack, cases
from tests.attack import mutated
from vavae_jax.common.errors import InputError
from vavae_jax.weights.state_dicts import read_content, read_state_dict

FORMATS = cases.FOLDER / "formats"
FILES = (
  FORMATS / "torch_zip.pt",
  FORMATS / "torch_legacy.pt",
  FORMATS / "latents" / "latents_stats.pt",
)


def sources(folder) -> list[tuple[str, bytes]]:
  """One file of each format."""
  statistics = read_state_dict(FILES[2])
  save_file({name: np.array(x) for name, x in statistics.items()}, folder / "x.safetensors")
  np.savez(folder / "x.npz", **statistics)
  np.savez_compressed(folder / "y.npz", **statistics)
  with zipfile.ZipFile(FILES[0]) as source, zipfile.ZipFile(folder / "z.pt", "w") as archive:
    for name in source.namelist():
      beside = pickle.dumps({"args": argparse.Namespace(a=1), "counts": Counter(a=1)}, 4)[:-1]
      content = source.read(name)
      archive.writestr(name, beside + content[2:] if name.endswith(".pkl") else content)
  made = [folder / name for name in ("x.safetensors", "x.npz", "y.npz", "z.pt")]
  return [(path.suffix, path.read_bytes()) for path in (*FILES, *made)]


@pytest.mark.parametrize("count", [1_000, pytest.param(5_000, marks=pytest.mark.slow)])
def test_mutated_files_are_read_or_refused(count, tmp_path):
  draw = np.random.default_rng(count)
  files = sources(tmp_path)
  folder = tmp_path / "fuzzed"
  folder.mkdir()
  refused = 0
  for i in range(count):
    suffix, content = files[i % len(files)]
    path = folder / f"weights{suffix}"
    path.write_bytes(mutated(content, draw))
    try:
      read_content(path)
    except InputError:
      refused += 1
    try:
      convert(str(path), folder / "written.safetensors")
      (folder / "written.safetensors").unlink()
    except InputError:
      assert list(folder.iterdir()) == [path]
    path.unlink()
  assert refused > count // 2


def test_mutated_models_are_refused_or_right(tmp_path):
  """Names and shapes of a real model, changed in the pickle, under whose zip no checksum warns."""
  draw = np.random.default_rng(0)
  with zipfile.ZipFile(FORMATS / "lightningdit_bare_state_dict.pt") as archive:
    entries = {name: archive.read(name) for name in archive.namelist()}
  (pickled,) = (name for name in entries if name.endswith("data.pkl"))
  shapes = {
    k: x.shape for k, x in read_content(FORMATS / "lightningdit_bare_state_dict.pt").items()
  }
  path, written = tmp_path / "weights.pt", tmp_path / "written.safetensors"
  reasons = set()
  for _ in range(60):
    data = bytearray(entries[pickled])
    data[int(draw.integers(len(data)))] = int(draw.integers(256))
    with zipfile.ZipFile(path, "w") as archive:
      for name, content in entries.items():
        archive.writestr(name, bytes(data) if name == pickled else content)
    try:
      convert(str(path), written)
    except InputError as error:
      reasons |= {
        word for word in ("unknown: ", "of another shape: ", "damaged") if word in str(error)
      }
      assert not written.exists()
      continue
    assert {k: x.shape for k, x in load_file(written).items()} == shapes
    written.unlink()
  assert len(reasons) > 1  # the model's own checks were reached


def test_absurd_shapes_are_refused(tmp_path):
  header = b'{"a":{"dtype":"F32","shape":[1000000000000,1000000000000],"data_offsets":[0,4]}}'
  path = tmp_path / "absurd.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(InputError, match="damaged or not a safetensors"):
    read_content(path)
  path.write_bytes((2**62).to_bytes(8, "little") + header)
  with pytest.raises(InputError, match="damaged or not a safetensors"):
    read_content(path)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_eight_bit_floats_are_named_so(dtype, tmp_path):
  header = f'{{"a":{{"dtype":"{dtype}","shape":[4],"data_offsets":[0,4]}}}}'.encode()
  path = tmp_path / "small.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(InputError, match=r"holds 8-bit floats, .*: a\. Give a file of 16"):
    read_content(path)


def test_what_users_have_is_read_or_refused(tmp_path):
  """A few files of each kind; `tests.attack` takes ten thousand."""
  for name, kind in attack.kinds(tmp_path):
    outcome = attack.attack(name, kind, 70)
    assert outcome["held"], outcome
