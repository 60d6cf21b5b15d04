"""Latents on their way into a store: parts that all processes write, joined to its shards.

A part is a batch of one process (launch/engine/parts.py), its file one of the folder PARTS of the
store. As soon as all pictures of a shard are there, the process whose shard it is joins them and
deletes their parts: so parts and shards take little more room than the store, also where the parts
of some processes wait for those of a slow one, and no process holds more than one shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from launch.engine import processes
from launch.engine.parts import Parts, shared_out
from lightningdit_jax.store import shards
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url, remove_folder, remove_partial, write_safetensors

PARTS = "parts"
_SKIPPED = "skipped"


class Encoded:
  """What of `total` pictures is encoded in a store's folder, in parts of `size` or in shards.

  Attributes:
    paths: all shards, in order.
  """

  def __init__(self, output: Path, total: int, shard_size: int, size: int):
    count = -(-total // shard_size)
    self.paths = [output / shards.shard_name(number, count) for number in range(count)]
    self._total, self._output, self._shard_size = total, output, shard_size
    self._parts = Parts(output / PARTS, total, size, ".safetensors")
    self._to_join = list(range(jax.process_index(), count, jax.process_count()))
    self._at = 0  # the shard up to which this process has come

  def _items(self, number: int) -> range:
    return range(self._total)[number * self._shard_size : (number + 1) * self._shard_size]

  def _shards_of(self, part: range) -> range:
    """The numbers of the shards into which a part reaches."""
    return range(part.start // self._shard_size, (part.stop - 1) // self._shard_size + 1)

  def _there(self) -> list[int]:
    """The shards that are there."""
    names = {file.name for file in self._output.iterdir()} if self._output.is_dir() else set()
    return [number for number, path in enumerate(self.paths) if path.name in names]

  def _joined(self) -> list[range]:
    return list(map(self._items, self._there()))

  def begin(self) -> None:
    """Makes the folder, and removes what processes that were killed left; for the first one."""
    self._parts.folder.mkdir(parents=True, exist_ok=True)
    if not is_url(self._output):
      remove_partial(self._output)
      remove_partial(self._parts.folder)

  def missing(self) -> int:
    """The number of pictures that are in no shard."""
    return self._total - sum(map(len, self._joined()))

  def room(self) -> int:
    """For how many pictures there must be room, beside what is there, at the worst moment.

    Each is in a part or in a shard. In both are those of the shards that are being joined, one a
    process, and of parts that reach into several shards: they stay until all of these are there,
    while other processes may be slow to join theirs.
    """
    missing = self._parts.missing(self._joined())
    both = [part for part in (*missing, *self._parts.there()) if len(self._shards_of(part)) > 1]
    twice = jax.process_count() * self._shard_size + sum(map(len, both))
    return sum(map(len, missing)) + min(self.missing(), twice)

  def lost(self) -> int:
    """How many pictures the shards that are there note as unreadable."""
    opened = [shards.Shard(self.paths[number]) for number in self._there()]
    return sum(len(shard.note.skipped) for shard in opened if shard.note)

  def mine(self) -> list[range]:
    """This process's of the parts that are missing."""
    return [part for (part,) in shared_out(lambda: self._parts.missing(self._joined()), 1)]

  def add(
    self,
    part: range,
    columns: Mapping[str, np.ndarray],
    labels: np.ndarray,
    skipped: Mapping[int, str],
  ) -> None:
    """Writes a part: columns [n, h, w, Z] and labels [n]; `skipped` names rows without a picture.

    InputError if the columns have numbers that are not finite.
    """
    path = self._parts.path(part)
    if bad := [name for name, x in columns.items() if not np.isfinite(x.astype(np.float32)).all()]:
      raise InputError(f"{', '.join(bad)} for {path} are not finite; train the tokenizer anew.")
    tensors = {**columns, shards.LABELS: labels}
    write_safetensors(path, tensors, {_SKIPPED: json.dumps([*skipped.items()])})
    if (at := part.start // self._shard_size) > self._at:  # once for each shard, since it lists
      self._at = at
      self._join()

  def join(self) -> None:
    """Joins all shards; all processes come here when they have no more to add."""
    processes.wait_for_all()
    mine = {*self._to_join}
    others = [self._items(number) for number in range(len(self.paths)) if number not in mine]
    self._parts.check_complete([*others, *self._joined()])
    self._join()
    processes.wait_for_all()

  def finish(self) -> None:
    """Removes what is left of parts; for the first process, when the store is whole."""
    remove_folder(self._parts.folder)

  def _join(self) -> None:
    """Joins this process's next shards, as far as all of their parts are there."""
    while self._to_join:
      number = self._to_join[0]
      items = self._items(number)
      if not self.paths[number].exists():
        if self._parts.missing([range(items.start), range(items.stop, self._total)]):
          return
        self._write(number)
      self._to_join.pop(0)
      self._remove_parts(number)

  def _remove_parts(self, number: int) -> None:
    """Removes those of a shard, but of parts that reach into others only where these are there."""
    there = {*self._there()}
    for part in self._parts.there():
      if number in (reached := self._shards_of(part)) and there.issuperset(reached):
        self._parts.path(part).unlink(missing_ok=True)

  def _write(self, number: int) -> None:
    """Writes a shard from its parts."""
    pieces: list[dict[str, np.ndarray]] = []
    skipped: list[str] = []
    for path, some in self._parts.in_order(self._items(number)):
      try:
        tensors, metadata = shards.read(path, whole=True)
        unreadable = dict(json.loads(metadata[_SKIPPED]))
        rows = np.arange(len(tensors[shards.LABELS]))[some]
        kept = rows[~np.isin(rows, [*unreadable])]
        pieces.append({name: x[kept] for name, x in tensors.items()})
      except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and start again.") from error
      skipped += [unreadable[row] for row in rows.tolist() if row in unreadable]
    # Popped, so that little is in memory twice.
    columns = {name: np.concatenate([x.pop(name) for x in pieces]) for name in [*pieces[0]]}
    labels = columns.pop(shards.LABELS)
    shards.write_shard(self.paths[number], columns, labels, skipped)
