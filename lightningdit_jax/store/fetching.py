"""Local copies of latents that lie in a bucket or in a tar, perhaps split or packed.

They are copied once into a cache on this machine: training reads records at random, which neither a
bucket nor a packed tar can serve. The published latents of ImageNet are such a tar, in parts called
split_aa, split_ab, ...
"""

from __future__ import annotations

import fcntl
import functools
import gzip
import hashlib
import io
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from lightningdit_jax.store.latents import MANIFEST, PUBLISHED_STATISTICS, STATISTICS, LatentStore
from vavae_jax.common.addresses import url_of_data
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import (
  at_home,
  atomic_path,
  check_free,
  is_url,
  local_place,
  read_note,
  remove_partial,
  write_json,
)

# (path, bytes copied, bytes in all)
Progress = Callable[[str, int, int], None]
_FILES = (MANIFEST, STATISTICS, PUBLISHED_STATISTICS)
_BEGUN, _COMPLETE = "copied.json", "complete.json"
_PIECE = 2**22
DEFAULT_CACHE = "~/.cache/vavae_jax/latents"


@functools.lru_cache
def open_store(path: str, cache: str) -> LatentStore:
  """The latent store of a configuration, opened once; for arguments see `local_folder`."""
  return LatentStore(local_folder(path, cache))


def local_folder(path: str, cache: str = "", progress: Progress | None = None) -> Path:
  """A local folder of shards, which `LatentStore` checks: the path itself, or its copy.

  The path is a folder of shards; a .tar, .tar.gz or .tgz, or a folder with the parts of one
  (split_*, *.part*); or a URL of either, such as gs://BUCKET/latents, that fsspec opens; or
  hf:OWNER/NAME, a data set of the Hugging Face hub. Copies go into the folder `cache`, "":
  `DEFAULT_CACHE`. InputError if it cannot be reached, does not fit on the disk, or is no such
  archive.
  """
  path = url_of_data(at_home(path))
  if not is_url(path) and not _is_archive(path):
    folder = Path(path)
    if not folder.is_dir() or _has_shards(folder) or not _parts(sorted(map(str, folder.iterdir()))):
      return folder
    path = str(folder.resolve())
  elif not is_url(path):
    path = str(Path(path).resolve())
  home = local_place(cache or DEFAULT_CACHE, "config.latents.cache")
  folder = home / hashlib.sha256(path.encode()).hexdigest()[:16]
  with _locked(home / f"{folder.name}.lock"):
    try:
      entries = _entries(path)
      if not _is_copy_of(folder, entries):
        _fill(path, entries, folder, progress or (lambda *_: None))
    except InputError:
      raise
    except Exception as error:
      # The errors of the clients of buckets and of the hub have no class in common.
      if not is_url(path) and not isinstance(error, OSError | ValueError | zlib.error | EOFError):
        raise
      raise InputError(
        f"{path} could not be copied to {folder} ({error}). Complete files stay, and the same "
        "command goes on from them."
      ) from error
  return folder


def _entries(path: str) -> dict[str, list[Any]]:
  """Name -> [size, a mark that changes with the file], for each file of a path that is copied."""
  system, root = fsspec.core.url_to_fs(path)
  if not (alone := _is_archive(path)) or path.startswith("hf://"):  # whose lists alone have hashes
    found = system.ls(root, detail=True)
  else:
    found = [system.info(root)]
  marks = ("mtime", "etag", "ETag", "updated", "created", "blob_id")
  return {
    str(entry["name"]): [
      int(entry["size"] or 0),
      next((str(entry[mark]) for mark in marks if entry.get(mark)), ""),
    ]
    for entry in found
    if alone or _wanted(entry["name"]) or _is_part(entry["name"])
  }


def _is_copy_of(folder: Path, entries: dict[str, list[Any]]) -> bool:
  """Whether a copy of these files is complete; a copy of other files is deleted."""
  begun = folder / _BEGUN
  advice = f"delete the folder {folder}, and all is copied anew"
  noted = read_note(begun, advice=advice) if begun.is_file() else {}
  if folder.is_dir() and not _are_those(noted, entries):
    shutil.rmtree(folder)
  elif folder.is_dir() and noted != entries:
    write_json(begun, entries)
  return (folder / _COMPLETE).is_file()


def _are_those(noted: dict[str, Any], entries: dict[str, list[Any]]) -> bool:
  """Whether a note names these files; one of an earlier version has what lay beside them, too, and
  of the hub's no marks.
  """
  there = {
    name: noted[name] for name in noted if name in entries or _wanted(name) or _is_part(name)
  }
  return there.keys() == entries.keys() and all(
    found == [size, mark] or found == [size, ""]
    for found, (size, mark) in ((there[name], entries[name]) for name in entries)
  )


def _fill(path: str, entries: dict[str, list[Any]], folder: Path, progress: Progress) -> None:
  system, _ = fsspec.core.url_to_fs(path)
  sizes = {name: size for name, (size, _) in entries.items()}
  shards = [name for name in sizes if _wanted(name)]
  parts = sorted(sizes) if _is_archive(path) else _parts(sorted(sizes))
  _check_gap(path, parts)
  if not shards and not parts:
    raise InputError(f"{path} holds no latent shards and no parts of a tar.")
  total = sum(sizes[name] for name in shards or parts)
  folder.mkdir(parents=True, exist_ok=True)
  remove_partial(folder)
  write_json(folder / _BEGUN, entries)
  copied = sum(file.stat().st_size for file in folder.iterdir())
  why = f"for {path}; set config.latents.cache to a folder on a larger disk"
  check_free(folder, total - copied, why)
  done = 0

  def report(count: int) -> None:
    progress(path, done + count, total)

  if shards:
    for name in sorted(shards):
      with system.open(name, "rb") as source:
        _copy(source, folder / _last(name), sizes[name], report)
      done += sizes[name]
  else:
    _unpack(_Joined((system.open(name, "rb") for name in parts), report), folder, path)
  write_json(folder / _COMPLETE, {"path": path, "bytes": total})


def _unpack(stream: io.RawIOBase, folder: Path, path: str) -> None:
  """Extracts shards and statistics from a tar, read from its beginning to its end."""
  found: set[str] = set()
  buffered = io.BufferedReader(stream, _PIECE)
  packed = buffered.peek(2)[:2] == b"\x1f\x8b"
  whole: Any = gzip.GzipFile(fileobj=buffered) if packed else buffered
  try:
    with tarfile.open(fileobj=whole, mode="r|", tarinfo=_Header) as archive:
      for info in archive:
        if not info.isreg() or not _wanted(info.name):
          continue  # links are ignored, and of a name only the last part counts
        if (name := _last(info.name)) in found:
          raise InputError(f"{path} has {name} in several folders; give one set of latents.")
        source = archive.extractfile(info)
        if source is not None:
          _copy(source, folder / name, info.size, lambda _: None)
          found.add(name)
    while whole.read(_PIECE):  # up to gzip's checksum at the end
      pass
  except tarfile.TarError as error:
    raise InputError(f"{path} is not a tar, or parts of it are missing ({error}).") from error
  if not found:
    raise InputError(f"The tar {path} holds no latent shards.")


class _Header(tarfile.TarInfo):
  """A member's header; a damaged or missing one is an error, not the end of the archive."""

  @classmethod
  def fromtarfile(cls, archive: tarfile.TarFile) -> Any:
    """The next member's header."""
    try:
      return super().fromtarfile(archive)
    except tarfile.HeaderError as error:
      if type(error).__name__ == "EOFHeaderError":  # two empty blocks, as it should end
        raise
      raise tarfile.ReadError(str(error)) from error


def _check_gap(path: str, parts: list[str]) -> None:
  """Raises InputError unless the parts' suffixes follow each other."""
  ends = [match[0] for part in parts if (match := re.search(r"([a-z]+|\d+)$", _last(part)))]
  if len(parts) < 2 or len(ends) < len(parts):
    return
  digits = [[ord(c) - ord("0" if c.isdigit() else "a") for c in end] for end in ends]
  base = 10 if ends[0].isdigit() else 26
  numbers = [functools.reduce(lambda n, digit: n * base + digit, row, 0) for row in digits]
  if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
    raise InputError(f"Parts of {path} are missing; it has {', '.join(map(_last, parts))}.")


def _copy(source: IO[bytes], target: Path, size: int, progress: Callable[[int], None]) -> None:
  if target.is_file() and target.stat().st_size == size:
    return
  with atomic_path(target) as temporary:
    with temporary.open("wb") as file:
      while piece := source.read(_PIECE):
        file.write(piece)
        progress(file.tell())
    if (copied := temporary.stat().st_size) != size:
      raise InputError(f"{target.name} ended after {copied} of {size} bytes.")


class _Joined(io.RawIOBase):
  """Several files as one stream."""

  def __init__(self, files: Iterator[Any], progress: Callable[[int], None]):
    self._files, self._progress = files, progress
    self._file: Any = next(files)
    self._count = 0

  def readable(self) -> bool:
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills a buffer from the current file."""
    while True:
      data = self._file.read(len(buffer))
      if data:
        buffer[: len(data)] = data
        self._count += len(data)
        self._progress(self._count)
        return len(data)
      self._file.close()
      following = next(self._files, None)
      if following is None:
        self._file = io.BytesIO()
        return 0
      self._file = following


def _is_archive(path: str) -> bool:
  return path.endswith((".tar", ".tar.gz", ".tgz"))


def _parts(names: list[str]) -> list[str]:
  """The names that are parts of a split tar, in order."""
  return [name for name in names if _is_part(name)]


def _is_part(name: str) -> bool:
  return bool(re.search(r"^split_\w+$|\.part[-_]?(\d+|[a-z]{2})$", _last(name)))


def _wanted(name: str) -> bool:
  last = _last(name)
  return last in _FILES or (last.endswith(".safetensors") and not last.startswith("."))


def _has_shards(folder: Path) -> bool:
  return any(_wanted(file.name) for file in folder.iterdir())


def _last(name: str) -> str:
  return name.rstrip("/").rpartition("/")[2]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Lets one process of this machine copy while the others wait."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
