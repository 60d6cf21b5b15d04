"""A signal ends a process in time, even where Python's handlers cannot run.

They run between two instructions of the main thread; a compilation or a long sampling is one. So a
thread waits for signals too. Where the main one does not end the process, this one does, and saves
before what is unsaved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator

Save = Callable[[], None]
PATIENCE_SECONDS = 7.0
_CHECKED_SECONDS = 0.2
heard = threading.Event()  # a signal came, which the main thread may not know yet


class _Unsaved:
  """The steps of a training that no checkpoint has."""

  def __init__(self) -> None:
    self.there = False
    self._save: Save | None = None
    self._lock = threading.Lock()

  @contextlib.contextmanager
  def saved_by(self, save: Save | None) -> Iterator[None]:
    """Inside, they can be saved by another thread, for the main one computes something else."""
    # Of a training within an evaluation of another: that one's steps come first.
    before, self._save = self._save, self._save or save
    try:
      yield
    finally:
      with self._lock:  # for ever where they are being saved: the process ends then
        self._save = before

  def take(self) -> Save | None:
    """The save to make, which the main thread no longer makes; None where only that one can."""
    self._lock.acquire()
    if self._save is None:
      self._lock.release()
    return self._save


unsaved = _Unsaved()


@contextlib.contextmanager
def watching(signals: Collection[int], end: Callable[[int, Save | None], None]) -> Iterator[None]:
  """Calls `end(signal, save)` in a thread, `PATIENCE_SECONDS` after a signal that came inside the
  block, if the block has not ended by then; `save` first saves what is `unsaved`. The main thread
  has longer where it alone can save.
  """
  receiver, sender = os.pipe()
  os.set_blocking(sender, False)
  left = threading.Event()
  heard.clear()

  def watch() -> None:
    while number := int.from_bytes(os.read(receiver, 1), "big"):
      if number in signals:
        break
    if not number:
      return
    heard.set()
    if left.wait(PATIENCE_SECONDS):
      return
    save = None
    while unsaved.there and not (save := unsaved.take()):
      if left.wait(_CHECKED_SECONDS):
        return
    end(number, save)

  thread = threading.Thread(target=watch, name="watchdog", daemon=True)
  before = signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
  thread.start()
  try:
    yield
  finally:
    left.set()
    signal.set_wakeup_fd(before)
    os.write(sender, b"\0")
    thread.join()
    os.close(sender)
    os.close(receiver)
