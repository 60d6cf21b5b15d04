"""All commands by one name: `vavae COMMAND`, which is `python -m launch COMMAND`.

Every command is a module of its own, `python -m launch.COMMAND`, and has a --help.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from pathlib import Path

from launch.engine import output

COMMANDS = {
  "run": "launch.quickstart",
  **{
    name: f"launch.{name}"
    for name in (
      *("prepare", "train", "encode", "sample", "evaluate", "convert", "reproduce"),
      *("export", "studio"),
    )
  },
  **{
    name: f"launch.lab.{name}"
    for name in ("benchmark", "plan", "equivalence", "dilemma", "beyond", "cells")
  },
}


def main() -> None:
  """Runs the command that the first word names, or lists all."""
  output.keep_harmless()
  word = sys.argv[1] if len(sys.argv) > 1 else "--help"
  if word in ("--help", "-h", "--helpfull", "help"):
    print(_listed())
    return
  module = COMMANDS.get(word, f"launch.{word}")  # or by the module's own name
  if module not in COMMANDS.values():
    near = difflib.get_close_matches(word, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
    print(f"error: no command {word!r}; {hint}", file=sys.stderr)
    sys.exit(2)
  del sys.argv[1]
  runpy.run_module(module, run_name="__main__", alter_sys=True)


def _listed() -> str:
  rows = "\n".join(f"  {name:<12} {_first_line(module)}" for name, module in COMMANDS.items())
  return f"usage: vavae COMMAND [--help]\n\n{rows}"


def _first_line(module: str) -> str:
  """Of a command's docstring, which is read and not run."""
  path = Path(__file__).parent.joinpath(*module.split(".")[1:])
  path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
  return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
  main()
