"""Sizes and checksums of a checkpoint's files, so that damage is found before they are used.

`manifest.json` in a checkpoint's folder has its step, and names each of its files with size and
CRC-32. It is written before the folder takes its final name: a folder without one was never whole.
Hidden files, which systems put anywhere (.DS_Store, .nfs*), are none of it. Folders are
local or in a bucket (`gs://...`); both are a `Place`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from typing import IO

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import Place, is_url

MANIFEST = "manifest.json"
# Orbax writes these afterwards, at its commit, and reads nothing from them.
_UNLISTED = (MANIFEST, "_CHECKPOINT_METADATA", "commit_success.txt")
_CHUNK = 2**22


def seal(folder: Place, step: int) -> None:
  """Syncs the files of the checkpoint of a step to the disk and lists them in its manifest."""
  files = {}
  for name, path in _files(folder):
    with path.open("rb") as file:
      size, checksum = _checksum(file)
      _sync(path, file)
    files[name] = {"size": size, "crc32": checksum}
  with (folder / MANIFEST).open("wb") as file:
    file.write((json.dumps({"step": step, "files": files}, indent=1) + "\n").encode())
    file.flush()
    _sync(folder, file)


def damage(folder: Place, item: str = "") -> str:
  """Reads a checkpoint, or one item of it, and says how it is damaged; "" where it is sound."""
  try:
    noted = json.loads((folder / MANIFEST).read_bytes())
    wanted = {name: (note["size"], note["crc32"]) for name, note in noted["files"].items()}
    step = noted.get("step", folder.name)  # early manifests have none
  except (FileNotFoundError, NotADirectoryError):
    return f"it has no {MANIFEST}, so it was never whole"
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
    return f"{MANIFEST} cannot be read"
  if str(step) != folder.name:
    return f"it is a copy of the checkpoint of step {step}"
  under = f"{item}/" if item else ""
  there = {name: path for name, path in _files(folder) if name.startswith(under)}
  due = {name for name in wanted if name.startswith(under)}
  wrong = [f"{name} is missing" for name in sorted(due - there.keys())]
  wrong += [f"{name} does not belong there" for name in sorted(there.keys() - due)]
  for name in sorted(due & there.keys()):
    try:
      with there[name].open("rb") as file:
        size, checksum = _checksum(file)
    except OSError as error:  # of a disk that fails
      wrong.append(f"{name} cannot be read ({error.strerror})")
      continue
    if size != wanted[name][0]:
      wrong.append(f"{name} has {size} bytes instead of {wanted[name][0]}")
    elif checksum != wanted[name][1]:
      wrong.append(f"{name} has other bytes than were written")
  more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
  return "; ".join(wrong[:2]) + more


def size_of(folder: Place) -> int:
  """Bytes of a checkpoint's files."""
  return sum(path.stat().length for _, path in _files(folder))


def _files(folder: Place, prefix: str = "") -> Iterator[tuple[str, Place]]:
  """(name below `folder`, path) of all files that a manifest lists."""
  for path in sorted(folder.iterdir(), key=lambda path: path.name):
    if path.name.startswith("."):
      continue
    name = f"{prefix}{path.name}"
    if not is_url(path) and os.path.islink(path):
      raise InputError(f"{path} is a link; a checkpoint has none, and it is not followed.")
    if path.is_dir():
      yield from _files(path, f"{name}/")
    elif name not in _UNLISTED:
      yield name, path


def _checksum(file: IO[bytes]) -> tuple[int, str]:
  size, checksum = 0, 0
  while chunk := file.read(_CHUNK):
    size, checksum = size + len(chunk), zlib.crc32(chunk, checksum)
  return size, f"{checksum:08x}"


def _sync(path: Place, file: IO[bytes]) -> None:
  if not is_url(path):  # an object in a bucket is there when it is closed
    os.fsync(file.fileno())
