"""A thread puts batches onto the devices ahead of the steps that take them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vavae_jax.common.errors import InputError

AHEAD = 3


class Prefetched:
  """`with Prefetched(data, put) as batches: next(batches)`, which raises the thread's errors.

  The data are endless; `put` starts the transfer of a batch to the devices.
  """

  def __init__(self, data: Iterable[Any], put: Callable[[Any], Any]):
    self._data, self._put = iter(data), put
    self._thread = ThreadPoolExecutor(1, "prefetch")

  def __enter__(self) -> Prefetched:
    self._ahead = collections.deque(self._thread.submit(self._load) for _ in range(AHEAD))
    return self

  def _load(self) -> Any:
    try:
      return self._put(next(self._data))
    except StopIteration as error:
      raise RuntimeError("The training data ended; they should be endless.") from error
    except Exception as error:
      if "Worker process was terminated unexpectedly" not in str(error):
        raise
      raise InputError(
        f"A process that loads batches died ({str(error).partition('.')[0]}); -9 is often the "
        "system's answer to memory running out. Lower config.loader.workers or "
        "config.loader.threads; the same command goes on from the last checkpoint."
      ) from error

  def __next__(self) -> Any:
    self._ahead.append(self._thread.submit(self._load))
    return self._ahead.popleft().result()

  def __exit__(self, *_: object) -> None:
    self._thread.shutdown(cancel_futures=True)
