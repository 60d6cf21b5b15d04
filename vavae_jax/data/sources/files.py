"""Pictures in a folder, and those that come with the package."""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from vavae_jax.assets import load_emoji
from vavae_jax.common.errors import InputError
from vavae_jax.data.sources.base import Named, Unreadable, identity_of, status_of
from vavae_jax.data.sources.listing import EXTENSIONS, Listing, classes_of, is_hidden

# From the root to one folder; of a few folders that link to each other there are millions.
_MOST_WAYS = 2_000


class Embedded(Named):
  """The 1,852 Fluent emoji that the package carries, 64 px, in 9 groups."""

  def __init__(self, which: str = "emoji"):
    if which != "emoji":
      raise InputError(f"embedded:{which} is not in the package, only embedded:emoji.")
    self._images, self._labels, self.names, self.class_names = load_emoji()

  def picture(self, index: int) -> tuple[Image.Image, int]:
    return Image.fromarray(self._images[index]), int(self._labels[index])

  def encoded(self, index: int) -> tuple[bytes, int]:
    picture, label = self.picture(index)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue(), label

  def name(self, index: int) -> str:
    return self.names[index]

  def identity(self) -> str:
    return hashlib.sha256(self._images.tobytes()).hexdigest()


class Folder(Named):
  """A folder of class folders, nested as deep as one likes, or of pictures without classes."""

  def __init__(self, root: Path):
    if not os.path.isdir(root):
      what = "is no folder" if os.path.lexists(root) else "does not exist"
      raise InputError(f"The data folder {root} {what}.")
    self._root = str(root)
    listing = Listing()
    self.names = sorted(_pictures_under(self._root, listing))
    if not self.names:
      note = listing.note([], [])
      raise InputError(
        f"The data folder {root} has no pictures: needed are class folders with files ending in "
        f"{', '.join(EXTENSIONS)}, such as {root}/cat/1.png."
        f"{f' It has {note}.' if note else ''}"
      )
    self.class_names, self._labels = classes_of(self.names, self._root)
    self.beside = listing.note(self.names, self.class_names)

  def encoded(self, index: int) -> tuple[bytes, int]:
    try:
      # Not blocking: to open a pipe would wait for its other end.
      file = os.open(self.name(index), os.O_RDONLY | os.O_NONBLOCK)
      with os.fdopen(file, "rb") as opened:
        if not stat.S_ISREG(os.fstat(file).st_mode):
          raise OSError("it is not a file")
        return opened.read(), int(self._labels[index])
    except OSError as error:
      raise Unreadable(f"The picture {self.name(index)} cannot be read ({error}).") from error

  def name(self, index: int) -> str:
    return f"{self._root}/{self.names[index]}"

  def sizes(self) -> np.ndarray:
    with ThreadPoolExecutor(32) as pool:  # a network disk takes its time for each
      found = pool.map(lambda name: status_of(f"{self._root}/{name}").st_size, self.names)
      return np.array(list(found), np.int64)

  def identity(self) -> str:
    return identity_of(f"{self._root}/{name}" for name in self.names)


def _pictures_under(root: str, listing: Listing) -> list[str]:
  """Paths of pictures, relative to the root, with "/" between folders.

  Links are followed, but none to a folder on its own way.
  """
  found: list[str] = []
  ways: Counter[tuple[int, int]] = Counter()
  pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
  while pending:
    inside, above = pending.pop()
    try:
      status = os.stat(f"{root}/{inside}")
      if (here := (status.st_dev, status.st_ino)) in above:
        listing.ignore("links to a folder above")
        continue
      ways[here] += 1
      if ways[here] > _MOST_WAYS:
        raise InputError(
          f"In {root} links lead to one folder, {inside}, in more than {_MOST_WAYS:,} ways, and "
          "perhaps to each other; remove some."
        )
      with os.scandir(f"{root}/{inside}") as entries:
        for entry in entries:
          name = inside + entry.name
          linked = entry.is_symlink() and os.path.isdir(entry.path)  # which bears one to itself
          if (linked or entry.is_dir(follow_symlinks=False)) and not is_hidden(name):
            listing.folder(name)
            pending.append((f"{name}/", above | {here}))
          elif listing.takes(name):
            found.append(name)
    except OSError as error:
      raise InputError(
        f"The folder {root}/{inside} cannot be listed ({error}). Change its permissions or move it "
        "away: without it pictures would be missing, and perhaps a class."
      ) from error
  return found
