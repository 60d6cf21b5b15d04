"""Statistics of a set of pictures, read once, block by block.

Each process takes a range of the blocks, and results are joined in the order of the blocks: figures
depend neither on the number of devices nor, but for rounding, on that of processes. Results so far
are saved every minute, so that a stopped evaluation resumes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from clu.metrics import CollectingMetric
from safetensors import SafetensorError, safe_open

from launch.engine import console, processes
from launch.evaluation.pictures import PictureSet
from vavae_jax.common import mesh
from vavae_jax.common.batches import Batches
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_safetensors
from vavae_jax.metrics.distribution import Moments, ProbabilitySums

BLOCK = 250
CPU_BATCH = 50
SPLIT = 5_000  # samples of which each inception score is
SECONDS_BETWEEN_SAVES = 60.0
SUMS = "sums of probabilities"  # each row is a `ProbabilitySums`


class Part(NamedTuple):
  """Values computed from some pictures, a row for each."""

  moments: dict[str, Any]  # features [B,F], of which mean and covariance are wanted
  probabilities: Any  # [B,classes], or None
  columns: dict[str, Any]  # what is kept of each picture [B, ...]


class Statistics:
  """Statistics of pictures in their order; `moments` and `columns` have the names of `Part`'s.

  A column has a row for each picture; that of `SUMS`, of the probabilities, one for each block.
  """

  def __init__(self) -> None:
    self.moments: dict[str, Moments] = {}
    self.columns = CollectingMetric.empty()

  def add(self, parts: list[Part]) -> None:
    """Adds the next block, which was computed in several parts."""
    for name in parts[0].moments:
      features = np.concatenate([part.moments[name] for part in parts])
      self.moments.setdefault(name, Moments()).update(features)
    columns = {n: (np.concatenate([p.columns[n] for p in parts]),) for n in parts[0].columns}
    if parts[0].probabilities is not None:
      sums = ProbabilitySums.of(np.concatenate([part.probabilities for part in parts]))
      columns[SUMS] = (np.concatenate([[sums.rows, sums.entropy], sums.total])[None],)
    self.columns = self.columns.merge(CollectingMetric(columns))

  def merge(self, other: Statistics) -> None:
    """Adds those of the pictures that follow."""
    for name, moments in other.moments.items():
      self.moments.setdefault(name, Moments()).merge(moments)
    self.columns = self.columns.merge(other.columns)

  def has(self, name: str) -> bool:
    """Whether something of this name was kept of each picture."""
    return name in self.columns.values

  def column(self, name: str) -> np.ndarray:
    """What was kept of all pictures [N, ...]."""
    return np.concatenate(self.columns.values[name])

  def inception_score(self) -> float | None:
    """The mean over splits of 5,000 samples, a last smaller one included; None without classes."""
    if not self.has(SUMS):
      return None
    rows, step = self.column(SUMS), SPLIT // BLOCK
    splits = [sum(rows[begin : begin + step]) for begin in range(0, len(rows), step)]
    return float(np.mean([ProbabilitySums(int(x[0]), float(x[1]), x[2:]).score() for x in splits]))

  def to_tensors(self) -> dict[str, np.ndarray]:
    """All of it as arrays."""
    tensors = {f"column.{name}": column for name, column in self.columns.compute().items()}
    for name, moments in self.moments.items():
      tensors[f"count.{name}"] = np.array([moments.count], np.int64)
      tensors[f"mean.{name}"] = moments.mean
      tensors[f"scatter.{name}"] = moments.scatter
    return tensors

  @classmethod
  def of_tensors(cls, tensors: dict[str, np.ndarray]) -> Statistics:
    """The inverse of `to_tensors`."""
    found, columns = cls(), {}
    for key, value in tensors.items():
      what, _, name = key.partition(".")
      if what == "column":
        columns[name] = (value,)
      elif what == "count":
        mean, scatter = tensors[f"mean.{name}"], tensors[f"scatter.{name}"]
        found.moments[name] = Moments(int(value[0]), mean, scatter)
      elif what not in ("mean", "scatter"):
        raise ValueError(f"unknown tensor {key}, perhaps of an older version")
    found.columns = CollectingMetric(columns)
    return found


def compute(
  pictures: PictureSet,
  run: Callable[[Any, dict[str, jax.Array]], Part],
  params: Any,
  *,
  name: str,
  about: Any,
  progress: Path | None = None,
) -> Statistics:
  """The statistics of all pictures of a set, the same in all processes.

  Args:
    run: jitted; (params, {"image" uint8 [B,H,W,3], "index" int32 [B]}) -> what is computed.
    name: what the pictures are, for the bar and for the file in `progress`.
    about: what else the statistics depend on, for JSON.
    progress: a folder, where an evaluation that was stopped goes on from; None: it does not.

  Raises:
    InputError: the pictures or their features are unusable.
  """
  blocks = -(-len(pictures) // BLOCK)
  count, mine = jax.process_count(), jax.process_index()
  first, last = (blocks * i // count for i in (mine, mine + 1))
  path = progress and progress / f"{name.replace(' ', '_')}-{mine}-of-{count}.safetensors"
  noted = json.dumps([pictures.about, about], sort_keys=True)
  found, done = _load(path, noted) if path else (Statistics(), 0)
  ranges = [(i * BLOCK, min((i + 1) * BLOCK, len(pictures))) for i in range(first + done, last)]
  total = min(last * BLOCK, len(pictures)) - first * BLOCK
  devices = mesh.local_mesh()
  batch_size = CPU_BATCH if jax.default_backend() == "cpu" else BLOCK
  batches = Batches(run, batch_size, devices, console.say_here)
  here = jax.device_put(params, mesh.replicated(devices))
  saved = time.monotonic()
  with (
    console.Bar(name, total, min(done * BLOCK, total)) as bar,
    ThreadPoolExecutor(1) as reader,
  ):
    ahead = [reader.submit(pictures.read, *ranges[0])] if ranges else []
    for number, (start, stop) in enumerate(ranges, 1):
      image = ahead.pop().result()
      if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3 or image.size == 0:
        given = f"{image.dtype} {image.shape}"
        raise InputError(f"The pictures from {start} on are {given}; uint8 [N,H,W,3] is needed.")
      if number < len(ranges):
        ahead.append(reader.submit(pictures.read, *ranges[number]))
      batch = {"image": image, "index": np.arange(start, stop, dtype=np.int32)}
      parts = list(batches(batch, here))
      try:
        found.add(parts)
      except ValueError as error:
        raise InputError(
          f"The features of the pictures {start}..{stop - 1} are unusable: {error}"
        ) from error
      bar.update(stop - first * BLOCK)
      late = time.monotonic() - saved > SECONDS_BETWEEN_SAVES
      if path and (late or number == len(ranges)):
        write_safetensors(path, found.to_tensors(), {"noted": noted, "blocks": str(done + number)})
        saved = time.monotonic()
  result = Statistics()
  for tensors in processes.gather(found.to_tensors()):  # in the order of the pictures
    result.merge(Statistics.of_tensors(tensors))
  return result


def _load(path: Path, noted: str) -> tuple[Statistics, int]:
  """The statistics that a stopped evaluation saved, and the number of their blocks."""
  if not path.is_file():
    return Statistics(), 0
  try:
    with safe_open(path, "numpy") as file:
      metadata = file.metadata()
      if metadata["noted"] != noted:
        return Statistics(), 0
      tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Statistics.of_tensors(tensors), int(metadata["blocks"])
  except (OSError, SafetensorError, KeyError, ValueError) as error:
    console.say(f"{path} is damaged ({error}); its part is computed again")
    return Statistics(), 0
