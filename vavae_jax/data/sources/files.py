"""Pictures in a folder, and those that come with the package."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

from PIL import Image

from vavae_jax.assets import load_emoji
from vavae_jax.common.errors import InputError
from vavae_jax.data.sources.base import (
  EXTENSIONS,
  Named,
  Unreadable,
  classes_of,
  identity_of,
)


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
    if not root.is_dir():
      raise InputError(f"The data folder {root} does not exist.")
    self._root = str(root)
    self.names = sorted(_pictures_under(self._root))
    if not self.names:
      raise InputError(
        f"The data folder {root} has no pictures: needed are class folders with files ending in "
        f"{', '.join(EXTENSIONS)}, such as {root}/cat/1.png."
      )
    self.class_names, self._labels = classes_of(self.names, self._root)

  def encoded(self, index: int) -> tuple[bytes, int]:
    try:
      return Path(self.name(index)).read_bytes(), int(self._labels[index])
    except OSError as error:
      raise Unreadable(f"The picture {self.name(index)} cannot be read ({error}).") from error

  def name(self, index: int) -> str:
    return f"{self._root}/{self.names[index]}"

  def identity(self) -> str:
    return identity_of(f"{self._root}/{name}" for name in self.names)


def _pictures_under(root: str, inside: str = "") -> list[str]:
  """Paths of pictures, relative to the root, with "/" between folders; hidden ones are left out."""
  found = []
  with os.scandir(f"{root}/{inside}") as entries:
    for entry in entries:
      if entry.name.startswith("."):
        continue
      if entry.is_dir():
        found += _pictures_under(root, f"{inside}{entry.name}/")
      elif entry.name.lower().endswith(EXTENSIONS):
        found.append(inside + entry.name)
  return found
