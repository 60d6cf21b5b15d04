"""Statistics of a set of pictures, read once, block by block.

The blocks are the parts of a work list (launch/engine/parts.py): each process computes features of
some, and the first joins them in their order. So figures depend neither on the number of devices
nor on that of processes, and an evaluation that was stopped resumes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy
from clu.metrics import CollectingMetric
from safetensors import SafetensorError

from launch.engine import console, processes
from launch.engine.parts import Parts, items_in, shared_out
from launch.evaluation.pictures import PictureSet, Sampled
from vavae_jax.common import mesh
from vavae_jax.common.batches import Batches
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, remove_folder, write_safetensors
from vavae_jax.metrics.distribution import Moments, ProbabilitySums

BLOCK = 250
CPU_BATCH = 50
SPLIT = 5_000  # samples of which each inception score is
SECONDS_BETWEEN_SAVES = 60.0
SUMS = "sums of probabilities"  # each row is a `ProbabilitySums`
JOINED = "joined.safetensors"  # of a folder of blocks, the statistics of the first ones


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

  def add(self, block: dict[str, np.ndarray]) -> None:
    """Adds the next block, as `_tensors_of` gives it."""
    columns = {}
    for key, x in block.items():
      what, _, name = key.partition(".")
      if what == "column":
        columns[name] = (x,)
      else:
        self.moments.setdefault(name, Moments()).update(x)
    self.columns = self.columns.merge(CollectingMetric(columns))

  def has(self, name: str) -> bool:
    """Whether something of this name was kept of each picture."""
    return name in self.columns.values

  def column(self, name: str) -> np.ndarray:
    """What was kept of all pictures [N, ...]."""
    return np.concatenate(self.columns.values[name])

  def named(self, before: str) -> Statistics:
    """Those whose names begin so, by the rest of their names."""
    found, rest = Statistics(), slice(len(before), None)
    found.moments = {k[rest]: x for k, x in self.moments.items() if k.startswith(before)}
    columns = {k[rest]: x for k, x in self.columns.values.items() if k.startswith(before)}
    found.columns = CollectingMetric(columns)
    return found

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
  """The statistics of all pictures of a set, in the first process; in the others there are none.

  Args:
    run: jitted; (params, {"image" uint8 [B,H,W,3], "index" int32 [B]}) -> what is computed.
    name: what the pictures are, for the bar and for the folder in `progress`.
    about: what else the statistics depend on, for JSON.
    progress: a folder that all processes see, where an evaluation that was stopped goes on from;
      None: it does not, and several processes exchange what they found, for all to have it.

  Raises:
    InputError: the pictures or their features are unusable.
  """

  def noted() -> str:  # a checksum of all pictures may be in it: by the first process alone
    return json.dumps([pictures.about, about], sort_keys=True)

  blocks = _Blocks(progress and progress / name.replace(" ", "_"), len(pictures), noted)
  devices = mesh.local_mesh()
  at_once = CPU_BATCH if jax.default_backend() == "cpu" else BLOCK
  batches = Batches(run, at_once, devices, console.say_here)
  here = jax.device_put(params, mesh.replicated(devices))
  groups, done = blocks.mine(devices.size), 0
  with console.Bar(name, items_in(groups)) as bar:
    for group, (image, index) in zip(groups, _each_read(pictures, groups), strict=True):
      found = list(batches({"image": image, "index": index}, here))
      for part, tensors in zip(group, _tensors_of(found, group), strict=True):
        blocks.add(part, tensors)
      bar.update(done := done + len(index))
  return blocks.joined()


def _each_read(
  pictures: PictureSet, groups: list[list[range]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """What `_read` gives of each group, in a thread while features of the one before are computed.

  Samples are drawn when those before are kept: by the same devices, and a kill costs one group.
  """
  if isinstance(pictures, Sampled):
    yield from (_read(pictures, group) for group in groups)
    return
  with ThreadPoolExecutor(1) as reader:
    ahead: list[Future[tuple[np.ndarray, np.ndarray]]] = []
    for group in groups:
      ahead.append(reader.submit(_read, pictures, group))
      if len(ahead) > 1:
        yield ahead.pop(0).result()
    yield from (read.result() for read in ahead)


def _read(pictures: PictureSet, group: list[range]) -> tuple[np.ndarray, np.ndarray]:
  """The pictures of some blocks, and their indices."""
  runs: list[range] = []
  for part in group:
    if runs and runs[-1].stop == part.start:
      part = range(runs.pop().start, part.stop)
    runs.append(part)
  read = [pictures.read(part.start, part.stop) for part in runs]
  for image, part in zip(read, runs, strict=True):
    if image.dtype != np.uint8 or image.ndim != 4 or image.shape[-1] != 3 or image.size == 0:
      given = f"{image.dtype} {image.shape}"
      raise InputError(f"The pictures from {part.start} on are {given}; uint8 [N,H,W,3] is needed.")
  return np.concatenate(read), np.concatenate([np.asarray(part, np.int32) for part in runs])


def _tensors_of(found: list[Part], group: list[range]) -> Iterator[dict[str, np.ndarray]]:
  """What is kept of each block of a group that was computed in batches."""
  whole = jax.tree.map(lambda *x: np.concatenate(x), *found)
  begin = 0
  for part in group:
    rows = slice(begin, begin := begin + len(part))
    block = jax.tree.map(lambda x, rows=rows: x[rows], whole)
    try:
      if broken := [name for name, x in block.moments.items() if not np.isfinite(x).all()]:
        raise ValueError(f"{', '.join(broken)} hold NaN or infinity")
      columns = dict(block.columns)
      if block.probabilities is not None:
        sums = ProbabilitySums.of(block.probabilities)
        columns[SUMS] = np.concatenate([[sums.rows, sums.entropy], sums.total])[None]
    except ValueError as error:
      raise InputError(
        f"The features of the pictures {part.start}..{part.stop - 1} are unusable: {error}"
      ) from error
    kinds = {"features": block.moments, "column": columns}
    yield {f"{what}.{name}": x for what, named in kinds.items() for name, x in named.items()}


class _Blocks:
  """The blocks that are there, as files of a folder or in memory, and the statistics of the first
  ones, which are joined as they come.
  """

  def __init__(self, folder: Path | None, total: int, noted: Callable[[], str]):
    self._parts = Parts(folder or Path(), total, BLOCK, ".safetensors")
    self._noted, self._in_files = noted, folder is not None
    self._kept: dict[int, dict[str, np.ndarray]] = {}  # by their first pictures, if not in files
    self._found, self._saved = Statistics(), time.monotonic()
    # How many pictures are joined.
    self._done = processes.first_does(self._resume) if folder else 0

  def mine(self, at_once: int) -> list[list[range]]:
    """This process's of the blocks that are missing."""
    if self._in_files:
      return self._parts.mine(at_once, [range(self._done)])
    return shared_out(lambda: self._parts.all, at_once)

  def add(self, part: range, tensors: dict[str, np.ndarray]) -> None:
    """Takes one block."""
    if self._in_files:
      write_safetensors(self._parts.path(part), tensors)
    else:
      self._kept[part.start] = tensors
    if jax.process_count() == 1 or (self._in_files and jax.process_index() == 0):
      self._join()

  def joined(self) -> Statistics:
    """The statistics, when all processes have come here."""
    if self._in_files:
      processes.wait_for_all()
      if jax.process_index() == 0:
        self._parts.check_complete([range(self._done)])
        self._join()
      return self._found
    for each in processes.gather(
      {f"{start}.{key}": x for start, block in self._kept.items() for key, x in block.items()}
    ):
      for name, x in each.items():
        start, _, key = name.partition(".")
        self._kept.setdefault(int(start), {})[key] = x
    self._join()
    return self._found

  def _join(self) -> None:
    """Joins the blocks that are next, and saves where that has led now and then."""
    while tensors := self._next():
      self._found.add(tensors)
      self._done = min(self._done + BLOCK, self._parts.total)
    if self._in_files and time.monotonic() - self._saved > SECONDS_BETWEEN_SAVES:
      whole = self._found.to_tensors() | {"done": np.array([self._done])}
      write_safetensors(self._parts.folder / JOINED, whole)
      for part in self._parts.there():
        if part.stop <= self._done:
          self._parts.path(part).unlink()
      self._saved = time.monotonic()

  def _next(self) -> dict[str, np.ndarray] | None:
    if not self._in_files:
      return self._kept.pop(self._done, None)
    path = self._parts.path(range(self._parts.total)[self._done : self._done + BLOCK])
    if self._done == self._parts.total or not path.exists():
      return None
    try:
      return safetensors.numpy.load(path.read_bytes())
    except SafetensorError as error:
      raise InputError(f"{path} is damaged ({error}); delete it and start again.") from error

  def _resume(self) -> int:
    """Finds what a stopped evaluation has joined; deletes what another one has left."""
    folder = self._parts.folder
    note, joined, about = folder / "about.json", folder / JOINED, self._noted().encode()
    if not note.is_file() or note.read_bytes() != about:
      remove_folder(folder)
      with atomic_file(note) as file:
        file.write(about)
    if not joined.is_file():
      return 0
    try:
      tensors = safetensors.numpy.load(joined.read_bytes())
      done = int(tensors.pop("done")[0])
      self._found = Statistics.of_tensors(tensors)
    except (SafetensorError, KeyError, ValueError) as error:
      console.say(f"{joined} is damaged ({error}); its part is computed again")
      return 0
    return done
