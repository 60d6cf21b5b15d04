"""A numbered work list, done in parts by all processes of a job.

Item i comes out alike whoever makes it. A part is one file of a folder that all processes see, on a
disk or in a bucket, and is named by its first item and their number. So the names alone say what is
missing, after any end and for any number of processes; what each was making or writing when it was
killed is all that is lost.
"""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import jax
import numpy as np

from launch.engine import console, processes
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file

T = TypeVar("T")
ROWS = ".npy"  # the kind of parts that are an array with a row for each item


def share(items: Sequence[T]) -> Sequence[T]:
  """This process's of some items; those of all processes in their order are all items."""
  count, mine = jax.process_count(), jax.process_index()
  return items[len(items) * mine // count : len(items) * (mine + 1) // count]


def items_in(groups: Sequence[Sequence[range]]) -> int:
  """The number of items of groups of parts."""
  return sum(len(part) for group in groups for part in group)


def shared_out(missing: Callable[[], list[range]], at_once: int) -> list[list[range]]:
  """This process's of the parts that the first process finds missing, `at_once` neighbours a group.

  The groups go round among the processes: of what is there, little is behind a gap.
  """

  def listed() -> list[list[int]]:
    return [[at_once], *([part.start, part.stop] for part in missing())]

  (size,), *parts = processes.first_does(listed)
  groups = [[range(*x) for x in parts[i : i + size]] for i in range(0, len(parts), size)]
  return groups[jax.process_index() :: jax.process_count()]


@dataclasses.dataclass(frozen=True)
class Parts:
  """The files of `total` items in a folder, made `size` at a time; `kind` is the files' suffix.

  Files of runs with other sizes count, too, and may overlap.
  """

  folder: Path
  total: int
  size: int
  kind: str

  def path(self, part: range) -> Path:
    """The file of a part."""
    return self.folder / f"{part.start:09d}_{len(part)}{self.kind}"

  def there(self) -> list[range]:
    """The parts that are there, by their first items."""
    name = re.compile(f"([0-9]{{9,}})_([0-9]+){re.escape(self.kind)}")
    files = self.folder.iterdir() if self.folder.is_dir() else ()
    named = [found for file in files if (found := name.fullmatch(file.name))]
    numbers = sorted((int(found[1]), int(found[2])) for found in named)
    return [range(start, start + count) for start, count in numbers]

  @property
  def all(self) -> list[range]:
    """The parts of this size."""
    starts = range(0, self.total, self.size)
    return [range(start, min(start + self.size, self.total)) for start in starts]

  def missing(self, but: Iterable[range] = ()) -> list[range]:
    """Those of them that have an item that is in no file, `but` some that are not needed."""
    done = bytearray(self.total)
    for part in (*but, *self.there()):
      done[part.start : part.stop] = b"\1" * len(range(self.total)[part.start : part.stop])
    return [part for part in self.all if not all(done[part.start : part.stop])]

  def mine(self, at_once: int = 1, but: Iterable[range] = ()) -> list[list[range]]:
    """This process's of what is `missing`, as `shared_out` gives it."""
    return shared_out(lambda: self.missing(but), at_once)

  def check_complete(self, but: Iterable[range] = ()) -> None:
    """Returns when this process sees all that was written, once all have ended."""
    processes.check_seen(map(self.path, self.missing(but)))

  def in_order(self, items: range) -> Iterator[tuple[Path, slice]]:
    """The files that have these items, and which of the items of each to take."""
    done = items.start
    for part in self.there():
      if part.start <= done < min(part.stop, items.stop):
        yield self.path(part), slice(done - part.start, min(part.stop, items.stop) - part.start)
        done = part.stop


def make_rows(
  parts: Parts, compute: Callable[[np.ndarray], np.ndarray], at_once: int, name: str
) -> None:
  """Makes this process's parts that are missing, of the kind `ROWS`; `name` is for the bar.

  `compute` maps items [n] to an array [n, ...]; it gets those of `at_once` parts.
  """
  groups, done = parts.mine(at_once), 0
  with console.Bar(name, items_in(groups)) as bar:
    for group in groups:
      items = np.concatenate([np.asarray(part) for part in group])
      found = compute(items)
      for part in group:
        write_rows(parts.path(part), found[: len(part)])
        found = found[len(part) :]
      bar.update(done := done + len(items))


def write_rows(path: Path, array: np.ndarray) -> None:
  """Writes a part of the kind `ROWS`."""
  buffer = io.BytesIO()  # into a file NumPy would report a full disk without the system's number
  np.save(buffer, array)
  with atomic_file(path) as file:
    file.write(buffer.getbuffer())


def rows_of(parts: Parts, count: int) -> Iterator[np.ndarray]:
  """The first `count` rows in order, a part at a time; InputError for a damaged file."""
  for path, some in parts.in_order(range(count)):
    try:
      yield np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)[some]
    except (OSError, ValueError, EOFError) as error:
      raise InputError(f"{path} is damaged ({error}); delete it and start again.") from error
