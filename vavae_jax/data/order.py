"""The order of records in training: endless, shuffled, every record once an epoch.

It is a function of seed and position alone. So is all that is random about a record, by its epoch:
nothing depends on how many processes, worker processes or threads load it, and a training goes on
where it was by its step, on whatever number of processes.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from absl import flags

if TYPE_CHECKING:
  import grain

# Batches in memory of each process, beside those that are on their way to the devices.
BUFFERED = 4


class Order:
  """The record at each position, for epochs of `count` records."""

  def __init__(self, count: int, seed: int):
    self.count, self.seed = count, seed

  def records(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(record, epoch) at positions from 0 on, int64 each."""
    epochs, places = np.divmod(positions, self.count)
    records = np.empty_like(positions)
    for epoch in np.unique(epochs):
      inside = epochs == epoch
      records[inside] = _permutation(self.count, self.seed, int(epoch))[places[inside]]
    return records, epochs

  def rng(self, record: int, epoch: int) -> np.random.Generator:
    """The random numbers of a record in an epoch."""
    return np.random.default_rng((self.seed, _RECORD, epoch, record))

  def coins(self, records: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """A fair coin for each record and epoch, bool."""
    coins = np.empty(records.shape, bool)
    for epoch in np.unique(epochs):
      inside = epochs == epoch
      coins[inside] = _coins(self.count, self.seed, int(epoch))[records[inside]]
    return coins


_SHUFFLE, _COIN, _RECORD = range(3)


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, _SHUFFLE, epoch)).permutation(count)


@functools.lru_cache(maxsize=4)
def _coins(count: int, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, _COIN, epoch)).integers(0, 2, count, bool)


def spread(total: int, count: int) -> np.ndarray:
  """At most `count` of `total` records, evenly over all, ascending; they are often sorted by class,
  so that the first ones are of few.
  """
  return np.linspace(0, total - 1, min(count, total)).astype(int)


class Share(NamedTuple):
  """Which part of the batches a process loads, and how."""

  batch_size: int  # over all processes
  rows: np.ndarray | None = None  # of each batch, as `mesh.own_rows` gives them; None: all
  start: int = 0  # batches that were taken already
  threads: int = 2  # that load batches
  workers: int = 0  # processes that load batches, each with as many threads; 0: this one does

  def positions(self, batch: int) -> np.ndarray:
    """The positions of this process's rows of a batch."""
    rows = np.arange(self.batch_size) if self.rows is None else self.rows
    return batch * self.batch_size + rows


def batches(
  share: Share, load: Callable[[np.ndarray], dict[str, Any]]
) -> grain.IterDataset[dict[str, Any]]:
  """Endless batches of a process, loaded ahead.

  `load` makes a batch of positions of records; with workers it must be picklable.
  """
  import grain  # which takes half a second

  loads = functools.partial(_in_worker, load) if share.workers else load
  data = grain.MapDataset.range(share.start, 2**62).map(
    lambda batch: loads(share.positions(int(batch)))
  )
  options = grain.ReadOptions(
    num_threads=share.threads, prefetch_buffer_size=max(BUFFERED, share.threads)
  )
  iterated = data.to_iter_dataset(options)
  if not share.workers:
    return iterated
  if not flags.FLAGS.is_parsed():  # grain asks for some of its own where it starts processes
    flags.FLAGS.mark_as_parsed()
  return iterated.mp_prefetch(
    grain.MultiprocessingOptions(num_workers=share.workers, per_worker_buffer_size=BUFFERED)
  )


def _in_worker(
  load: Callable[[np.ndarray], dict[str, Any]], positions: np.ndarray
) -> dict[str, Any]:
  _end_with_parent()
  return load(positions)


@functools.cache
def _end_with_parent() -> None:
  """Ends this worker when the training is killed, which could not tell it to."""
  parent = multiprocessing.parent_process()
  if parent is not None:

    def watch() -> None:
      parent.join()
      os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()
