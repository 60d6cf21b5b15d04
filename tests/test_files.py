"""Files are written whole or not at all."""

from __future__ import annotations

import json

import pytest

from vavae_jax.files import atomic_file, write_json


def test_a_file_appears_when_it_is_whole_in_a_folder_of_its_own(tmp_path):
  path = tmp_path / "a" / "b.bin"
  with atomic_file(path) as file:
    file.write(b"whole")
    file.flush()
    assert not path.exists()
  assert path.read_bytes() == b"whole"
  assert list(path.parent.iterdir()) == [path]


def test_what_stood_there_survives_an_error(tmp_path):
  path = tmp_path / "b.bin"
  path.write_bytes(b"old")

  def fail() -> None:
    with atomic_file(path) as file:
      file.write(b"ne")
      raise RuntimeError("in the middle")

  with pytest.raises(RuntimeError, match="in the middle"):
    fail()
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
  path = tmp_path / "values.json"
  write_json(path, {"psnr": 20.5})
  assert json.loads(path.read_text()) == {"psnr": 20.5}
  with pytest.raises(ValueError, match="JSON"):
    write_json(path, {"psnr": float("nan")})
  assert json.loads(path.read_text()) == {"psnr": 20.5}
