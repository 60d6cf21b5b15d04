"""Commands that have a new name: the old one says so, and does the work for one more release."""

from __future__ import annotations

import runpy
import sys


def forward(old: str, new: str) -> None:
  """Runs a command under its new name.

  Args:
    old: the module that the person named, such as "launch.compile".
    new: the module that does it now, and the word of its subcommand where it has one.
  """
  print(
    f"{old} moved: use python -m {new}. The old name goes with the next release.", file=sys.stderr
  )
  module, *words = new.split()
  sys.argv[1:1] = words
  runpy.run_module(module, run_name="__main__", alter_sys=True)
