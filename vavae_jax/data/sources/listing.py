"""Which names in a folder or an archive are pictures, and of which class: one rule for all kinds.

Hidden are names that begin with a dot, and what systems put beside pictures; an archive's name with
".." may lead out of it. A class is the first folder that not all pictures share.
"""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np

from vavae_jax.common.errors import InputError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Thumbnails, previews and bins of macOS, Synology and other disks, and of Windows.
_SYSTEM = ("__MACOSX", "@eaDir", "#recycle", "#snapshot", "lost+found", "$RECYCLE.BIN")
# The class of pictures that lie in no class folder.
NO_CLASS = "all"


def is_hidden(name: str) -> bool:
  """Whether any part of a path, with "/" between them, is hidden."""
  return any(part.startswith(".") or part in _SYSTEM for part in name.split("/"))


class Listing:
  """Tells pictures from what is ignored, and counts the latter."""

  def __init__(self) -> None:
    self._ignored: Counter[str] = Counter()
    self._folders: set[str] = set()

  def takes(self, name: str) -> bool:
    """Whether a file's name is a picture's."""
    if ".." in name.split("/"):
      self.ignore("with .. in their path")
    elif is_hidden(name):
      self.ignore("hidden")
    elif not name.lower().endswith(EXTENSIONS):
      _, dot, ending = name.rpartition("/")[2].rpartition(".")
      self.ignore(f"ending in .{ending[:20]}" if dot else "without an ending")
      self._folders |= {name.rpartition("/")[0]} - {""}  # which an archive may not list
    else:
      return True
    return False

  def ignore(self, why: str) -> None:
    """Counts one thing that is no picture."""
    self._ignored[why] += 1

  def folder(self, name: str) -> None:
    """Notes a folder, which may turn out to be empty."""
    if not is_hidden(name):
      self._folders.add(name)

  def note(self, names: list[str], class_names: list[str]) -> str:
    """What is odd about pictures and classes, or beside them, for people; "" if nothing is."""
    parents = {name[:i] for name in names for i, c in enumerate(name) if c == "/"}
    ignored = self._ignored.most_common()
    counts = [f"{count} {why}" for why, count in ignored[:8]]
    if others := sum(count for _, count in ignored[8:]):
      counts.append(f"{others} of other kinds")
    if empty := sorted(self._folders - parents):
      counts.append(f"{len(empty)} folders without pictures, such as {empty[0]}")
    looks = [unicodedata.normalize("NFC", name).casefold() for name in class_names]
    alike = Counter(looks)
    if twins := [name for name, look in zip(class_names, looks, strict=True) if alike[look] > 1]:
      counts.append(
        f"{len(twins)} classes that differ by case or by Unicode's form alone, such as {twins[0]}"
      )
    if class_names != [NO_CLASS] and len(class_names) == 1:
      counts += _hidden_classes(names, class_names[0])
    return ", ".join(counts)


def _hidden_classes(names: list[str], class_name: str) -> list[str]:
  """Of a single class: folders that are classes but for pictures beside them, for people."""
  below = [name.partition("/")[2] for name in _below_common(names)]
  folders = sorted({name.partition("/")[0] for name in below if "/" in name})
  strays = [name for name, rest in zip(names, below, strict=True) if "/" not in rest]
  if not strays or len(folders) < 2:
    return []
  told = ", ".join(folders[:3]) + ", ..." * (len(folders) > 3)
  return [
    f"one class, {class_name}, since {strays[0]} lies beside the folders {told}; move it away if "
    "these are the classes"
  ]


def classes_of(names: list[str], where: str) -> tuple[list[str], np.ndarray]:
  """(class names, sorted; label of each picture, int32) by pictures' names.

  Without folders all pictures are of one class. InputError, naming `where`, if some are in class
  folders and some beside them.
  """
  below = _below_common(names)
  folders = [name.partition("/")[0] if "/" in name else "" for name in below]
  found = sorted(set(folders))
  if found == [""]:
    return [NO_CLASS], np.zeros(len(names), np.int32)
  if "" in found:
    stray = names[folders.index("")]
    raise InputError(
      f"In {where} there are class folders, such as {found[1]}, and pictures beside them, such as "
      f"{stray}; move these into a class folder or away."
    )
  labels = {name: label for label, name in enumerate(found)}
  # Files of text cannot hold names that are not UTF-8.
  class_names = [name.encode(errors="backslashreplace").decode() for name in found]
  return class_names, np.array([labels[folder] for folder in folders], np.int32)


def _below_common(names: list[str]) -> list[str]:
  """Names without the folders that all share, as long as there are folders below."""
  while names and all(name.count("/") > 1 for name in names):
    first = names[0].partition("/")[0]
    if any(name.partition("/")[0] != first for name in names):
      break
    names = [name.partition("/")[2] for name in names]
  return names
