"""Commands that need one another, run by a few workers and resumed where they were stopped.

A job is done where it ended, its output is there, and neither its command, nor what the command
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from launch.engine import console
from launch.engine.circumstances import commit, processor
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json

PATIENCE = 120.0  # seconds for a command that was told to stop to save what it has
_PAUSE = 0.2
# Huge pages: on CPUs a fifth of a small training's time went into faulting in small ones.
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Job:
  """One command.

  Attributes:
    name: of it, with slashes.
    words: `("launch.train", "--workdir=...")`, for `python -m`.
    output: what is there when it has ended.
    resumes: whether it goes on with an output that is there, which must then be its own; others
      write theirs anew.
    content: what else decides what it does, such as its configuration.
    needs: names of the jobs that must have ended before.
    weight: expected minutes, for the time that is left until jobs of its kind have been timed. The
      kind is the name's first part.
  """

  name: str
  words: tuple[str, ...]
  output: Path
  resumes: bool = False
  content: str = ""
  needs: tuple[str, ...] = ()
  weight: float = 1.0

  @property
  def kind(self) -> str:
    """What it is, among the others."""
    return self.name.partition("/")[0]


def digests(jobs: Sequence[Job], folder: Path) -> dict[str, str]:
  """What identifies each job with all that it needs, wherever the folder lies.

  Args:
    jobs: all of them, each after what it needs.
    folder: of all outputs.

  Returns:
    By the jobs' names.

  Raises:
    ValueError: a name twice, or a need that no job before it meets.
  """
  found: dict[str, str] = {}
  for job in jobs:
    if job.name in found or not {*job.needs} <= {*found}:
      raise ValueError(f"{job.name} is there twice, or before one of {', '.join(job.needs)}.")
    # A configuration's file may lie elsewhere too; what it says is the job's content.
    words = [w.replace(str(folder), ".") for w in job.words if not w.startswith("--config=")]
    told = json.dumps([words, job.content, [found[name] for name in job.needs]])
    found[job.name] = hashlib.sha256(told.encode()).hexdigest()[:16]
  return found


class Record:
  """What became of the jobs of a folder, over all runs.

  Args:
    folder: of `jobs.json` and of all outputs.
    jobs: as they stand now.
  """

  def __init__(self, folder: Path, jobs: Sequence[Job]):
    self._path = folder / "jobs.json"
    self._told = json.loads(self._path.read_text()) if self._path.is_file() else {}
    self._digests = digests(jobs, folder)

  def is_done(self, job: Job) -> bool:
    """Whether a job has ended as it stands now."""
    told = self._told.get(job.name, {})
    same = told.get("digest") == self._digests[job.name]
    return same and told["done"] and job.output.exists()

  def is_foreign(self, job: Job) -> bool:
    """Whether a job would go on with the output of another one."""
    told = self._told.get(job.name, {})
    same = told.get("digest") == self._digests[job.name]
    return job.resumes and not same and job.output.exists()

  def seconds(self, name: str) -> float:
    """What a job took so far."""
    return float(self._told.get(name, {}).get("seconds", 0.0))

  def where(self, name: str) -> tuple[str, str]:
    """The commit and the machine that a job last ran with."""
    told = self._told.get(name, {})
    return told.get("commit", ""), told.get("machine", "")

  def begin(self, job: Job) -> None:
    """Notes that a job is being run."""
    self._note(job, self.seconds(job.name), done=False)

  def add(self, job: Job, seconds: float, *, done: bool) -> None:
    """Notes that a job ran so long, and whether it came to its end."""
    self._note(job, self.seconds(job.name) + seconds, done=done)

  def _note(self, job: Job, seconds: float, *, done: bool) -> None:
    self._told[job.name] = {
      "digest": self._digests[job.name],
      "seconds": round(seconds, 3),
      "done": done,
      "commit": commit(),
      "machine": processor(),
    }
    write_json(self._path, self._told)


def run(jobs: Sequence[Job], folder: Path, workers: int, cores: Sequence[int] = ()) -> None:
  """Runs what has not ended yet, in the order given, as soon as what it needs has ended.

  Args:
    jobs: all of them, each after what it needs.
    folder: of `jobs.json`, of the logs, `logs/NAME.log`, and of all outputs.
    workers: how many run at once, 1 or more.
    cores: of the processor, one for each worker to stay on; none: wherever the system likes.

  Raises:
    InputError: some failed, and all that does not need them was run; or before anything is run,
      another process is at work in the folder, or there are outputs of jobs as they were before.
  """
  with _alone(folder) as lock:
    _run(jobs, folder, workers, cores, lock)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[int]:
  """Keeps others out of a folder while this process, or a command that it began, is at work."""
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / "jobs.lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise InputError(
        f"Others are at work in {folder}: this command, or a job that it left when it was killed. "
        "Wait for them, or stop them."
      ) from error
    yield lock.fileno()


def _run(jobs: Sequence[Job], folder: Path, workers: int, cores: Sequence[int], lock: int) -> None:
  record = Record(folder, jobs)
  if foreign := [job for job in jobs if record.is_foreign(job)]:
    raise InputError(
      f"{len(foreign)} outputs are there that are not of these jobs as they stand now, such as "
      f"{', '.join(str(job.output) for job in foreign[:5])}: a configuration, a command or what "
      "they need has changed. Move them away to make them anew, or give another folder."
    )
  waiting = [job for job in jobs if not record.is_done(job)]
  kept = len(jobs) - len(waiting)
  if kept:
    console.say(f"{kept} of {len(jobs)} jobs are done already")
  minutes = _expectation(jobs, record)
  total = _sum(jobs, minutes)
  running: dict[str, _Running] = {}
  failed: list[str] = []
  free = list(range(workers))
  with tempfile.TemporaryDirectory(prefix="programs-") as compiled:
    try:
      done = round(total - _sum(waiting, minutes))
      with console.Bar("minutes of work", round(total), done) as bar:
        while waiting or running:
          for job in _ready(waiting, running, failed, len(free)):
            waiting.remove(job)
            core = free.pop(0)
            record.begin(job)
            running[job.name] = _Running(job, folder, core, cores[core : core + 1], compiled, lock)
          if not running:
            break  # what is left needs what failed
          time.sleep(_PAUSE)
          for name, each in list(running.items()):
            code = each.process.poll()
            if code is None:
              continue
            del running[name]
            free.append(each.worker)
            record.add(each.job, each.seconds, done=code == 0)
            minutes = _expectation(jobs, record)
            if code:
              failed.append(name)
              console.say(f"{name} failed with exit code {code}: {each.log}")
            else:
              console.say(f"{name}: {console.clock(record.seconds(name))}")
            left = _sum([*waiting, *(x.job for x in running.values())], minutes)
            share = 1 - left / _sum(jobs, minutes)  # of what is expected by now
            bar.update(round(total * share), jobs=len(jobs) - len(waiting) - len(running))
    finally:
      _stop(running, record)
  if failed:
    raise InputError(
      f"{len(failed)} of {len(jobs)} jobs failed: {', '.join(failed)}; {len(waiting)} that need "
      f"them were not begun. Their last words are in {folder / 'logs'}. The same command goes on."
    )


class _Running:
  """A job's process."""

  def __init__(
    self,
    job: Job,
    folder: Path,
    worker: int,
    cores: Collection[int],
    compiled: str,
    lock: int,
  ):
    self.job, self.worker = job, worker
    self.log = folder / "logs" / f"{job.name}.log"
    self.log.parent.mkdir(parents=True, exist_ok=True)
    self._began = time.monotonic()
    with self.log.open("ab") as log:
      # In a session of its own: Ctrl-C is told by us, once.
      self.process = subprocess.Popen(
        [sys.executable, "-m", *job.words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lock,),
        # What one has compiled the others need not; not kept, for the next machine may be another.
        env={"JAX_COMPILATION_CACHE_DIR": compiled, **TUNABLES, **os.environ},
      )
    if cores:
      os.sched_setaffinity(self.process.pid, cores)

  @property
  def seconds(self) -> float:
    """Since it began."""
    return time.monotonic() - self._began


def _ready(
  waiting: Sequence[Job], running: Mapping[str, _Running], failed: Collection[str], count: int
) -> list[Job]:
  """The first jobs that can begin now."""
  not_ended = {*(job.name for job in waiting), *running, *failed}
  return [job for job in waiting if not not_ended & set(job.needs)][:count]


def _expectation(jobs: Sequence[Job], record: Record) -> Callable[[Job], float]:
  """Minutes that a job takes: what it took, or what jobs of its kind did, or its weight."""
  known: dict[str, list[float]] = {}
  for job in jobs:
    if record.is_done(job):
      known.setdefault(job.kind, []).append(record.seconds(job.name) / 60 / job.weight)

  def minutes(job: Job) -> float:
    ratios = known.get(job.kind, [1.0])
    return job.weight * sum(ratios) / len(ratios)

  return minutes


def _sum(jobs: Sequence[Job], minutes: Callable[[Job], float]) -> float:
  return sum(minutes(job) for job in jobs)


def _stop(running: Mapping[str, _Running], record: Record) -> None:
  """Tells what still runs to save and end, and waits for it."""
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
    record.add(each.job, each.seconds, done=each.process.returncode == 0)
