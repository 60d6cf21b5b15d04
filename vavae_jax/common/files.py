"""Files are written whole or not at all: a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save_file

from vavae_jax.common.errors import InputError

# What reads and writes the buckets of each kind of URL.
BUCKETS = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
# No room on the device, in a quota, or in the size that a file may have.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_url(path: Path | str) -> bool:
  """Whether a path is one of a bucket, such as gs://BUCKET/runs, and none of this machine."""
  return "://" in str(path)


def place(text: str) -> Path:
  """The folder that a person named: a path of this machine, or gs://..., s3://..., az://... .

  A URL becomes an `epath.Path`, which has the methods of `pathlib.Path`. InputError for a URL of
  another kind, or one whose package is not installed.
  """
  if not is_url(text):
    return Path(text)
  scheme = text.split("://")[0]
  if scheme not in BUCKETS:
    raise InputError(f"{text}: {scheme}:// is not one of {', '.join(BUCKETS)}.")
  if importlib.util.find_spec(BUCKETS[scheme]) is None:
    raise InputError(f"{text} needs the package {BUCKETS[scheme]}: pip install {BUCKETS[scheme]}")
  return cast(Path, epath.Path(text))


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
  """A temporary name for a file that takes its own when the block has ended without an error.

  The folder of `path` is made. What stood under that name stays until the new file is whole.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  # In a folder, since libraries put files of their own beside the one they write.
  folder = path.with_name(f".{path.name}.{os.getpid()}.partial")
  folder.mkdir(exist_ok=True)
  temporary = folder / path.name
  try:
    yield temporary
    with temporary.open("rb+") as file:
      os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())  # libraries that write by a name make it private
    temporary.replace(path)
  finally:
    shutil.rmtree(folder)


def remove_partial(folder: Path, name: str = "*") -> None:
  """Removes what `atomic_path` leaves of files in a folder when its process is killed.

  No process may be writing them; `name` is a pattern of their names.
  """
  for left in Path(folder).glob(f".{name}.*.partial"):
    shutil.rmtree(left)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
  """A binary file that takes the name `path` only when the block has ended without an error.

  In a bucket, by a path of `place`, objects are there when complete anyway.
  """
  if is_url(path):
    with path.open("wb") as file:
      yield file
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
  """Writes arrays, atomically; OSError if the disk is full, as for other files."""
  # As they lie in memory, where ascontiguousarray would give a scalar an axis.
  contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
  with atomic_path(path) as temporary, full_disk_as_oserror(path):
    save_file(contiguous, temporary, metadata)


@contextlib.contextmanager
def full_disk_as_oserror(path: Path) -> Iterator[None]:
  """Raises OSError if a library reports a full disk by an error of its own."""
  try:
    yield
  except (SafetensorError, RuntimeError, ValueError) as error:
    for number in DISK_FULL:
      if os.strerror(number) in str(error) or f"os error {number}" in str(error):
        raise OSError(number, os.strerror(number), str(path)) from error
    raise


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
