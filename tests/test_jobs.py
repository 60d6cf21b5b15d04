"""Jobs run in order of their needs, once, and go on where they were stopped."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from launch.jobs import Job, run
from tests.conftest import ROOT
from vavae_jax.errors import InputError

RUNNER = """
import signal
import sys
from pathlib import Path
from launch.engine import console
from launch.jobs import Job, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs without it
def main(argv):
  folder = Path(sys.argv[1])
  waits = (
    "import signal, sys, time; "
    "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(143))); "
    "open('begun', 'w').close(); time.sleep(60)"
  )
  run([Job("first", ("timeit", "-n1", "-r1", waits))], folder, 1)
"""


@pytest.fixture
def write(tmp_path):
  """A job that appends its name to a file, and fails if there is a file called stop."""

  def make(name, *needs, fails=False):
    work = f"open(r'{tmp_path / 'ran'}', 'a').write({name + ' '!r})"
    more = f"assert not __import__('os').path.exists(r'{tmp_path / 'stop'}')" if fails else "pass"
    return Job(name, ("timeit", "-n1", "-r1", work, more), needs)

  return make


def ran(tmp_path):
  file = tmp_path / "ran"
  return file.read_text().split() if file.exists() else []


def test_needs_come_first_and_nothing_runs_twice(write, tmp_path):
  jobs = [write("c", "a/x", "b"), write("a/x"), write("b", "a/x")]
  run(jobs, tmp_path, 2)
  assert ran(tmp_path) == ["a/x", "b", "c"]
  assert "loop" in (tmp_path / "logs" / "a" / "x.log").read_text()
  run(jobs, tmp_path, 2)
  assert ran(tmp_path) == ["a/x", "b", "c"]
  other = Job("b", (*jobs[2].words[:-1], "1"), jobs[2].needs)
  run([jobs[0], jobs[1], other], tmp_path, 1)  # as another command it has not run
  assert ran(tmp_path) == ["a/x", "b", "c", "b"]


def test_a_failure_stops_what_needs_it_alone(write, tmp_path):
  (tmp_path / "stop").touch()
  jobs = [write("a", fails=True), write("b", "a"), write("c")]
  with pytest.raises(InputError, match=r"1 of 3 jobs failed: a; 1 that need them"):
    run(jobs, tmp_path, 1)
  assert ran(tmp_path) == ["a", "c"]
  (tmp_path / "stop").unlink()
  run(jobs, tmp_path, 1)
  assert ran(tmp_path) == ["a", "c", "a", "b"]


def test_jobs_share_what_they_compile(tmp_path, monkeypatch):
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  look = f"import os; open(r'{tmp_path}/' + os.environ['JAX_COMPILATION_CACHE_DIR'][-8:], 'w')"
  run([Job(name, ("timeit", "-n1", "-r1", look, f"'{name}'")) for name in "ab"], tmp_path, 1)
  assert len([path for path in tmp_path.iterdir() if len(path.name) == 8]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_jobs_save(number, tmp_path):
  code = RUNNER + "console.run_command(main, arguments=1)"
  words = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}", str(tmp_path)]
  environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}
  process = subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 60
  while not (tmp_path / "begun").exists():
    assert time.monotonic() < deadline
    assert process.poll() is None
    time.sleep(0.05)
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert "stopped; resume with" in errors
  assert (tmp_path / "saved").exists()
  told = json.loads((tmp_path / "jobs.json").read_text())
  assert not told["first"]["done"]
  assert told["first"]["seconds"] > 0
