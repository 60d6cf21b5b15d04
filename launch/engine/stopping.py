"""SIGTERM and SIGINT end a training after the step under way, in all its processes after the same.

A signal to one process is enough. It asks by the key-value store of JAX's distributed runtime;
each process answers with the first step after which it can still stop, and goes no further until
all have answered. They stop after the latest of these, which is one step ahead at most. JAX's own
preemption service works likewise, but looks for news once a second.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed  # the store has no public name

from launch.engine import console, watchdog

# Each answer takes a message to the coordinator.
ANSWERED_WITHIN_MS = 60_000
_LISTENED_MS = 1_000
_LAST_BATCH = 8.0  # seconds in which the data of the agreed step may yet come
_rounds = itertools.count()


class Signals:
  """`with Signals(60.0, "the data") as signals: ... if number := signals.stop_after(step): ...`.

  A second signal ends the process at once. Waits of more than `report_after` seconds for the data
  are reported with their `source`.
  """

  def __init__(self, report_after: float, source: str):
    self._report_after, self._source, self._reported = report_after, source, 0.0

  def __enter__(self) -> Signals:
    self.received, self._at_once = 0, False  # the number of the signal; 0: none
    self._since = 0.0
    self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, *console.endings())}
    self._together = _Together() if jax.process_count() > 1 else None
    return self

  def _note(self, number: int, _frame: Any) -> None:
    if self.received or self._at_once:
      raise console.Interrupted(number)
    self.received, self._since = number, time.monotonic()
    console.say("stopping after this step, saving a checkpoint (again to stop at once)")

  @contextlib.contextmanager
  def at_once(self) -> Iterator[None]:
    """A signal ends the work inside at once, since it can be repeated; not with several processes,
    which would wait for each other.
    """
    if self.received and not self._together:
      raise console.Interrupted(self.received)
    self._at_once = self._together is None
    try:
      yield
    finally:
      self._at_once = False

  def waiting(self, seconds: float) -> None:
    """Called while a step has waited for data so long: reports it; a signal ends the wait.

    Of several processes it does so after some seconds, in all that wait, since others may have
    begun the step.
    """
    if self._together and self._together.asked(bool(self.received)) and not self.received:
      self.received, self._since = signal.SIGTERM, time.monotonic()
    if self.received and (not self._together or time.monotonic() - self._since > _LAST_BATCH):
      raise console.Interrupted(self.received)
    if seconds < self._reported:  # of an earlier wait
      self._reported = 0.0
    if seconds > max(self._report_after, 2 * self._reported):
      self._reported = seconds
      console.say(f"waiting for {self._source} since {seconds:.0f} s")

  def stop_after(self, step: int, last: bool) -> int:
    """The signal that ends the loop after this step, in all processes; else 0.

    All processes ask after every step; the last one ends the loop in any case.
    """
    watchdog.unsaved.set()
    if last:
      return 0
    if not self._together:
      return self.received
    if self._together.agreed(step, bool(self.received)):
      return self.received or signal.SIGTERM
    return 0

  def __exit__(self, *_: object) -> None:
    watchdog.unsaved.clear()
    if self._together:
      self._together.close()
    for number, handler in self._before.items():
      signal.signal(number, handler)


class _Together:
  """The agreement of several processes on the step after which they stop."""

  def __init__(self) -> None:
    self._store: Any = distributed.global_state.client
    self._name = f"stopping/{next(_rounds)}"
    self._lock = threading.Lock()
    self._passed = 0  # the last step after which this process went on
    self._asked = self._answered = False
    self._closed = threading.Event()
    self._listener = threading.Thread(target=self._listen, name="stopping", daemon=True)
    self._listener.start()

  def _listen(self) -> None:
    """Answers when a process asks."""
    while not self._closed.is_set():
      try:
        self._store.blocking_key_value_get(f"{self._name}/asked", _LISTENED_MS)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          return  # the job is ending, which its processes notice by themselves
        continue
      with self._lock:
        answer = f"{self._name}/{jax.process_index()}"
        self._store.key_value_set(answer, str(self._passed + 1))
        self._answered = True
      return

  def asked(self, wanted: bool) -> bool:
    """Whether a process wants to stop; `wanted`: this one does, since it received a signal."""
    if wanted and not self._asked:
      self._asked = True
      self._store.key_value_set(f"{self._name}/asked", "", allow_overwrite=True)
    return self._asked or self._answered

  def agreed(self, step: int, wanted: bool) -> bool:
    """Whether all stop after this step; `wanted` as above."""
    self.asked(wanted)
    with self._lock:
      if not (self._asked or self._answered):
        self._passed = step
        return False
    answers = [
      int(self._store.blocking_key_value_get(f"{self._name}/{process}", ANSWERED_WITHIN_MS))
      for process in range(jax.process_count())
    ]
    return step >= max(answers)

  def close(self) -> None:
    """Ends the listening thread."""
    self._closed.set()
    self._listener.join()
