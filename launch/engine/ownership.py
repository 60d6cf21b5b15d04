"""One owner of an output at a time: a second start says who is at work, and touches nothing.

A hidden file in the output's folder, or beside a file, names the owner's host, process and when it
began. On the same host the system knows whether that process lives, so that one that was killed is
followed at once. On another host, where the output is on a shared disk or in a bucket, it counts as
long as it beats: each beat changes the file. An owner whose output was deleted or taken ends.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.engine import console, processes
from vavae_jax.common.errors import InputError, printable
from vavae_jax.common.files import hidden, is_url, place

BEAT_SECONDS = 5.0
# An owner on another host that does not beat for so long is dead.
SILENT_SECONDS = 30.0
# Two newcomers in a bucket, which has no locks, both find the later one's note after so long.
_SETTLED_SECONDS = 1.0


@contextlib.contextmanager
def owned(output: Path, *, beside: bool = False) -> Iterator[None]:
  """Nobody else that asks writes the output inside the block; of several processes the first asks.

  The process ends with one line when it is seen that the output was deleted, replaced or taken.

  Args:
    output: a folder, made if there is none.
    beside: the output is a file or several that begin with this name, and no folder; samples.npz
      and an evaluation called samples are one output, for both write samples.json.

  Raises:
    InputError: another process is at work there, or no file can be made there.
  """
  path = hidden(output.with_name(output.name.removesuffix(".npz")), "owner")
  claim: _Claim | None = None

  def make() -> None:
    nonlocal claim
    claim = _Claim(path if beside else output / ".owner")
    try:
      other = claim.make()
    except FileNotFoundError as error:  # of a system that makes none, or a folder that went away
      raise InputError(
        f"{output} cannot be written ({error.strerror}: {error.filename}); give another one."
      ) from error
    if other is not None:
      raise InputError(
        f"{output} is being written by {_described(other)}. Wait for its end or stop it, or give "
        "another folder or name."
      )

  processes.first_does(make)
  failed: OSError | None = None
  try:
    yield
    processes.wait_for_all()  # the first may still write
  except OSError as raised:
    failed = raised  # perhaps only since the folder is gone
  finally:
    lost = claim.release() if claim else ""
  if lost:
    raise InputError(lost) from failed
  if failed:
    raise failed


class _Claim:
  """The file by which this process owns an output."""

  def __init__(self, path: Path):
    self._path, self._text, self._ended = path, "", threading.Event()
    self._beating = threading.Thread(target=self._beat, name="owner", daemon=True)
    self._about = {
      "host": socket.gethostname(),
      "machine": _machine(),
      "process": os.getpid(),
      "began": _began(os.getpid()),
      "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
      "command": shlex.join(sys.argv),
    }

  def make(self) -> str | None:
    """Claims the output; what the owner noted where there is another."""
    folder = self._path.parent
    self._made_folder = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if not is_url(folder) and os.path.lexists(self._path) and not _is_file(self._path):
      raise InputError(f"{self._path} is to name the owner and is no file; delete it.")
    with _locked(self._path):
      there = _read(self._path)
    if _lives(self._path, there):
      return there
    with _locked(self._path):
      if (now := _read(self._path)) != there:
        return now  # another newcomer was faster
      self._write(0)
    if is_url(self._path):
      time.sleep(_SETTLED_SECONDS)
      if (now := _read(self._path)) != self._text:
        return now
    else:
      self._folder = os.open(folder, os.O_RDONLY)  # as long as it is open no other gets its number
    self._beating.start()
    return None

  def _write(self, beat: int) -> None:
    text = json.dumps({**self._about, "beat": beat})
    self._text = text.ljust(len(text) + 20 - len(str(beat)))
    # In place and of one length: on a full disk a file that is cut could not be filled again.
    with self._path.open("w" if is_url(self._path) else "r+") as file:
      file.write(self._text)
      if not is_url(self._path):
        file.truncate()
    self._beaten = time.monotonic()

  def _beat(self) -> None:
    beat = 0
    while not self._ended.wait(BEAT_SECONDS):
      beat += 1
      try:
        if not self._lost():
          with _locked(self._path):
            self._write(beat)
          continue
        time.sleep(BEAT_SECONDS / 5)
        lost = self._lost()  # again, in case that a disk is not yet what it will be
      except OSError:  # a network that comes back, or goes for good
        continue
      if lost and _ending.acquire(blocking=False):
        print(printable(f"error: {lost}"), file=sys.stderr, flush=True)
        os._exit(2)  # nothing more is to be touched

  def _lost(self) -> str:
    """Why the output is this process's no more; "" while it is. OSError if that cannot be seen."""
    folder = self._path.parent
    gone = f"{folder} was deleted or replaced while this process wrote there; start again"
    there = _read(self._path)
    if is_url(folder):
      if not there and not any(place(str(folder)).iterdir()):
        return gone
    else:
      try:
        if not os.path.samestat(os.fstat(self._folder), folder.stat()):
          return gone
      except FileNotFoundError:
        return gone
    slept = time.monotonic() - self._beaten > SILENT_SECONDS
    if there != self._text and (_parsed(there) or (slept and not there)):
      # It slept for so long that another one took over, and perhaps has ended.
      return f"{folder} was taken over by {_described(there)}"
    return ""

  def release(self) -> str:
    """Lets others own the output; why it was this process's no more, or ""."""
    self._ended.set()
    self._beating.join()
    lost = ""
    with contextlib.suppress(OSError):
      if not (lost := self._lost()):
        with _locked(self._path):
          self._path.unlink()
        if self._made_folder and not is_url(self._path):
          self._path.parent.rmdir()  # where nothing was written, as after a mistake in the settings
    if not is_url(self._path):
      os.close(self._folder)
    return lost


_ending = threading.Lock()  # held by the one that ends the process


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Nobody else on disks that have locks reads or writes the file inside the block."""
  if is_url(path):
    yield
    return
  while True:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor) as file:
      with contextlib.suppress(OSError):  # a file system without locks: whoever writes last owns
        fcntl.flock(file, fcntl.LOCK_EX)
      if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
        yield
        return


def _is_file(path: Path) -> bool:
  """Whether it is a file and neither a link to one nor a pipe, which would be waited for."""
  return stat.S_ISREG(path.lstat().st_mode)


def _read(path: Path) -> str:
  try:
    return path.read_bytes().decode(errors="replace")
  except FileNotFoundError:
    return ""


def _lives(path: Path, text: str) -> bool:
  """Whether the process that wrote an owner's file is at work."""
  note = _parsed(text)
  if not text or (note and note.get("machine") == _machine()):
    began = _began(int(note["process"])) if text else ""
    return began != "" and began == note["began"]
  host = note.get("host", "an unknown host")
  console.say(f"{path} is of {host}: waiting up to {SILENT_SECONDS:g} s for a sign of its owner")
  silent_at = time.monotonic() + SILENT_SECONDS
  while time.monotonic() < silent_at:
    time.sleep(BEAT_SECONDS / 5)
    if (now := _read(path)) != text:
      return bool(now)
  return False


def _parsed(text: str) -> dict[str, Any]:
  """An owner's note; {} where it is none, damaged or of a process that cannot be."""
  try:
    note = json.loads(text)
    fits = isinstance(note["process"], int) and {"machine", "began"} <= note.keys()
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    return {}
  return note if fits else {}


def _described(text: str) -> str:
  note = _parsed(text)
  if not note:
    return "another process"
  return (
    f"`{note.get('command')}`, process {note['process']} on {note.get('host')} since "
    f"{note.get('since')}"
  )


def _machine() -> str:
  """Whose process numbers these are: a host since it was started, and a container on it."""
  if sys.platform != "linux":
    return socket.gethostname()
  boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
  return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def _began(process: int) -> str:
  """When a process of this machine began, as the system counts; "" where it has ended."""
  if sys.platform != "linux":
    with contextlib.suppress(ProcessLookupError):
      os.kill(process, 0)
      return "before"
    return ""
  try:
    words = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
  except (FileNotFoundError, ProcessLookupError):
    return ""
  return "" if words[0] in "ZX" else words[19]  # Z: it ended, and its parent has not noticed
