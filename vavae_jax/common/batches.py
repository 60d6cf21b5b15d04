"""Arrays through a compiled function in batches of one size, so that one shape compiles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vavae_jax.common import mesh


def in_shares(
  run: Callable[..., Any],
  load: Callable[[np.ndarray], Any],
  total: int,
  batch_size: int,
  devices: jax.sharding.Mesh,
) -> Iterator[tuple[np.ndarray, Any]]:
  """Runs a jitted function over `total` rows, loaded when their turn comes: int64 [n] -> pytree of
  host arrays [n, ...].

  `batch_size` is of each device, whatever their number; the last batch is filled up by repetition.
  On a mesh of several processes all call it alike, and each loads, feeds and gets the rows of its
  own devices alone, perhaps none of the last batch. Every result of `run` must be `pin_batch`ed
  there, or be `whole`: then all processes get all its rows.

  Yields (this process's rows of a batch, the results as host arrays) without the filling.
  """
  batch_size *= devices.size
  own = mesh.own_rows(batch_size, devices)
  for start in range(0, total, batch_size):
    count = min(batch_size, total - start)
    batch = load(start + own % count)
    with jax.set_mesh(devices):
      out = jax.tree.map(mesh.to_host, run(mesh.to_global(batch, devices)))
    kept = own < count

    def unfilled(x: np.ndarray, count: int = count, kept: np.ndarray = kept) -> np.ndarray:
      return x[:count] if len(x) == batch_size else x[kept]

    yield start + own[kept], jax.tree.map(unfilled, out)


@dataclasses.dataclass
class Batches:
  """A jitted function, which takes a pytree [B, ...] last, over the leading axis of host arrays.

  Each device has `rows` at once, whatever their number: so a row comes out the same to the bit.
  Where memory does not hold them they are halved, for good; not on a mesh of several processes, for
  which see `in_shares`.
  """

  run: Callable[..., Any]
  rows: int
  devices: jax.sharding.Mesh
  say: Callable[[str], None] = lambda _: None  # is told of halving

  def __call__(self, arrays: Any, *params: Any) -> Iterator[Any]:
    """Yields the results of `run(*params, batch)` for arrays [N, ...]."""
    total, done, run = len(jax.tree.leaves(arrays)[0]), 0, functools.partial(self.run, *params)

    def load(rows: np.ndarray) -> Any:
      return jax.tree.map(lambda x: x[begin + rows], arrays)

    while (begin := done) < total:
      try:
        for _, out in in_shares(run, load, total - begin, self.rows, self.devices):
          yield out
          done = min(done + self.rows * self.devices.size, total)
      except jax.errors.JaxRuntimeError as error:
        full = "RESOURCE_EXHAUSTED" in str(error) and self.rows > 1
        if not full or self.devices.is_multi_process:  # others may wait inside of the program
          raise
        self.say(f"{self.rows} at once are more than a device's memory holds: now half of them")
        self.rows //= 2


def as_fits(
  run: Callable[..., Any], arrays: Any, batch_size: int, devices: jax.sharding.Mesh
) -> Any:
  """The results for arrays [N, ...] joined, of `Batches` of `batch_size` over all devices.

  They are no larger than what there is to do.
  """
  size = min(batch_size, len(jax.tree.leaves(arrays)[0]))
  parts = Batches(run, -(-size // devices.size), devices)(arrays)
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)
