"""Damaged and hostile weight files: an InputError or right numbers, never a crash, hang or file."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.convert import convert
from tests import cases
from vavae_jax.errors import InputError
from vavae_jax.state_dicts import read_content, read_state_dict

FORMATS = cases.FOLDER / "formats"
FILES = (
  FORMATS / "torch_zip.pt",
  FORMATS / "torch_legacy.pt",
  FORMATS / "latents" / "latents_stats.pt",
)
# Bytes that mean something to pickles, zip archives and headers of arrays.
WORDS = (b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"../", b"R", b"c", b"l\xff\xff\xff\x7f", b"PK")


def sources(folder) -> list[tuple[str, bytes]]:
  """One file of each format."""
  statistics = read_state_dict(FILES[2])
  save_file({name: np.array(x) for name, x in statistics.items()}, folder / "x.safetensors")
  np.savez(folder / "x.npz", **statistics)
  np.savez_compressed(folder / "y.npz", **statistics)
  made = [folder / name for name in ("x.safetensors", "x.npz", "y.npz")]
  return [(path.suffix, path.read_bytes()) for path in (*FILES, *made)]


def mutated(content: bytes, draw: np.random.Generator) -> bytes:
  """A few bytes flipped, cut off, taken out, doubled, or replaced by words."""
  data = bytearray(content)
  for _ in range(draw.integers(1, 4)):
    place, kind = int(draw.integers(len(data))), draw.integers(5)
    if kind == 0:
      data[place] ^= 1 << int(draw.integers(8))
    elif kind == 1:
      del data[place:]
    elif kind == 2:
      del data[place : place + int(draw.integers(1, 64))]
    elif kind == 3:
      data[place:place] = data[place : place + int(draw.integers(1, 64))]
    else:
      word = WORDS[draw.integers(len(WORDS))]
      data[place : place + len(word)] = word
    if not data:
      break
  return bytes(data)


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
  """Names and shapes of a real model, whose architecture is then told by what is wrong."""
  draw = np.random.default_rng(0)
  content = (FORMATS / "lightningdit_bare_state_dict.pt").read_bytes()
  start = content.index(b"pos_embed")
  for i in range(60):
    data = bytearray(content)
    place = start + int(draw.integers(6_000))  # in the pickle that names the tensors
    data[place] = int(draw.integers(256))
    path = tmp_path / "weights.pt"
    path.write_bytes(data)
    try:
      convert(str(path), tmp_path / f"{i}.safetensors")
    except InputError:
      assert not (tmp_path / f"{i}.safetensors").exists()


def test_absurd_shapes_are_refused(tmp_path):
  header = b'{"a":{"dtype":"F32","shape":[1000000000000,1000000000000],"data_offsets":[0,4]}}'
  path = tmp_path / "absurd.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
  with pytest.raises(InputError, match="damaged or no safetensors"):
    read_content(path)
  path.write_bytes((2**62).to_bytes(8, "little") + header)
  with pytest.raises(InputError, match="damaged or no safetensors"):
    read_content(path)
