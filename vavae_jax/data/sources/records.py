"""Encoded pictures in ArrayRecord files, as `launch.prepare` writes them.

A record is the label, four bytes of a little-endian integer, and the picture's file as it was.
Beside the files `dataset.json` has class names, counts, checksums, and the names that pictures had.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import as_oserror, atomic_path, read_note
from vavae_jax.data.sources.base import Source, Unreadable, checked_label

DESCRIPTION = "dataset.json"
_LABEL = struct.Struct("<i")
# One record a group, uncompressed: pictures are packed already, and each is read alone.
_WRITER_OPTIONS = "group_size:1,uncompressed"


class Records(Source):
  """A folder of ArrayRecord files with `dataset.json`, or a pattern of files in one."""

  def __init__(self, folder: str):
    chosen = "*"
    if not os.path.lexists(folder) and any(c in os.path.basename(folder) for c in "*?["):
      folder, chosen = os.path.split(folder)
      folder = folder or "."
    self._folder = folder
    check_path(folder)
    path = Path(folder) / DESCRIPTION
    if not os.path.isfile(path):
      raise InputError(
        f"{folder} has no {DESCRIPTION}: give a folder that python -m launch.prepare has finished."
      )
    advice = "prepare the data again"
    description = read_note(path, advice=advice, class_names=list, shards=dict, names=dict | None)
    try:
      self.class_names: list[str] = list(description["class_names"])
      shards = {str(name): int(count) for name, count in description["shards"].items()}
      # Sets of earlier versions, and those whose source has none, have no names.
      self.has_names = "names" in description
      names = {name: list(map(str, x)) for name, x in description.get("names", {}).items()}
      if self.has_names and shards != {name: len(x) for name, x in names.items()}:
        raise ValueError("as many names as pictures are needed")
    except (ValueError, TypeError, AttributeError) as error:
      raise InputError(f"{path} is damaged ({error}); {advice}.") from error
    shards = {name: count for name, count in shards.items() if fnmatch.fnmatch(name, chosen)}
    if not shards:
      raise InputError(f"{folder} has no records in files called {chosen}.")
    for name, count in shards.items():
      if Path(name).name != name or not (Path(folder) / name).is_file():
        raise InputError(f"{folder} lacks {name}: it was not copied whole.")
      found = _reader(f"{folder}/{name}", os.getpid()).num_records()
      if found != count:
        raise InputError(f"{folder}/{name} has {found} records, not {count}: copy it again.")
    self._shards = list(shards)
    self._names = [name for shard in shards for name in names.get(shard, ())]
    about = json.dumps(description | {"shards": shards}, sort_keys=True)
    self._identity = hashlib.sha256(about.encode()).hexdigest()
    self._starts = np.cumsum([0, *shards.values()])

  def __len__(self) -> int:
    return int(self._starts[-1])

  def encoded(self, index: int) -> tuple[bytes, int]:
    shard = int(np.searchsorted(self._starts, index, "right")) - 1
    reader = _reader(f"{self._folder}/{self._shards[shard]}", os.getpid())
    try:
      (record,) = reader.read([index - int(self._starts[shard])])
    except (RuntimeError, ValueError) as error:
      raise Unreadable(f"The record {self.name(index)} is damaged ({error}).") from error
    if len(record) < _LABEL.size:
      raise Unreadable(f"The record {self.name(index)} is damaged (it has no label).")
    (label,) = _LABEL.unpack(record[: _LABEL.size])
    return record[_LABEL.size :], checked_label(label, self, index)

  def name(self, index: int) -> str:
    return f"{self._folder}#{index}{f' ({self._names[index]})' if self.has_names else ''}"

  def keys(self) -> Sequence[str]:
    return self._names if self.has_names else super().keys()

  def identity(self) -> str:
    return self._identity


def check_path(path: Path | str) -> None:
  """Raises InputError for one that the library of ArrayRecord does not take."""
  if (text := str(path)).encode(errors="replace").decode() != text:
    raise InputError(f"{text}: ArrayRecord's files need a path in UTF-8; give another folder.")


@functools.cache
def _reader(path: str, process: int) -> Any:
  del process
  try:
    return array_record_module.ArrayRecordReader(path)
  except (RuntimeError, ValueError) as error:
    raise InputError(f"{path} is damaged or not an ArrayRecord file ({error}).") from error


def write_records(path: Path, records: Iterable[tuple[bytes, int]]) -> str:
  """Writes one file of (picture's file, label), whole or not at all; returns their checksum."""
  digest = hashlib.sha256()
  with atomic_path(path) as temporary, as_oserror(path):
    writer = array_record_module.ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
    for data, label in records:
      writer.write(_LABEL.pack(label) + data)
      digest.update(struct.pack("<iq", label, len(data)) + data)
    writer.close()
  return digest.hexdigest()
