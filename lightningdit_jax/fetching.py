"""Latents that are not a folder of shards here: in a bucket, or in a tar, perhaps split or packed.

They are copied once into a cache on this machine and read from there: training reads records at
random, which neither a bucket nor a packed tar can serve. The published latents of ImageNet are
such a tar, in parts called split_aa, split_ab, ...
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import io
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from lightningdit_jax.latents import MANIFEST, PUBLISHED_STATISTICS, STATISTICS
from vavae_jax.errors import InputError
from vavae_jax.files import atomic_path, write_json

# (what is done, bytes of it, bytes in all)
Progress = Callable[[str, int, int], None]
_FILES = (MANIFEST, STATISTICS, PUBLISHED_STATISTICS)
_COMPLETE = "complete.json"
_PIECE = 2**22
DEFAULT_CACHE = "~/.cache/vavae_jax/latents"


def local_folder(path: str, cache: str = "", progress: Progress | None = None) -> Path:
  """The folder of shards that a path stands for, copied into the cache where it is not one.

  Args:
    path: a folder of shards; a .tar, .tar.gz or .tgz, or a folder with the parts of one (split_*,
      *.part*); or a URL of either, such as gs://BUCKET/latents, that fsspec opens.
    cache: folder for copies; "": `DEFAULT_CACHE`.
    progress: told how far a copy is.

  Returns:
    The folder; it is for `LatentStore` to say what is wrong with it.

  Raises:
    InputError: it cannot be reached, does not fit on the disk, or is no such archive.
  """
  if "://" not in path and not _is_archive(path):
    folder = Path(path)
    if not folder.is_dir() or _has_shards(folder) or not _parts(sorted(map(str, folder.iterdir()))):
      return folder
  home = Path(cache or DEFAULT_CACHE).expanduser()
  folder = home / hashlib.sha256(path.encode()).hexdigest()[:16]
  with _locked(home / f"{folder.name}.lock"):
    if not (folder / _COMPLETE).is_file():
      try:
        _fill(path, folder, progress or (lambda *_: None))
      except InputError:
        raise
      except (OSError, ValueError, ImportError, zlib.error, EOFError) as error:
        raise InputError(
          f"{path} could not be copied to {folder} ({error}). What is there stays, and the same "
          "command goes on from it."
        ) from error
  return folder


def _fill(path: str, folder: Path, progress: Progress) -> None:
  system, root = fsspec.core.url_to_fs(path)
  entries = [system.info(root)] if _is_archive(path) else system.ls(root, detail=True)
  sizes = {str(entry["name"]): int(entry["size"] or 0) for entry in entries}
  shards = [name for name in sizes if _wanted(name)]
  parts = sorted(sizes) if _is_archive(path) else _parts(sorted(sizes))
  if not shards and not parts:
    raise InputError(f"{path} holds no latent shards and no parts of a tar.")
  total = sum(sizes[name] for name in shards or parts)
  folder.mkdir(parents=True, exist_ok=True)
  there = sum(file.stat().st_size for file in folder.iterdir())
  if (free := shutil.disk_usage(folder).free) < total - there:
    raise InputError(
      f"{path} has {total / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} GiB free; set "
      "config.latents.cache to a folder on a larger disk."
    )
  if shards:
    done = 0
    for name in sorted(shards):
      with system.open(name, "rb") as source:
        told = functools.partial(_told, progress, path, done, total)
        _copy(source, folder / _last(name), sizes[name], told)
      done += sizes[name]
  else:
    told = functools.partial(_told, progress, path, 0, total)
    joined = _Joined((system.open(name, "rb") for name in parts), told)
    _unpack(joined, folder, path)
  write_json(folder / _COMPLETE, {"path": path, "bytes": total})


def _told(progress: Progress, path: str, before: int, total: int, done: int) -> None:
  progress(path, before + done, total)


def _unpack(stream: io.RawIOBase, folder: Path, path: str) -> None:
  """Shards and statistics out of a tar that is read from its beginning to its end."""
  found = 0
  try:
    with tarfile.open(fileobj=stream, mode="r|*") as archive:
      for info in archive:
        if not info.isreg() or not _wanted(info.name):
          continue  # links and paths in it lead nowhere: only the last part of a name counts
        source = archive.extractfile(info)
        if source is not None:
          _copy(source, folder / _last(info.name), info.size, lambda _: None)
          found += 1
  except tarfile.TarError as error:
    raise InputError(f"{path} is no tar, or parts of it are missing ({error}).") from error
  if not found:
    raise InputError(f"The tar {path} holds no latent shards.")


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
  """Files one after the other, as one stream."""

  def __init__(self, files: Iterator[Any], progress: Callable[[int], None]):
    self._files, self._progress = files, progress
    self._file: Any = next(files)
    self._count = 0

  def readable(self) -> bool:
    """It is."""
    return True

  def readinto(self, buffer: Any) -> int:
    """Fills a buffer as far as the current file goes."""
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
  """Those that are parts of a split tar, in order."""
  return [n for n in names if _last(n).startswith("split_") or ".part" in _last(n)]


def _wanted(name: str) -> bool:
  last = _last(name)
  return last in _FILES or (last.endswith(".safetensors") and not last.startswith("."))


def _has_shards(folder: Path) -> bool:
  return any(_wanted(file.name) for file in folder.iterdir())


def _last(name: str) -> str:
  return name.rstrip("/").rpartition("/")[2]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
  """Of several processes on this machine one copies, and the others wait."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield
