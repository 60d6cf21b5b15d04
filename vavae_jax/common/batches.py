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
    The results as host arrays without the filling: N rows in all.
  """
  batch_size = mesh.round_up(batch_size, devices)
  total = len(jax.tree.leaves(arrays)[0])
  for start in range(0, total, batch_size):
    count = min(batch_size, total - start)
    rows = np.resize(np.arange(start, start + count), batch_size)
    batch = jax.tree.map(lambda x, rows=rows: x[rows], arrays)
    with jax.set_mesh(devices):
      out = jax.device_get(run(mesh.to_global(batch, devices)))
    yield jax.tree.map(lambda x, count=count: x[:count], out)


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
