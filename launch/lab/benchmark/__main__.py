"""`python -m launch.lab.benchmark steps|loading|fid|parts|page --help`."""

from __future__ import annotations

import runpy
import sys

KINDS = ("steps", "loading", "fid", "parts", "page")

if __name__ == "__main__":
  if len(sys.argv) < 2 or sys.argv[1] not in KINDS:
    print(f"error: name what to measure, one of {', '.join(KINDS)}", file=sys.stderr)
    sys.exit(2)
  kind = sys.argv.pop(1)
  runpy.run_module(f"launch.lab.benchmark.{kind}", run_name="__main__", alter_sys=True)
