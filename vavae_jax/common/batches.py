"""Arrays through a compiled function in batches of one size, so that one shape compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from vavae_jax.common import mesh


def in_batches(
  run: Callable[..., Any], arrays: Any, batch_size: int, devices: jax.sharding.Mesh
) -> Iterator[Any]:
  """Runs a jitted function over the leading axis of a pytree of host arrays [N, ...].

  `batch_size` is over all devices, rounded up to a multiple of their number; the last batch is
  filled up by repetition.

  Yields:
    The results as host arrays without the filling: N rows in all; see `in_shares`.
  """

  def load(rows: np.ndarray) -> Any:
    return jax.tree.map(lambda x: x[rows], arrays)

  total = len(jax.tree.leaves(arrays)[0])
  return (out for _, out in in_shares(run, load, total, batch_size, devices))


def in_shares(
  run: Callable[..., Any],
  load: Callable[[np.ndarray], Any],
  total: int,
  batch_size: int,
  devices: jax.sharding.Mesh,
) -> Iterator[tuple[np.ndarray, Any]]:
  """`in_batches` over rows that are loaded when their turn comes: int64 [n] -> arrays [n, ...].

  On a mesh of several processes all call it alike, and each loads, feeds and gets the rows of its
  own devices alone, perhaps none of the last batch. Every result of `run` must be `pin_batch`ed
  there, or be `whole`: then all processes get all its rows.

  Yields (this process's rows of a batch, the results) without the filling.
  """
  batch_size = mesh.round_up(batch_size, devices)
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


def as_fits(
  run: Callable[..., Any], arrays: Any, batch_size: int, devices: jax.sharding.Mesh
) -> Any:
  """As `in_batches`, the results joined; batches are halved while memory does not hold one.

  They are no larger than what there is to do.
  """
  total = len(jax.tree.leaves(arrays)[0])
  size, done, parts = min(batch_size, total), 0, []
  while done < total:
    rest = jax.tree.map(lambda x, done=done: x[done:], arrays)
    try:
      for part in in_batches(run, rest, size, devices):
        parts.append(part)
        done += len(jax.tree.leaves(part)[0])
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error) or size <= devices.size:
        raise
      size //= 2
  return jax.tree.map(lambda *x: np.concatenate(x), *parts)
