"""Files are written whole or not at all: a temporary name beside the target, fsync, rename."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
  """A binary file that takes the name `path` only when the block has ended without an error.

  Args:
    path: the final name; its folder is made. What stood there stays until the new file is whole.

  Yields:
    The open file.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
  try:
    with temporary.open("wb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
  """Writes `value` as indented JSON, atomically; NaN is refused, since JSON has none."""
  with atomic_file(path) as file:
    file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())
