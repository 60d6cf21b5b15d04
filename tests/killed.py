"""Runs a command that is killed by SIGKILL just before a file takes its final name.

  python -m tests.killed PATTERN MODULE ARGUMENTS...

All that the project writes gets its name by a rename, orbax's checkpoints too: so the kill comes at
an exact point, the worst one, where the whole work is done and nothing of it counts.
"""

from __future__ import annotations

import fnmatch
import os
import runpy
import signal
import sys
from typing import Any


def at(pattern: str) -> None:
  """Lets this process be killed just before a file gets a name of this pattern."""

  def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename" and fnmatch.fnmatch(os.fsdecode(arguments[1]), pattern):
      os.kill(os.getpid(), signal.SIGKILL)

  sys.addaudithook(watch)


def main() -> None:
  """The command."""
  pattern, module = sys.argv[1:3]
  at(pattern)
  sys.argv = sys.argv[2:]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
