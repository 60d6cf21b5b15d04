"""Samples of a training on its way, drawn by all devices of its job as one program.

What each process has drawn waits as files in a folder that a training which is stopped here goes on
from, on any number of processes; each needs to see no files but its own. They hold what is wanted
of the samples, and pictures only as far as they are shown.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from launch.engine import console, processes
from launch.engine.parts import Parts
from vavae_jax.common import mesh
from vavae_jax.common.files import Place, atomic_file

Drawn = dict[int, dict[str, np.ndarray]]  # arrays [n, ...] of some samples, by the first's index
SHOWN = "shown"
_TOGETHER = 4_096  # samples whose arrays travel at once


def identity(params: Any, about: Any) -> str:
  """Names weights, by their bits, and what JSON tells beside them."""
  sums = [int(x) for x in jax.tree.leaves(_sums(params))]
  return hashlib.sha256(json.dumps([sums, about], sort_keys=True).encode()).hexdigest()[:16]


@jax.jit
def _sums(params: Any) -> Any:
  """Sums of bits, which are not rounded and so the same on all meshes."""
  return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint32).sum(), params)


def draw(
  sample: Callable[[np.ndarray], np.ndarray],
  keep: Callable[[np.ndarray], dict[str, np.ndarray]],
  parts: Parts,
  devices: jax.sharding.Mesh,
  shown: int,
) -> Generator[None, None, Drawn]:
  """Draws what is missing of `parts`, as many on each device at once as their size.

  Args:
    sample: indices [B], the same in all processes -> this process's pictures, uint8 [n, H, W, 3].
    keep: pictures -> what is wanted of each, arrays [n, ...].
    shown: so many pictures are kept as `SHOWN`, the first ones.

  Yields None after each batch; returns what this process has. All samples are in one, or, where
  files came back that had been missing, in several.
  """
  found = _read(parts)
  done = np.zeros(parts.total, bool)
  for start, stop in np.concatenate(_everyones([(x.start, x.stop) for x in found])).tolist():
    done[start:stop] = True
  missing = np.flatnonzero(~done)
  at_once = parts.size * devices.size
  held = mesh.own_rows(at_once, devices)
  drawn = {part.start: tensors for part, tensors in found.items()}
  for begin in range(0, len(missing), at_once):
    batch = missing[begin : begin + at_once]
    pictures = sample(batch)
    own = batch[held[held < len(batch)]]
    kept = keep(pictures) if len(own) else {}
    for rows in np.split(np.arange(len(own)), np.flatnonzero(np.diff(own) != 1) + 1):
      if not len(rows):
        continue
      part = range(int(own[rows[0]]), int(own[rows[-1]]) + 1)
      some = {name: x[rows] for name, x in kept.items()}
      some[SHOWN] = pictures[rows][: max(shown - part.start, 0)]
      with atomic_file(parts.path(part)) as file:
        file.write(safetensors.numpy.save(some))
      drawn[part.start] = some
    yield
  return drawn


def _read(parts: Parts) -> dict[range, dict[str, np.ndarray]]:
  """The contents of the files that this process sees and none before it does."""
  there = parts.there()
  seen = [{*map(tuple, x.tolist())} for x in _everyones([(x.start, x.stop) for x in there])]
  found = {}
  for part in there:
    if any((part.start, part.stop) in others for others in seen[: jax.process_index()]):
      continue
    try:
      found[part] = safetensors.numpy.load(parts.path(part).read_bytes())
    except (OSError, SafetensorError) as error:
      console.say_here(f"{parts.path(part)} is damaged ({error}); it is made again")
  return found


def _everyones(ranges: list[tuple[int, int]]) -> list[np.ndarray]:
  """Each process's ranges, int64 [k, 2]."""
  return [x["ranges"] for x in processes.gather({"ranges": np.array(ranges, int).reshape(-1, 2)})]


def in_order(drawn: Drawn, name: str, total: int) -> Iterator[np.ndarray]:
  """The arrays of this name of the first `total` samples of all processes, piece by piece."""
  done = 0
  for begin in range(0, total, _TOGETHER):
    own = {str(i): x[name] for i, x in drawn.items() if begin <= i < min(begin + _TOGETHER, total)}
    found = {int(i): x for tensors in processes.gather(own) for i, x in tensors.items()}
    for start in sorted(found):
      yield found[start][max(done - start, 0) :]
      done = max(done, start + len(found[start]))


def remove(folder: Path) -> None:
  """Removes the files of all processes, when all have come here."""
  processes.wait_for_all()
  if jax.process_index() == 0:
    Place(folder).rmtree(missing_ok=True)
  processes.wait_for_all()
  if jax.process_index():  # its own disk's
    Place(folder).rmtree(missing_ok=True)
