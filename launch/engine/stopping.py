"""A signal ends a training before its next step or piece of an evaluation, in all processes alike.

A signal to one process is enough. It asks by the key-value store of JAX's distributed runtime; each
process answers with what it has begun, and begins nothing more until all have answered. They stop
after the latest of these, which is two steps ahead at most: metrics are read a step late. A process
whose data do not come takes its last batch again for the steps that others have begun. JAX's own
preemption service works likewise, but looks for news once a second.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed  # the store has no public name

from launch.engine import console, watchdog

# Each answer takes a message to the coordinator.
ANSWERED_WITHIN_MS = 60_000
_LISTENED_MS = 1_000
_LAST_BATCH = 3.0  # seconds in which the data of a step that others have begun may yet come
_rounds = itertools.count()
# A step, which of the evaluations after it, and how many pieces of that are done.
Place = tuple[int, ...]


class Signals:
  """`with Signals(60.0, "the data") as signals: ... signals.go_on(step)`.

  A second signal ends the process at once. Waits of more than `report_after` seconds for the data
  are reported with their `source`.
  """

  def __init__(self, report_after: float, source: str):
    self._report_after, self._source, self._reported = report_after, source, 0.0

  def __enter__(self) -> Signals:
    self.received, self._at_once = 0, False  # the number of the signal; 0: none
    self._outer_unsaved = watchdog.unsaved.there  # of a training in whose evaluation this one is
    self._begun: Place | None = None
    self._asked_since = 0.0
    self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, *console.endings())}
    self._together = None
    if (count := jax.process_count()) > 1:
      store = distributed.global_state.client
      self._together = Together(store, f"stopping/{next(_rounds)}", jax.process_index(), count)
    return self

  def _note(self, number: int, _frame: Any) -> None:
    first, self.received = not self.received, self.received or number
    if self._at_once or not first:
      raise self._interrupted(together=first)
    console.say("stopping after this step, saving a checkpoint (again to stop at once)")

  def _interrupted(self, together: bool) -> console.Interrupted:
    return console.Interrupted(self.received or signal.SIGTERM, together)

  @contextlib.contextmanager
  def at_once(self, save: Callable[[], None] | None = None) -> Iterator[None]:
    """A signal ends the work inside at once, since it can be repeated; not with several processes,
    which would wait for each other.

    `save` saves what was done before it, for the watchdog.
    """
    if self._together:
      yield
      return
    if self.received:
      raise self._interrupted(together=True)
    self._at_once = True
    try:
      with watchdog.unsaved.saved_by(save):
        yield
    finally:
      self._at_once = False

  def waiting(self, seconds: float) -> bool:
    """Called while a step has waited for data so long: reports it; a signal ends the wait.

    True where other processes have begun the step and the data still do not come: it takes the
    batch before again.
    """
    self._report(seconds)
    if self._together is None:
      if self.received:
        raise self._interrupted(together=True)
      return False
    if not self._together.asked(bool(self.received)):
      return False
    self._asked_since = self._asked_since or time.monotonic()
    if self._begun and self._together.last <= self._begun:
      raise self._interrupted(together=True)
    if time.monotonic() - self._asked_since < _LAST_BATCH:
      return False
    if not self._begun:  # this training began here, and others wait in vain
      raise self._interrupted(together=False)
    step = self._begun[0] + 1
    console.say_here(f"no data for step {step}, which others began: its last batch serves again")
    return True

  def _report(self, seconds: float) -> None:
    if seconds < self._reported:  # of an earlier wait
      self._reported = 0.0
    if seconds > max(self._report_after, 2 * self._reported):
      self._reported = seconds
      console.say_here(f"waiting for {self._source} since {seconds:.0f} s")

  def go_on(self, step: int, evaluation: int = 0, pieces: int = 0) -> None:
    """Called before a step, or one of the evaluations after it of which so many pieces are done;
    raises Interrupted where all processes stop before it.
    """
    place = step, evaluation, pieces
    if self._together:
      stops = self._together.stops_before(place, bool(self.received))
    else:
      stops = bool(self.received)
    if stops:
      raise self._interrupted(together=True)
    self._begun = place

  def done(self) -> None:
    """Called after a step: it is unsaved now."""
    watchdog.unsaved.there = True

  def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
    watchdog.unsaved.there = self._outer_unsaved
    if self._together:
      self._together.close()
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self.received and not error:  # it came after the last place where the loop could stop
      raise self._interrupted(together=True)


class Together:
  """The agreement of several processes on the place after which they stop."""

  def __init__(self, store: Any, name: str, process: int, count: int):
    """`store` is JAX's, `name` this agreement's in it."""
    self._store, self._name, self._process, self._count = store, name, process, count
    self._lock = threading.Lock()
    self._begun: Place = (0, 0)
    self._asked = self._answered = False
    self._closed = threading.Event()
    self._listener = threading.Thread(target=self._listen, name="stopping", daemon=True)
    self._listener.start()

  def _listen(self) -> None:
    """Answers when a process asks; asks where this one has a signal and computes."""
    while not self._closed.is_set():
      if watchdog.heard.is_set():
        self._ask()
      try:
        self._store.blocking_key_value_get(f"{self._name}/asked", _LISTENED_MS)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          return  # the job is ending, which its processes notice by themselves
        continue
      break
    with self._lock:  # also when closed, since others may ask later
      answer = " ".join(map(str, self._begun))
      self._store.key_value_set(f"{self._name}/{self._process}", answer)
      self._answered = True

  def _ask(self) -> None:
    self._asked = True
    self._store.key_value_set(f"{self._name}/asked", "", allow_overwrite=True)

  def asked(self, wanted: bool) -> bool:
    """Whether a process wants to stop; `wanted`: this one does, since it received a signal."""
    if wanted and not self._asked:
      self._ask()
    return self._asked or self._answered

  @functools.cached_property
  def last(self) -> Place:
    """The place after which all stop, once one has asked."""
    answers = [
      self._store.blocking_key_value_get(f"{self._name}/{process}", ANSWERED_WITHIN_MS)
      for process in range(self._count)
    ]
    return max(tuple(map(int, answer.split())) for answer in answers)

  def stops_before(self, place: Place, wanted: bool) -> bool:
    """Whether all do; else it counts as begun. `wanted` as above."""
    self.asked(wanted)
    with self._lock:
      if not (self._asked or self._answered):
        self._begun = place
        return False
    return place > self.last

  def close(self) -> None:
    """Ends the listening thread."""
    self._closed.set()
    self._listener.join()
