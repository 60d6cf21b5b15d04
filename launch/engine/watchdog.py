"""A signal ends a process in time, even where Python's handlers cannot run.

They run between two instructions of the main thread; a compilation or a long sampling is one. So a
thread waits for signals too, and ends the process where the main one does not and has nothing to
save.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Collection, Iterator

PATIENCE_SECONDS = 8.0
_CHECKED_SECONDS = 0.2
# Set while a training has steps that no checkpoint has, which take their time to be saved.
unsaved = threading.Event()


@contextlib.contextmanager
def watching(signals: Collection[int], last_words: Callable[[], None]) -> Iterator[None]:
  """Ends the process with 128 + signal, `PATIENCE_SECONDS` after one that came inside the block, if
  the block has not ended by then and nothing is `unsaved`; `last_words` is called before.
  """
  receiver, sender = os.pipe()
  os.set_blocking(sender, False)
  left = threading.Event()

  def watch() -> None:
    while number := int.from_bytes(os.read(receiver, 1), "big"):
      if number in signals:
        break
    if not number or left.wait(PATIENCE_SECONDS):
      return
    while unsaved.is_set():
      if left.wait(_CHECKED_SECONDS):
        return
    last_words()
    os._exit(128 + number)

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
