"""One owner of an output at a time, on one host, on several, and in a bucket."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from launch.engine import ownership
from launch.engine.ownership import owned
from tests.conftest import ROOT
from tests.fake_gcs import FakeGcs
from tests.survive import Toy, ended
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, place

HOLD = """
import sys, time
from pathlib import Path
from launch.engine import ownership
ownership.BEAT_SECONDS = 0.2
with ownership.owned(Path(sys.argv[1])):
  print("mine", flush=True)
  time.sleep(60)
"""

# What an owner on another host notes.
ELSEWHERE = '{"machine": "b", "process": 1, "began": "1", "beat": 0}'


@pytest.mark.parametrize("beside", [False, True])
def test_an_output_where_no_file_can_be_made_is_refused(beside):
  with (
    pytest.raises(InputError, match=r"/proc/no.* cannot be written"),
    owned(Path("/proc/no"), beside=beside),
  ):
    pytest.fail("nothing is owned")


@pytest.fixture
def owner(tmp_path, environment):
  """Another process, which owns the folder."""
  words = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
  pipe = subprocess.PIPE
  process = subprocess.Popen(words, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
  assert process.stdout.readline() == "mine\n"
  yield process
  process.kill()
  process.communicate()


def test_a_second_one_is_told_who_is_at_work_and_a_killed_one_is_followed_at_once(tmp_path, owner):
  with pytest.raises(InputError, match=rf"process {owner.pid} on "), owned(tmp_path / "out"):
    pass
  owner.kill()  # its parent, which is this process, takes no note of it yet
  while ownership._began(owner.pid):
    time.sleep(0.01)
  with owned(tmp_path / "out"):
    assert json.loads((tmp_path / "out" / ".owner").read_text())["process"] == os.getpid()
  assert not list((tmp_path / "out").iterdir())


def test_a_process_of_the_same_number_is_another_if_it_began_later(tmp_path, owner):
  path = tmp_path / "out" / ".owner"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"began": "1"}))
  with owned(tmp_path / "out"):
    pass


def test_a_note_without_a_beginning_is_of_nobody(tmp_path):
  note = {"machine": ownership._machine(), "process": 2**40, "began": ""}
  (tmp_path / ".owner").write_text(json.dumps(note))
  with owned(tmp_path):
    pass


@pytest.mark.parametrize("process", [b'"1"', b"null", b"\xff"])
def test_a_damaged_note_counts_as_one_of_another_host(tmp_path, monkeypatch, process):
  monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
  monkeypatch.setattr(ownership, "SILENT_SECONDS", 0.2)
  machine = json.dumps(ownership._machine()).encode()
  note = b'{"machine": %s, "began": "1", "process": %s}' % (machine, process)
  (tmp_path / ".owner").write_bytes(note)
  with owned(tmp_path):
    assert json.loads((tmp_path / ".owner").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("beats", [True, False])
def test_an_owner_on_another_host_counts_as_long_as_it_beats(tmp_path, monkeypatch, beats):
  monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.1)
  monkeypatch.setattr(ownership, "SILENT_SECONDS", 0.5)
  (path := tmp_path / ".owner").write_text(ELSEWHERE)
  if beats:
    threading.Timer(0.2, path.write_text, [ELSEWHERE.replace("0", "1")]).start()
    with pytest.raises(InputError, match="process 1 on"), owned(tmp_path):
      pass
  else:
    with owned(tmp_path):
      time.sleep(0.3)
      assert json.loads(path.read_text())["beat"] > 0


@pytest.mark.parametrize("beats", [True, False])
def test_an_owner_in_a_bucket_counts_as_long_as_it_beats(monkeypatch, beats):
  monkeypatch.setattr(ownership, "SILENT_SECONDS", 2.0)
  with FakeGcs() as gcs:
    for name, value in gcs.variables.items():
      monkeypatch.setenv(name, value)
    gcs.write("run/.owner", ELSEWHERE.encode())
    if beats:
      changed = ELSEWHERE.replace("0", "1").encode()
      # It is said when the note has been read for the first time.
      monkeypatch.setattr(ownership.console, "say", lambda _: gcs.write("run/.owner", changed))
      with pytest.raises(InputError, match="process 1 on"), owned(place("gs://bucket/run")):
        pass
    else:
      with owned(place("gs://bucket/run")):
        assert json.loads(gcs.objects["run/.owner"][0])["process"] == os.getpid()
      assert not gcs.objects


def test_one_that_another_host_took_over_from_ends(tmp_path, environment, owner):
  (tmp_path / "out" / ".owner").write_text(ELSEWHERE)
  assert owner.wait(timeout=30) == 2


@pytest.mark.parametrize("replaced", [True, False])
def test_one_whose_folder_is_deleted_or_replaced_ends_with_one_line(tmp_path, owner, replaced):
  shutil.rmtree(tmp_path / "out")
  if replaced:
    (tmp_path / "out").mkdir()
  _, told = owner.communicate(timeout=30)
  assert (owner.returncode, told.count("\n")) == (2, 1), told
  assert f"error: {tmp_path / 'out'} was deleted or replaced" in told
  assert not list((tmp_path / "out").glob("*"))


def test_what_was_deleted_at_the_end_is_told_instead_of_what_came_of_it(tmp_path):
  out = tmp_path / "out"
  with pytest.raises(InputError, match="out was deleted or replaced"), owned(out):
    shutil.rmtree(out)
  with pytest.raises(InputError, match="out was deleted or replaced"), owned(out):
    (out.rename(tmp_path / "elsewhere") / out / "note").write_text("fails")


def test_an_owners_file_that_was_deleted_alone_is_written_again(tmp_path, owner):
  (path := tmp_path / "out" / ".owner").unlink()
  while not path.exists():
    time.sleep(0.01)
  time.sleep(0.3)
  assert owner.poll() is None


def test_no_beat_needs_room_on_a_disk(tmp_path):
  (path := tmp_path / ".owner").touch()
  claim = ownership._Claim(path)
  sizes = set()
  for beat in (0, 9, 10, 10**9):
    claim._write(beat)
    sizes.add(path.stat().st_size)
  assert len(sizes) == 1


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("other")])
def test_an_owners_file_that_is_no_file_is_named(tmp_path, make):
  make(tmp_path / ".owner")
  with pytest.raises(InputError, match=r"\.owner is to name the owner and is no"), owned(tmp_path):
    pass
  assert [path.name for path in tmp_path.iterdir()] == [".owner"]


def test_the_output_of_a_file_is_owned_beside_it(tmp_path):
  with owned(tmp_path / "a.npz", beside=True):
    assert [path.name for path in tmp_path.iterdir()] == [".a.owner"]
    with owned(tmp_path / "b.npz", beside=True):
      pass
    # Samples and an evaluation of one name both write a.json.
    with pytest.raises(InputError, match="is being"), owned(tmp_path / "a", beside=True):
      pass
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["x" * 255, "\u4e00" * 85, "x" * 251 + ".npz"])
def test_the_longest_names_have_an_owner(tmp_path, name):
  with owned(tmp_path / name, beside=True), atomic_file(tmp_path / name) as file:
    file.write(b"whole")
  assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_second_training_touches_nothing_of_the_first(tmp_path, environment):
  run = Toy(tmp_path / "all" / "run", environment, 0.1)
  (first,) = run.start()
  run.wait_for(lambda: run.steps() >= 3, [first])
  (unfinished := run.workdir / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir()
  first.send_signal(signal.SIGSTOP)  # else it may end before the second one looks
  (second,) = run.start()
  code, printed = ended(second)
  first.send_signal(signal.SIGCONT)
  assert (code, printed.count("\n")) == (2, 1), printed
  assert f"process {first.pid} on" in printed
  assert unfinished.is_dir()
  first.send_signal(signal.SIGTERM)
  assert ended(first)[0] == 128 + signal.SIGTERM
  run.finish()
  assert not unfinished.exists()
