"""Output that cannot end a work: its reader may go, its disk may fill."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any, TextIO


class BestEffort:
  """A stream whose reader may go, whose disk may fill and whose encoding may lack a character.

  Progress is no reason to end a work: metrics.jsonl and the other files have it too.
  """

  def __init__(self, stream: TextIO):
    self._stream = stream

  def write(self, text: str) -> int:
    """Writes what can be written."""
    with contextlib.suppress(OSError):
      encoding = self._stream.encoding or "utf-8"
      self._stream.write(text.encode(encoding, "replace").decode(encoding))
    return len(text)

  def flush(self) -> None:
    """Flushes what can be; what waits for a reader that has gone is dropped."""
    try:
      self._stream.flush()
    except BrokenPipeError:
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, self._stream.fileno())  # else Python reports it once more at its end
      os.close(nowhere)
    except OSError:
      return

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def keep_harmless() -> None:
  """Makes the output of this process of that kind, and leaves out what says nothing."""
  sys.unraisablehook = _unless_late
  for descriptor in range(3):
    try:
      os.fstat(descriptor)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # else a file gets the number, and what C++ prints
  for name in ("stdout", "stderr"):
    stream = getattr(sys, name)
    if stream is not None and not isinstance(stream, BestEffort):
      setattr(sys, name, BestEffort(stream))


def _unless_late(told: Any) -> None:
  """Prints an error that nobody can catch, unless it is of one more array of a save that failed.

  TensorStore's threads tell Orbax of each, when its loop has ended with the first.
  """
  if (told.exc_type, str(told.exc_value)) != (RuntimeError, "Event loop is closed"):
    sys.__unraisablehook__(told)
