"""Files are written whole or not at all: a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
  """A temporary name for a file that takes its own when the block has ended without an error.

  Args:
    path: the final name; its folder is made. What stood there stays until the new file is whole.

  Yields:
    The name to write to.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    yield temporary
    with temporary.open("rb+") as file:
      os.fsync(file.fileno())
    temporary.chmod(0o666 & ~_umask())  # libraries that write by a name make it private
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
  """A binary file that takes the name `path` only when the block has ended without an error.

  Args:
    path: as for `atomic_path`.

  Yields:
    The open file.
  """
  with atomic_path(path) as temporary, temporary.open("wb") as file:
    yield file


def _umask() -> int:
  mask = os.umask(0o077)
  os.umask(mask)
  return mask


def write_safetensors(
  path: Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
  """Writes arrays, atomically; OSError where the disk is full, as of any other file."""
  # As they lie in memory, where ascontiguousarray would give a scalar an axis.
  contiguous = {name: np.asarray(x, order="C") for name, x in tensors.items()}
  with atomic_path(path) as temporary:
    try:
      save_file(contiguous, temporary, metadata)
    except SafetensorError as error:
      if "os error 28" not in str(error) and "No space left" not in str(error):
        raise
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error


def write_json(path: Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically; NaN is refused, since JSON has none."""
  with atomic_file(path) as file:
    file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
