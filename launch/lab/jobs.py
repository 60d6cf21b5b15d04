"""Commands that need one another, run by a few workers, and resumed where they were stopped.

A job is done if it has ended, its output exists, and neither its command, nor what the command
reads, nor a job that it needs has changed since.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from launch.engine import console
from launch.engine.circumstances import commit, processor
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import read_note, write_json

PATIENCE = 120.0  # seconds that a stopped command has to save its work
_PAUSE = 0.2
# Huge pages: on CPUs a fifth of a small training's time went into faulting in small ones.
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Job:
  """One command."""

  name: str  # with slashes; the first part is the job's kind
  words: tuple[str, ...]  # ("launch.train", "--workdir=..."), for `python -m`
  output: Path  # a file or folder that exists once the command has ended
  resumes: bool = False  # whether the command continues an output, which must then be its own
  content: str = ""  # what else determines the result, such as the configuration
  needs: tuple[str, ...] = ()  # names of the jobs that must have ended before
  weight: float = 1.0  # expected minutes, until jobs of its kind have been timed

  @property
  def kind(self) -> str:
    """The first part of the name."""
    return self.name.partition("/")[0]


def backend() -> tuple[str, int]:
  """jax's backend and its number of devices."""
  # In a process of its own: one that asks keeps the accelerator's memory.
  words = [sys.executable, "-c", "import jax; print(jax.default_backend(), jax.device_count())"]
  done = subprocess.run(words, capture_output=True, text=True, check=True)
  name, count = done.stdout.split()[-2:]
  return name, int(count)


def processors(workers: int) -> tuple[int, list[int]]:
  """How many jobs to run at a time, `workers` or, for 0, as many as fit; and for `run` the cores of
  which each has one, where there are no fewer.
  """
  cores: list[int] = []
  if backend()[0] == "cpu" and hasattr(os, "sched_getaffinity"):
    cores = sorted(os.sched_getaffinity(0))
  workers = workers or len(cores) or 1
  return workers, cores if workers <= len(cores) else []


def digests(jobs: Sequence[Job], folder: Path) -> dict[str, str]:
  """By name, what identifies each job with all that it needs, wherever the folder is."""
  found: dict[str, str] = {}
  for job in jobs:
    if job.name in found or not {*job.needs} <= {*found}:
      raise ValueError(f"{job.name} occurs twice, or before one of {', '.join(job.needs)}.")
    # A configuration's file may move too; its content is the job's.
    words = [w.replace(str(folder), ".") for w in job.words if not w.startswith("--config=")]
    identity = json.dumps([words, job.content, [found[name] for name in job.needs]])
    found[job.name] = hashlib.sha256(identity.encode()).hexdigest()[:16]
  return found


class Record:
  """The state of the jobs of a folder, over all runs, in its `jobs.json`."""

  def __init__(self, folder: Path, jobs: Sequence[Job]):
    self._path = folder / "jobs.json"
    self._entries = read_note(self._path) if self._path.is_file() else {}
    self._digests = digests(jobs, folder)

  def is_done(self, job: Job) -> bool:
    """Whether a job has ended, as it is defined now."""
    return self._is_same(job) and self._entries[job.name]["done"] and job.output.exists()

  def is_foreign(self, job: Job) -> bool:
    """Whether a job would continue the output of another one."""
    return job.resumes and not self._is_same(job) and job.output.exists()

  def _is_same(self, job: Job) -> bool:
    return self._entries.get(job.name, {}).get("digest") == self._digests[job.name]

  def seconds(self, job: Job) -> float:
    """The time that a job has taken so far, as it is defined now."""
    return float(self._entries[job.name]["seconds"]) if self._is_same(job) else 0.0

  def made(self, jobs: Sequence[Job]) -> str:
    """By which commits, versions of jax and machines those that are done were run, for people."""
    done = [job for job in jobs if self.is_done(job)]
    entries = [self._entries[job.name] for job in done]
    notes = [job.output for job in done if job.output.suffix == ".json"]
    runs = [read_note(note).get("run", {}) for note in notes]
    on_devices = [run for run in runs if "cpu" not in run.get("device", "cpu")]
    told = []
    for name, key, found in (
      *(("commits ", "commit", entries), ("jax ", "jax", runs)),
      *(("", "machine", entries), ("", "device", on_devices)),
    ):
      if values := sorted({x.get(key, "") for x in found} - {""}):
        told.append(name + ", ".join(values))
    return "; ".join(told) or "no job so far"

  def add(self, job: Job, seconds: float, *, done: bool) -> None:
    """Records that a job ran for some more seconds, and whether it is done."""
    self._entries[job.name] = {
      "digest": self._digests[job.name],
      "seconds": round(self.seconds(job) + seconds, 3),
      "done": done,
      "commit": commit(),
      "machine": processor(),
    }
    write_json(self._path, self._entries)


class FailedError(InputError):
  """Some jobs failed, and all that do not need them have run."""


def run(
  jobs: Sequence[Job],
  folder: Path,
  workers: int,
  cores: Sequence[int] = (),
  write: Callable[[], None] = lambda: None,
) -> None:
  """Runs the jobs that are not done, in their order, each as soon as those that it needs are done.

  `folder` has `jobs.json`, the logs (`logs/NAME.log`) and all outputs. Of `cores` of the processor
  each worker has one; without them the system chooses. `write` writes a page once the jobs have
  ended; where something stops them, of those that had, if any did since.

  Raises:
    FailedError: see there.
    InputError: before any job runs: another process is using the folder, or outputs exist of jobs
      that have changed.
  """
  with _alone(folder) as lock:
    _run(jobs, folder, workers, cores, lock, write)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
  """Locks a folder for this process and the commands that it starts."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "jobs.lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"Another process is using {folder}: this command, or a job that it left when it was "
        "killed. Wait for it, or stop it."
      ) from error
    yield lock.fileno()


def _run(
  jobs: Sequence[Job],
  folder: Path,
  workers: int,
  cores: Sequence[int],
  lock: int,
  write: Callable[[], None],
) -> None:
  record = Record(folder, jobs)
  if foreign := [job for job in jobs if record.is_foreign(job)]:
    raise InputError(
      f"{len(foreign)} outputs were made by other jobs than these, such as "
      f"{', '.join(str(job.output) for job in foreign[:5])}: a configuration, a command or what "
      "they need has changed. Move them away to run the jobs again, or give another folder."
    )
  waiting = [job for job in jobs if not record.is_done(job)]
  if kept := len(jobs) - len(waiting):
    console.say(f"{kept} of {len(jobs)} jobs are done already")
  total = _minutes(jobs, jobs, record)
  running: dict[str, _Running] = {}
  failed: list[str] = []
  ended = 0
  free = list(range(workers))
  with tempfile.TemporaryDirectory(prefix="programs-") as compiled:
    try:
      done = round(total - _minutes(waiting, jobs, record))
      with console.Bar("minutes of work", round(total), done) as bar:
        while waiting or running:
          for job in _ready(waiting, {*running, *failed}, len(free)):
            waiting.remove(job)
            worker = free.pop(0)
            record.add(job, 0.0, done=False)
            own = cores[worker : worker + 1]
            running[job.name] = _Running(job, folder, worker, own, compiled, lock)
          if not running:
            break  # all that wait need one that failed
          time.sleep(_PAUSE)
          for name in [x for x, each in running.items() if each.process.poll() is not None]:
            each = running.pop(name)
            free.append(each.worker)
            ended += 1
            if not each.end(record):
              failed.append(name)
            left = [*waiting, *(x.job for x in running.values())]
            share = 1 - _minutes(left, jobs, record) / _minutes(jobs, jobs, record)
            bar.update(round(total * share), jobs=len(jobs) - len(left))
    except BaseException:
      _stop(running, record)
      if ended:
        with contextlib.suppress(OSError):  # the error that stopped the jobs is the one to report
          write()
      raise
  write()
  if failed:
    raise FailedError(
      f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}; {len(waiting)} that need "
      f"them did not begin. See the ends of their logs in {folder / 'logs'}. The same command "
      "continues."
    )


class _Running:
  """A job's process."""

  def __init__(
    self, job: Job, folder: Path, worker: int, cores: Collection[int], compiled: str, lock: int
  ):
    self.job, self.worker = job, worker
    self._log = folder / "logs" / f"{job.name}.log"
    self._log.parent.mkdir(parents=True, exist_ok=True)
    self._began = time.monotonic()
    with self._log.open("ab") as log:
      # In a session of its own, so that Ctrl-C reaches it once, from this process.
      self.process = subprocess.Popen(
        [sys.executable, "-m", *job.words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lock,),
        # The jobs share what they compile; it is not kept, since the next machine may be another.
        env={"JAX_COMPILATION_CACHE_DIR": compiled, **TUNABLES, **os.environ},
      )
    if cores:
      os.sched_setaffinity(self.process.pid, cores)

  def end(self, record: Record, *, quiet: bool = False) -> bool:
    """Records a process that has ended; returns whether its job is done."""
    code = self.process.returncode
    record.add(self.job, time.monotonic() - self._began, done=code == 0)
    name = self.job.name
    if code and not quiet:
      console.say(f"{name} failed with exit code {code}: {self._log}")
    elif not quiet:
      console.say(f"{name}: {console.clock(record.seconds(self.job))}")
    return code == 0


def _ready(waiting: Sequence[Job], not_done: Collection[str], count: int) -> list[Job]:
  """The first jobs that can begin now."""
  missing = {*not_done, *(job.name for job in waiting)}
  return [job for job in waiting if not missing & {*job.needs}][:count]


def _minutes(some: Iterable[Job], jobs: Sequence[Job], record: Record) -> float:
  """Expected minutes of some of the jobs: their weights, at the pace of those of their kind."""
  paces: dict[str, list[float]] = {}
  for job in jobs:
    if record.is_done(job):
      paces.setdefault(job.kind, []).append(record.seconds(job) / 60 / job.weight)
  return sum(job.weight * statistics.mean(paces.get(job.kind, [1.0])) for job in some)


def _stop(running: Mapping[str, _Running], record: Record) -> None:
  """Lets running jobs save and end, and waits for them."""
  for each in running.values():
    if each.process.poll() is None:
      each.process.send_signal(signal.SIGTERM)
  deadline = time.monotonic() + PATIENCE
  for each in running.values():
    try:
      each.process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
      os.killpg(each.process.pid, signal.SIGKILL)
      each.process.wait()
    each.end(record, quiet=True)
