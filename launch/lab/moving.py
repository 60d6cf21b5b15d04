"""Commands that have a new name: the old one says so, and does the work for one more release."""

from __future__ import annotations

import runpy
import sys


def forward(old: str, new: str) -> None:
  """Runs the command `new`, a module and maybe a subcommand, and says that `old` moved there."""
  text = f"{old} moved: use python -m {new}. The old name goes with the next release."
  print(text, file=sys.stderr)
  module, *words = new.split()
  sys.argv[1:1] = words
  runpy.run_module(module, run_name="__main__", alter_sys=True)
