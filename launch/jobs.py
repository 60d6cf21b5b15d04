"""Commands that need one another, run by a few workers and resumed where they were stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from launch.engine import console
from vavae_jax.errors import InputError
from vavae_jax.files import write_json

PATIENCE = 120.0  # seconds for a command that was told to stop to save what it has
_PAUSE = 0.2
# Huge pages: on CPUs a fifth of a small training's time went into faulting in small ones.
TUNABLES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclasses.dataclass(frozen=True)
class Job:
  """One command.

  Attributes:
    name: of it, with slashes; what it writes lies in folders of that name.
    words: `("launch.train", "--workdir=...")`, for `python -m`.
    needs: names of the jobs that must have ended before.
    weight: expected minutes, for the time that is left until jobs of its kind have been timed. The
      kind is the name's first part.
  """

  name: str
  words: tuple[str, ...]
  needs: tuple[str, ...] = ()
  weight: float = 1.0

  @property
  def kind(self) -> str:
    """What it is, among the others."""
    return self.name.partition("/")[0]


class Record:
  """Which jobs have ended, by which command, after how many seconds, over all runs of a folder."""

  def __init__(self, folder: Path):
    self._path = folder / "jobs.json"
    self._told = json.loads(self._path.read_text()) if self._path.is_file() else {}

  def is_done(self, job: Job) -> bool:
    """Whether a job has ended as it stands now."""
    told = self._told.get(job.name, {})
    return bool(told.get("done")) and told["words"] == list(job.words)

  def names(self) -> list[str]:
    """Of the jobs that ran."""
    return list(self._told)

  def seconds(self, name: str) -> float:
    """What a job took so far."""
    return float(self._told.get(name, {}).get("seconds", 0.0))

  def add(self, job: Job, seconds: float, *, done: bool) -> None:
    """Notes that a job ran so long, and whether it came to its end."""
    before = self.seconds(job.name)
    told = {"words": list(job.words), "seconds": round(before + seconds, 1), "done": done}
    self._told[job.name] = told
    write_json(self._path, self._told)


def run(jobs: Sequence[Job], folder: Path, workers: int, cores: Sequence[int] = ()) -> None:
  """Runs what has not ended yet, in the order given, as soon as what it needs has ended.

  Args:
    jobs: all of them; each must resume if started again.
    folder: of `jobs.json` and of the logs, `logs/NAME.log`.
    workers: how many run at once.
    cores: of the processor, one for each worker to stay on; none: wherever the system likes.

  Raises:
    InputError: some failed; all that does not need them was run.
  """
  record = Record(folder)
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
            running[job.name] = _Running(job, folder, core, cores[core : core + 1], compiled)
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

  def __init__(self, job: Job, folder: Path, worker: int, cores: Collection[int], compiled: str):
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
