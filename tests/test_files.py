"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import resource
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from launch.engine import command_line, console, output
from launch.engine.checkpoint import save_weights
from launch.engine.parts import write_rows
from launch.engine.writers import Writer
from lightningdit_jax.store.fetching import local_folder
from tests import toy_task
from vavae_jax.common.addresses import local_file
from vavae_jax.common.errors import InputError, printable
from vavae_jax.common.files import (
  ADVICE,
  allow_open_files,
  as_oserror,
  atomic_file,
  local_place,
  place,
  read_note,
  remove_partial,
  write_json,
  write_safetensors,
)
from vavae_jax.data.sources import open_source
from vavae_jax.data.sources.records import write_records


@pytest.fixture
def limited():
  """Limits this process until the test has ended."""
  before = {}

  def limit(kind, soft):
    before.setdefault(kind, resource.getrlimit(kind))
    resource.setrlimit(kind, (soft, before[kind][1]))

  yield limit
  for kind, limits in before.items():
    resource.setrlimit(kind, limits)


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


def test_what_a_killed_writer_leaves_is_hidden_and_removed(tmp_path):
  """With the file that the library of safetensors put beside its own."""
  code = """
import os, signal, sys
from pathlib import Path
from vavae_jax.common.files import atomic_path
with atomic_path(Path(sys.argv[1])) as path:
  path.with_name(".tmpShmcnc").write_bytes(b"half")
  os.kill(os.getpid(), signal.SIGKILL)
"""
  subprocess.run([sys.executable, "-c", code, tmp_path / "b.bin"], check=False)
  assert [path.name[:7] for path in tmp_path.iterdir()] == [".b.bin."]
  remove_partial(tmp_path, "a.bin")
  assert list(tmp_path.iterdir())
  remove_partial(tmp_path, "b.bin")
  assert not list(tmp_path.iterdir())


NOISE = np.random.default_rng(0).bytes(2**20)


@pytest.mark.parametrize(
  "write",
  [
    lambda path: write_json(path, NOISE.hex()),
    lambda path: write_safetensors(path, {"x": np.frombuffer(NOISE, np.uint8)}),
    lambda path: write_records(path, [(NOISE, 0)]),
    lambda path: write_rows(path, np.frombuffer(NOISE, np.uint8)),
  ],
)
def test_a_file_for_which_there_is_no_room_leaves_nothing(tmp_path, limited, write):
  limited(resource.RLIMIT_FSIZE, 2**16)
  with pytest.raises(OSError, match="File too large") as raised:
    write(tmp_path / "big")
  assert raised.value.errno == errno.EFBIG
  assert not list(tmp_path.iterdir())


def test_weights_for_which_there_is_no_room_are_no_workdir(tmp_path, limited):
  limited(resource.RLIMIT_FSIZE, 2**16)
  with pytest.raises(OSError, match="File too large"):
    save_weights(tmp_path / "big", {"x": np.frombuffer(NOISE, np.uint8)}, {})
  assert not (tmp_path / "big").exists()


def test_of_a_save_that_failed_only_the_first_array_is_told(monkeypatch):
  told = []
  for name in ("unraisablehook", "stdout", "stderr"):
    monkeypatch.setattr(sys, name, getattr(sys, name))
  monkeypatch.setattr(sys, "__unraisablehook__", lambda x: told.append(str(x.exc_value)))
  output.keep_harmless()
  for text in ("Event loop is closed", "another"):
    sys.unraisablehook(types.SimpleNamespace(exc_type=RuntimeError, exc_value=RuntimeError(text)))
  assert told == ["another"]


def test_a_full_disk_under_tensorboards_file_is_no_wait(tmp_path, limited):
  limited(resource.RLIMIT_FSIZE, 2**13)
  writer = Writer(tmp_path, toy_task.config(), 0)
  with pytest.raises(OSError, match=r"File too large: .*tfevents"):
    writer.picture(1, "noise", np.frombuffer(NOISE[: 3 * 2**12], np.uint8).reshape(64, 64, 3))
  limited(resource.RLIMIT_FSIZE, 2**20)
  writer.close()


def test_tensorboard_has_what_was_written(tmp_path):
  with contextlib.closing(Writer(tmp_path, toy_task.config(), 6)) as writer:
    writer.scalars(7, {"loss": 0.5})
    writer.picture(7, "grid", np.zeros((2, 3, 3), np.uint8))
  (path,) = (tmp_path / "tensorboard").iterdir()
  data, events = path.read_bytes(), []
  while data:
    (size,) = struct.unpack("<Q", data[:8])
    events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
    data = data[size + 16 :]
  version, begin, scalar, picture = events
  assert version.file_version == "brain.Event:2"
  assert (begin.step, begin.session_log.status) == (7, event_pb2.SessionLog.START)
  assert (scalar.step, scalar.summary.value[0].tag) == (7, "loss")
  assert scalar.summary.value[0].simple_value == 0.5
  assert (picture.summary.value[0].image.height, picture.summary.value[0].image.width) == (2, 3)


@pytest.mark.parametrize("number", ADVICE)
def test_what_the_system_says_is_one_line_with_advice(number, capsys):
  with pytest.raises(OSError, match=re.escape(os.strerror(number))) as raised:  # noqa: SIM117
    with as_oserror(Path("runs")):
      raise ValueError(f"a library: os error {number}: {os.strerror(number)}")
  assert console._explained(raised.value) == 2
  text = capsys.readouterr().err
  assert text.count("\n") == 1
  assert f"runs'; {ADVICE[number]}, then resume with: cd" in text


def test_a_bucket_that_cannot_be_reached_is_one_line(capsys):
  client = pytest.importorskip("aiohttp")
  assert console._explained(client.ClientPayloadError("no\nanswer")) == 2
  told = capsys.readouterr().err
  assert told.startswith("error: no answer; look after the network, the address and your cred")
  assert told.count("\n") == 1


def test_as_many_files_stay_open_as_the_system_allows(limited):
  limited(resource.RLIMIT_NOFILE, 256)
  allow_open_files()
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  assert soft == min(hard, 2**20) > 256


def test_json_has_no_nan(tmp_path):
  path = tmp_path / "values.json"
  write_json(path, {"psnr": 20.5})
  assert json.loads(path.read_text()) == {"psnr": 20.5}
  with pytest.raises(ValueError, match="JSON"):
    write_json(path, {"psnr": float("nan")})
  assert json.loads(path.read_text()) == {"psnr": 20.5}


@pytest.mark.parametrize(
  ("word", "wanted"),
  [
    ("--workdir=~/runs", "--workdir=/home/me/runs"),
    ("--config.latents.path=~", "--config.latents.path=/home/me"),
    ("--output=runs/~/x", "--output=runs/~/x"),
    ("--output=~x", "--output=~x"),
    ("NAME=~/x", "NAME=~/x"),
  ],
)
def test_the_home_folder_is_known_behind_a_flag(monkeypatch, word, wanted):
  monkeypatch.setenv("HOME", "/home/me")
  assert command_line.expanded(word) == wanted


@pytest.mark.parametrize(
  "text",
  ["", "[1", "[]", "{}", '{"a": 1', '{"a": "1"}', '{"a": NaN}', "[" * 100_000, "\udcff"],
)
def test_a_damaged_note_is_named(tmp_path, text):
  path = tmp_path / "note.json"
  path.write_text(text, errors="surrogateescape")
  with pytest.raises(InputError, match=r"note\.json is damaged"):
    read_note(path, a=int)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_note_that_an_editor_saved_is_read(tmp_path, encoding):
  (path := tmp_path / "note.json").write_bytes('{\r\n "a": 1\r\n}'.encode(encoding))
  assert read_note(path, a=int, b=int | None) == {"a": 1}


def test_a_message_is_one_line_without_control_characters():
  assert str(InputError("a\x1b[31mb\udcff\nc\u202e")) == r"a\x1b[31mb\xff\nc\u202e"


@pytest.mark.parametrize("word", ["a b", "a\n\udcffb'\\1\u4e00", "--x", "$'"])
def test_a_command_line_that_is_shown_can_be_given_to_a_shell(word):
  shown = printable(command_line.quoted(word))
  done = subprocess.run(["bash", "-c", f"printf %s {shown}"], capture_output=True, check=True)
  assert done.stdout == os.fsencode(word)


def test_the_command_that_resumes_is_told_from_a_folder_that_is_gone(tmp_path, monkeypatch):
  (tmp_path / "here").mkdir()
  monkeypatch.chdir(tmp_path / "here")
  (tmp_path / "here").rmdir()
  assert command_line.resume_command().startswith("cd / && ")
  monkeypatch.setattr(os, "getcwd", lambda: os.listdir(__file__))  # as of a disk that is gone
  assert command_line.resume_command().startswith("cd / && ")


def test_a_path_begins_at_home_where_it_says_so(monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert local_folder("~/runs") == Path("/home/me/runs")
  with pytest.raises(InputError, match="/home/me/runs does not exist"):
    open_source("folder:~/runs")
  assert place("~/runs") == local_file("~/runs") == local_place("~/runs") == Path("/home/me/runs")
  assert place("runs/~") == Path("runs/~")
  with pytest.raises(InputError, match="only trainings, latents, samples and evaluations"):
    local_place("gs://bucket/runs")


def test_an_output_may_be_the_folder_where_one_is(tmp_path, monkeypatch):
  """So that notes can stand beside it."""
  monkeypatch.chdir(tmp_path)
  for of in (place, local_place):
    assert (of("."), of("a/.."), of("./a")) == (tmp_path, tmp_path, Path("a"))
    with pytest.raises(InputError, match=r"^/ has no name; give a folder below it\.$"):
      of("/")
