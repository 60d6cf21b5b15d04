"""A thread puts batches onto the devices ahead of the steps that take them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from vavae_jax.common.errors import InputError

AHEAD = 2
_ASKED_EVERY_SECONDS = 0.2


class Prefetched:
  """`with Prefetched(data, put, wait) as batches: next(batches)`, which raises the thread's errors.

  The data are endless; `put` starts the transfer of a batch to the devices. While none is ready,
  `wait` is called with the seconds that the step has waited, and may raise; True from it gives the
  last batch again, which only a `repeating` one keeps.
  """

  def __init__(
    self,
    data: Iterable[Any],
    put: Callable[[Any], Any],
    wait: Callable[[float], bool],
    repeating: bool = False,
  ):
    self._data, self._put, self._wait, self._repeating = data, put, wait, repeating
    self._last: Any = None
    self._ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(AHEAD)
    self._stopped = threading.Event()
    # It may hang in a read that no one can end, and must not keep the process then.
    self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)

  def __enter__(self) -> Prefetched:
    self._thread.start()
    return self

  def _work(self) -> None:
    try:
      for batch in self._data:
        if self._stopped.is_set():
          return
        self._ready.put((self._put(batch), None))
      raise RuntimeError("The training data ended; they should be endless.")
    except BaseException as error:
      self._ready.put((None, _explained(error)))

  def __next__(self) -> Any:
    began = time.monotonic()
    while True:
      try:
        batch, error = self._ready.get(timeout=_ASKED_EVERY_SECONDS)
      except queue.Empty:
        if self._wait(time.monotonic() - began):
          return self._last
        continue
      if error is not None:
        raise error
      if self._repeating:
        self._last = batch
      return batch

  def __exit__(self, *_: object) -> None:
    self._stopped.set()
    until = time.monotonic() + 1.0
    while self._thread.is_alive() and time.monotonic() < until:
      try:  # make room: the thread may be waiting for it
        self._ready.get(timeout=0.05)
      except queue.Empty:
        continue


def _explained(error: BaseException) -> BaseException:
  """An error of our own where grain reports that a worker died."""
  if "Worker process was terminated unexpectedly" not in str(error):
    return error
  explained = InputError(
    f"A process that loads batches died ({str(error).partition('.')[0]}); -9 is often the system's "
    "answer to memory running out. Lower config.loader.workers or config.loader.threads; the same "
    "command goes on from the last checkpoint."
  )
  explained.__cause__ = error
  return explained
