"""Jobs run in order of their needs, once, and continue where they were stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from launch.engine.circumstances import processor
from launch.lab.jobs import FailedError, Job, Record, run
from tests.conftest import ROOT
from vavae_jax.common.errors import InputError

RUNNER = """
import signal
import sys
from pathlib import Path
from launch.engine import console
from launch.lab.jobs import Job, run
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start jobs without it
def main(*words):
  folder = Path(sys.argv[1])
  waits = (
    "import os, signal, sys, time; "
    "signal.signal(signal.SIGTERM, lambda *_: (open('saved', 'w').close(), sys.exit(143))); "
    "open('pid', 'w').write(str(os.getpid())); os.rename('pid', 'begun'); time.sleep(60)"
  )
  run([Job("first", ("timeit", "-n1", "-r1", waits), folder / "saved")], folder, 1)
"""


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}


def await_file(path, process):
  deadline = time.monotonic() + 60
  while not path.exists():
    assert time.monotonic() < deadline
    assert process.poll() is None
    time.sleep(0.05)


@pytest.fixture
def write(tmp_path):
  """A job that appends its name to a file, and fails if there is a file called stop."""

  def make(name, *needs, fails=False, **options):
    work = f"open(r'{tmp_path / 'ran'}', 'a').write({name + ' '!r})"
    output = tmp_path / f"{name.replace('/', '_')}.out"
    more = f"assert not __import__('os').path.exists(r'{tmp_path / 'stop'}')" if fails else "pass"
    words = ("timeit", "-n1", "-r1", work, more, f"open(r'{output}', 'w').close()")
    return Job(name, words, output, needs=needs, **options)

  return make


def ran(tmp_path):
  file = tmp_path / "ran"
  return file.read_text().split() if file.exists() else []


def test_what_is_done_says_where_it_was_made(tmp_path):
  """Each commit, version, machine and device once; of jobs that did not end nothing."""
  jobs = [Job(name, (), tmp_path / f"{name}.json") for name in ("a", "b", "c", "d")]
  record = Record(tmp_path, jobs)
  assert record.made(jobs) == "no job so far"
  for job, jax, device in zip(
    jobs, "1223", ("2 x cpu", "1 x H200", "1 x H200", "1 x X"), strict=True
  ):
    job.output.write_text(json.dumps({"run": {"jax": jax, "device": device}}))
    record.add(job, 1.0, done=job is not jobs[-1])
  commits, versions, machine, devices = record.made(jobs).split("; ")
  assert commits.startswith("commits ")
  assert (versions, devices) == ("jax 1, 2", "1 x H200")
  assert machine == processor()


def test_needs_come_first_and_nothing_runs_twice(write, tmp_path):
  jobs = [write("a/x"), write("c", "a/x"), write("b", "a/x")]
  run(jobs, tmp_path, 1)
  assert ran(tmp_path) == ["a/x", "c", "b"]
  assert "loop" in (tmp_path / "logs" / "a" / "x.log").read_text()
  run(jobs, tmp_path, 2)
  assert ran(tmp_path) == ["a/x", "c", "b"]


@pytest.mark.parametrize("change", ["words", "content", "output"])
def test_what_has_changed_runs_again_with_all_that_needs_it(write, tmp_path, change):
  jobs = [write("a"), write("b", "a"), write("c", "b"), write("d")]
  run(jobs, tmp_path, 1)
  if change == "output":
    jobs[1].output.unlink()
    run(jobs, tmp_path, 1)
    assert ran(tmp_path) == ["a", "b", "c", "d", "b"]  # it is made as it was
    return
  new = {"words": (*jobs[1].words, "1"), "content": "another configuration"}[change]
  jobs[1] = dataclasses.replace(jobs[1], **{change: new})
  run(jobs, tmp_path, 1)
  assert ran(tmp_path) == ["a", "b", "c", "d", "b", "c"]


def test_what_would_go_on_with_the_output_of_another_is_refused(write, tmp_path):
  jobs = [write("a", resumes=True), write("b", "a", resumes=True), write("c")]
  run(jobs, tmp_path, 1)
  jobs[0] = dataclasses.replace(jobs[0], content="another configuration")
  with pytest.raises(InputError, match=r"2 outputs were made by.*a\.out, .*b\.out: .* Move"):
    run(jobs, tmp_path, 1)
  for job in jobs[:2]:
    job.output.rename(tmp_path / f"old_{job.name}")
  run(jobs, tmp_path, 1)
  assert ran(tmp_path) == ["a", "b", "c", "a", "b"]


def test_a_folder_that_has_moved_goes_on(write, tmp_path):
  jobs = [write("a"), write("b", "a")]
  run(jobs[:1], tmp_path, 1)
  there = tmp_path / "there"
  moved = [
    dataclasses.replace(
      job,
      words=tuple(word.replace(str(tmp_path), str(there)) for word in job.words),
      output=there / job.output.name,
    )
    for job in jobs
  ]
  there.mkdir()
  for name in ("jobs.json", "a.out"):
    (tmp_path / name).rename(there / name)
  run(moved, there, 1)
  assert ran(there) == ["b"]


def test_a_folder_in_use_is_left_alone(write, tmp_path):
  """Also where only a job is left, whose parent was killed."""
  code = RUNNER + "main([])"
  words = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}", str(tmp_path)]
  parent = subprocess.Popen(words, env=ENVIRONMENT)
  await_file(tmp_path / "begun", parent)
  parent.kill()
  parent.wait()
  with pytest.raises(InputError, match="Another process is using"):
    run([write("a")], tmp_path, 1)
  os.kill(int((tmp_path / "begun").read_text()), signal.SIGKILL)
  deadline = time.monotonic() + 60
  while "a" not in ran(tmp_path):  # until the system has cleaned up
    assert time.monotonic() < deadline
    with contextlib.suppress(InputError):
      run([write("a")], tmp_path, 1)


@pytest.mark.parametrize(
  "jobs", [["a", "a"], ["b needs a", "a"], ["a needs b"]], ids=["twice", "late", "missing"]
)
def test_jobs_that_cannot_be_are_a_mistake(write, tmp_path, jobs):
  made = [write(name, *needs.split()) for name, _, needs in (x.partition(" needs ") for x in jobs)]
  with pytest.raises(ValueError, match="occurs twice, or before one of"):
    run(made, tmp_path, 1)


def test_the_time_of_a_job_is_that_of_the_job_as_it_is(write, tmp_path):
  job = write("a")
  changed = dataclasses.replace(job, content="less work")
  Record(tmp_path, [job]).add(job, 100.0, done=True)
  assert Record(tmp_path, [changed]).seconds(changed) == 0
  Record(tmp_path, [changed]).add(changed, 2.0, done=False)
  Record(tmp_path, [changed]).add(changed, 1.0, done=True)  # it was stopped and went on
  assert Record(tmp_path, [changed]).seconds(changed) == 3


def test_a_page_is_of_jobs_that_ended(write, tmp_path):
  """One that stands is left alone where none could begin."""
  pages = []

  def write_page():
    pages.append(ran(tmp_path))

  jobs = [write("a", resumes=True), write("b", "a", fails=True), write("c")]
  (tmp_path / "stop").touch()
  with pytest.raises(FailedError, match="1 of 3 jobs failed: b;"):
    run(jobs, tmp_path, 1, write=write_page)
  assert pages == [["a", "b", "c"]]
  jobs[0] = dataclasses.replace(jobs[0], content="another configuration")
  with pytest.raises(InputError, match="Move them away"):
    run(jobs, tmp_path, 1, write=write_page)
  assert len(pages) == 1


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
  words = ("timeit", "-n1", "-r1", look)
  run([Job(name, (*words, f"'{name}'"), tmp_path / name) for name in "ab"], tmp_path, 1)
  assert len([path for path in tmp_path.iterdir() if len(path.name) == 8]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_jobs_save(number, tmp_path):
  code = RUNNER + "console.run_command(main, arguments=1)"
  words = [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r})\n{code}", str(tmp_path)]
  process = subprocess.Popen(words, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
  await_file(tmp_path / "begun", process)
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 128 + number
  assert "stopped; resume with" in errors
  assert (tmp_path / "saved").exists()
  record = json.loads((tmp_path / "jobs.json").read_text())
  assert not record["first"]["done"]
  assert record["first"]["seconds"] > 0
