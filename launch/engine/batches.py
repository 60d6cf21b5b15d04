"""Arrays through a compiled function in batches of one size, so that one shape compiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from launch.engine import mesh


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
