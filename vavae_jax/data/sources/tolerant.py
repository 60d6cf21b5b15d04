"""Pictures that cannot be read: named, counted, and replaced by a neighbour, up to a limit."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from PIL import Image

from vavae_jax.common.errors import InputError
from vavae_jax.data.sources.base import Source, Unreadable


class Tolerant(Source):
  """A source in which the next readable picture replaces an unreadable one.

  At most `limit` may be unreadable in one process; one more is an error. If the caller uses only
  some records, `among` has their ascending indices, so that no other replaces one.
  """

  def __init__(self, source: Source, limit: int, among: np.ndarray | None = None):
    self._source, self._limit = source, limit
    self._among = np.arange(len(source)) if among is None else among
    self.class_names, self.has_names = source.class_names, source.has_names
    self.bad: dict[int, str] = {}

  def __len__(self) -> int:
    return len(self._source)

  def picture(self, index: int) -> tuple[Image.Image, int]:
    """As `Source` says, of this record or of the next readable one."""
    place = int(np.searchsorted(self._among, index))
    for step in range(len(self._among)):
      candidate = int(self._among[(place + step) % len(self._among)])
      if candidate in self.bad:
        continue
      try:
        return self._source.picture(candidate)
      except Unreadable as error:
        self.note(candidate, error)
    raise InputError("Not one picture can be read.")

  def note(self, index: int, error: Unreadable) -> None:
    """Counts an unreadable picture and says so, once; raises InputError beyond the limit."""
    if index in self.bad:
      return
    self.bad[index] = str(error)
    print(f"skipped ({len(self.bad)} of at most {self._limit}): {error}", file=sys.stderr)
    if len(self.bad) > self._limit:
      raise InputError(
        f"{len(self.bad)} pictures cannot be read, more than config.data.max_corrupt = "
        f"{self._limit}; the last is {self.name(index)}. Repair them, or allow more."
      )

  def encoded(self, index: int) -> tuple[bytes, int]:
    return self._source.encoded(index)

  def name(self, index: int) -> str:
    return self._source.name(index)

  def keys(self) -> Sequence[str]:
    return self._source.keys()

  def sizes(self) -> np.ndarray:
    return self._source.sizes()

  def identity(self) -> str:
    return self._source.identity()

  def listing(self) -> str:
    return self._source.listing()
