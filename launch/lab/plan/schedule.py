"""Cycles by the TPU compiler's schedules of instructions, which it has of Pallas kernels too.

They count loops and stalls in a kernel, but not how long it waits for the device's memory. The
compiler writes one file for operations that are equal but for their names.
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from pathlib import Path

_FLAG = "--xla_jf_dump_static_llo_profile_to="
_FOLDER = re.compile(f"{_FLAG}(\\S+)")
_ENTRY = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')


def prepare() -> None:
  """Lets the compiler write its schedules' cycles; call it before libtpu is loaded."""
  given = os.environ.get("LIBTPU_INIT_ARGS", "")
  if not _FOLDER.search(given):
    folder = tempfile.mkdtemp(prefix="schedules-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {_FLAG}{folder}".strip()


def take() -> dict[str, int]:
  """Cycles by an operation's name, of what was compiled since the last call."""
  found: dict[str, int] = {}
  named = _FOLDER.search(os.environ.get("LIBTPU_INIT_ARGS", ""))
  for file in Path(named[1]).iterdir() if named else ():
    found |= {name: int(cycles) for name, cycles in _ENTRY.findall(file.read_text())}
    file.unlink()
  return found
