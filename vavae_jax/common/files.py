"""Files are written whole or not at all: a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import functools
import hashlib
import importlib.util
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from etils.epath import gpath
from safetensors import SafetensorError
from safetensors.numpy import save, save_file

from vavae_jax.common.errors import InputError

# What reads and writes the buckets of each kind of URL.
BUCKETS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
# What `atomic_path` calls the folder of a file that is being written.
_PARTIAL = re.compile(r"\.(.*)\.\d+\.partial", re.DOTALL)
# Bytes of a name to which a dozen more can be added: systems take 255, encrypted disks fewer.
_LONG_NAME = 120
# What a person can do about what the system says of a file; of other errors we may be the cause.
ADVICE = {
  errno.ENOSPC: "free some space",
  errno.EDQUOT: "free some space of your quota",
  errno.EFBIG: "raise the limit of a file's size (ulimit -f), or choose another file system",
  errno.EIO: "look after the disk or its connection",
  errno.ESTALE: "look after the network disk",
  errno.ENOTCONN: "look after the network disk",
  errno.ETIMEDOUT: "look after the network disk",
  errno.EHOSTDOWN: "look after the network disk",
  errno.ENFILE: "close other programs, which have too many files open",
  errno.EMFILE: "raise the limit of open files (ulimit -n)",
  errno.EROFS: "choose a place that can be written",
  errno.EACCES: "change the permissions, or choose another place",
  errno.EPERM: "change the permissions, or choose another place",
  errno.ENOTDIR: "choose another place: a file is where a folder is needed",
  errno.EISDIR: "choose another place: a folder is where a file is needed",
  errno.EEXIST: "choose another place",
  errno.ENOTEMPTY: "choose another place, or empty this one",
  errno.ENAMETOOLONG: "choose a shorter name",
  errno.ELOOP: "choose a place without links that lead to themselves",
}


def is_url(path: Path | str) -> bool:
  """Whether a path is one of a bucket, such as gs://BUCKET/runs, and none of this machine."""
  return "://" in str(path)


class Place(gpath.PosixGPath):
  """A path, local or in a bucket, whose own name is never a pattern.

  etils globs a folder by the whole path, and fsspec takes the names of what it deletes or moves for
  patterns: both would find, or miss, the neighbours of a folder called lr[1e-4].
  """

  def glob(self, pattern: str) -> Iterator[Place]:
    """Entries whose name fits; of several names joined by "/", each is of a folder below."""
    name, _, below = pattern.partition("/")
    for path in self.iterdir() if self.is_dir() else ():
      if fnmatch.fnmatchcase(path.name, name):
        yield from path.glob(below) if below else [path]

  def rglob(self, pattern: str) -> Iterator[Place]:
    """Entries at any depth whose name fits."""
    for path in self.iterdir() if self.is_dir() else ():
      if fnmatch.fnmatchcase(path.name, pattern):
        yield path
      yield from path.rglob(pattern)

  def exists(self) -> bool:
    """Whether it is there by now; fsspec would keep what it once heard, but others write, too."""
    if is_url(self):
      self._backend.fs(self).invalidate_cache()
    return super().exists()

  def iterdir(self) -> Iterator[Place]:
    """The entries of the folder, likewise."""
    if is_url(self):
      self._backend.fs(self).invalidate_cache()
    return super().iterdir()

  def rmtree(self, missing_ok: bool = False) -> None:
    """Deletes the folder."""
    if not is_url(self):
      super().rmtree(missing_ok)
    elif not self._each_file(lambda system, name: system.rm_file(name)) and not missing_ok:
      raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

  def unlink(self, missing_ok: bool = False) -> None:
    """Deletes the file; in a bucket by one request."""
    if not is_url(self):
      super().unlink(missing_ok)
      return
    try:
      self._backend.fs(self).rm_file(str(self))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def rename(self, target: Path | str) -> Place:
    """Gives the folder another name."""
    if not is_url(self):
      return super().rename(target)
    length = len(self._backend.fs(self)._strip_protocol(str(self)))
    self._each_file(lambda system, name: system.cp_file(name, f"{target}{name[length:]}"))
    self.rmtree()
    return Place(target)

  def _each_file(self, act: Callable[[Any, str], None]) -> int:
    """Calls `act` with fsspec's system and each name below this folder; returns their number."""
    system = self._backend.fs(self)
    names = system.find(str(self))
    with ThreadPoolExecutor(16) as pool:
      list(pool.map(functools.partial(act, system), names))
    system.invalidate_cache()
    return len(names)


def named_files(text: str) -> list[Path]:
  """The files that a person named, sorted.

  Each name of the path is one that exists; only where there is none is it a pattern, as in
  zip:data/*.zip, and fits no hidden one.
  """
  found = [Path()]
  for name in Path(text).parts:
    found = [path for folder in found for path in _named(folder, name)]
  return [path for path in found if path.is_file()]


def _named(folder: Path, name: str) -> list[Path]:
  if os.path.lexists(folder / name):
    return [folder / name]
  if not (set(name) & set("*?[") and folder.is_dir()):
    return []
  names = sorted(fnmatch.filter(os.listdir(folder), name))
  return [folder / each for each in names if not each.startswith(".")]


def at_home(text: str) -> str:
  """A path that a person wrote, with the home folder for ~ at its beginning.

  Shells put it in only at the beginning of a word, and not into configuration files.
  """
  if text.partition("/")[0] != "~":
    return text
  if (found := os.path.expanduser(text)) == text:
    raise InputError(f"{text}: no home folder is known; set HOME, or give the whole path.")
  return found


def local_place(text: str, key: str = "") -> Path:
  """The path of an output that a person named, by a `key` of the settings if not on the command
  line; InputError for a bucket, into which it cannot go.
  """
  if is_url(text):
    raise InputError(
      f"{key}{' is ' * bool(key)}{text}: only trainings, latents, samples and evaluations are "
      "written to a bucket; give a path of this machine."
    )
  return _with_name(Path(at_home(text)))


def _with_name(path: Path) -> Path:
  """The path, which ends in a name, so that a note can stand beside it; "." and ".." do not."""
  named = path if path.name not in ("", "..") else path.resolve()
  if not named.name:
    raise InputError(f"{named} has no name; give a folder below it.")
  return named


def place(text: str) -> Path:
  """The folder that a person named: a path of this machine, or gs://..., s3://..., az://... .

  A URL becomes a `Place`, which has the methods of `pathlib.Path`. InputError for a URL of
  another kind, or one whose package is not installed.
  """
  if not is_url(text):
    return _with_name(Path(at_home(text)))
  scheme = text.split("://")[0]
  if scheme not in BUCKETS:
    raise InputError(f"{text}: {scheme}:// is not one of {', '.join(BUCKETS)}.")
  if importlib.util.find_spec(BUCKETS[scheme]) is None:
    raise InputError(f"{text} needs the package {BUCKETS[scheme]}: pip install {BUCKETS[scheme]}")
  return cast(Path, Place(text))


def hidden(path: Path, ending: str) -> Path:
  """A hidden name beside a path, .NAME.ENDING; of a long NAME its beginning and a hash."""
  return path.with_name(f".{_short(path.name)}.{ending}")


def _short(name: str) -> str:
  data = os.fsencode(name)
  if len(data) <= _LONG_NAME:
    return name
  digest = hashlib.sha256(data).hexdigest()[:16]
  return f"{data[: _LONG_NAME - 17].decode(errors='ignore')}-{digest}"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
  """A temporary name for a file that takes its own when the block has ended without an error.

  The folder of `path` is made. What stood under that name stays until the new file is whole.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In a folder, since libraries put files of their own beside the one they write.
  folder = hidden(path, f"{os.getpid()}.partial")
  folder.mkdir(exist_ok=True)
  temporary = folder / path.name
  try:
    with naming(path):
      yield temporary
      with temporary.open("rb+") as file:
        os.fsync(file.fileno())
      temporary.chmod(0o666 & ~_umask())  # libraries that write by a name make it private
      temporary.replace(path)
  finally:
    shutil.rmtree(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
  """What the system says inside of a file that it does not name, as of a full disk, is of this."""
  try:
    yield
  except OSError as error:
    if error.errno:
      error.filename = error.filename or str(path)
    raise


def remove_partial(folder: Path, name: str = "") -> None:
  """Removes what `atomic_path` leaves of a file in a folder, "": of any, when a process is killed.

  No process may be writing it.
  """
  for left in Path(folder).iterdir():
    found = _PARTIAL.fullmatch(left.name)
    if found and _short(name) in ("", found[1]):
      shutil.rmtree(left)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
  """A binary file that takes the name `path` only when the block has ended without an error.

  In a bucket, by a path of `place`, objects are there when complete anyway.
  """
  if is_url(path):
    with path.open("wb") as file:
      try:
        yield file
      except BaseException:
        file.discard()  # type: ignore[attr-defined]
        file.closed = True  # type: ignore[misc]  # else what has come so far would be the object
        raise
    return
  with atomic_path(path) as temporary, temporary.open("wb") as file:
    yield file


def _umask() -> int:
  mask = os.umask(0o077)
  os.umask(mask)
  return mask


def write_safetensors(
  path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
  """Writes arrays, atomically; OSError if the system refuses, as for other files."""
  # As they lie in memory, where ascontiguousarray would give a scalar an axis.
  contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
  if is_url(path):
    with atomic_file(path) as file:
      file.write(save(contiguous, metadata))
    return
  with atomic_path(path) as temporary, as_oserror(path):
    save_file(contiguous, temporary, metadata)


@contextlib.contextmanager
def as_oserror(path: Path) -> Iterator[None]:
  """Raises OSError if a library reports what the system said by an error of its own."""
  try:
    with naming(path):
      yield
  except InputError:
    raise
  except (SafetensorError, RuntimeError, ValueError) as error:
    for number in ADVICE:
      if os.strerror(number) in str(error) or re.search(rf"os error {number}\b", str(error)):
        raise OSError(number, os.strerror(number), str(path)) from error
    raise


def check_outputs(files: Iterable[Path] = (), folders: Iterable[Path] = ()) -> None:
  """Raises InputError where one that is to be written is there as something of the other kind."""
  for path in files:
    if path.is_dir():
      raise InputError(f"{path} is to be a file, but there is a folder; name another output.")
  for path in folders:
    if path.exists() and not path.is_dir():
      raise InputError(f"{path} is to be a folder, but there is a file; name another output.")


def remove_folder(folder: Path) -> None:
  """Deletes a folder, on a disk or in a bucket, if it is there."""
  if is_url(folder):
    Place(folder).rmtree(missing_ok=True)
  else:
    shutil.rmtree(folder, ignore_errors=True)


def check_free(folder: Path, needed: int, why: str) -> None:
  """Raises InputError where a disk lacks so many bytes; `why` says what for, and what to change.

  The folder may be yet to be made.
  """
  if is_url(folder):
    return
  folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
  if (free := shutil.disk_usage(folder).free) < needed:
    raise InputError(f"{folder} has {_size(free)} free, but {_size(needed)} are needed {why}.")


def _size(count: int) -> str:
  unit, name = (2**30, "GiB") if count >= 2**30 else (2**20, "MiB")
  return f"{count / unit:.2f} {name}"


def allow_open_files() -> None:
  """Lets this process and those it starts keep as many files open as the system allows it.

  Shards and archives stay open; many systems grant 1,024 files unless one asks for more.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = 10_240 if sys.platform == "darwin" else 2**20  # macOS says "infinity" and refuses it
  wanted = most if hard == resource.RLIM_INFINITY else min(hard, most)
  if soft != resource.RLIM_INFINITY and soft < wanted:
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def sha256_of(path: Path) -> str:
  """The checksum of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically; NaN is refused, since JSON has none."""
  with atomic_file(path) as file:
    file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_note(
  path: Path, *, advice: str = "bring back the file as it was", **kinds: Any
) -> dict[str, Any]:
  """A JSON object that `write_json` wrote and perhaps an editor saved; InputError if it is damaged.

  `kinds` has the types of values that it needs, such as `dict`; of others that it may lack, such as
  `dict | None`. `advice` says what to do about damage.
  """
  try:
    note = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    if not isinstance(note, dict):
      raise ValueError("not a JSON object")
    if wrong := [name for name, kind in kinds.items() if not isinstance(note.get(name), kind)]:
      raise ValueError(f"{', '.join(wrong)}: missing, or of another kind")
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path} is damaged ({error}); {advice}.") from error
  return {name: x for name, x in note.items() if x is not None or name not in kinds}


def _refuse_constant(name: str) -> Any:
  raise ValueError(f"{name} is no number of JSON")
