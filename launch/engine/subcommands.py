"""Commands with subcommands: `python -m launch.evaluate generation --workdir=...`.

argparse chooses the subcommand. Its flags are absl's, as every command's, and only its own exist.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from absl import flags

from launch.engine import command_line, console

# Flags defined here belong to the command that asks for them.
flags.disclaim_key_flags()


class Subcommand(NamedTuple):
  """One subcommand; see `console.run_command`."""

  text: str  # for its --help; the first line also stands in the command's
  main: Callable[[], None]
  define_flags: Callable[[], None]
  config: str | None = None
  several: bool = False


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    command_line.refuse(f"{message}; see {self.prog} --help")


def run(text: str, subcommands: Mapping[str, Subcommand]) -> None:
  """Runs the subcommand that the command line names and ends the process; `text` is for --help."""
  parser = _Parser(
    prog=command_line.own_command(),
    description=text,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="Each subcommand has a --help of its own.",
    allow_abbrev=False,
  )
  names = parser.add_subparsers(dest="name", title="subcommands", metavar="NAME")
  for name, subcommand in subcommands.items():
    names.add_parser(name, help=subcommand.text.splitlines()[0], add_help=False)
  given, options = parser.parse_known_args()
  if given.name is None:
    parser.error(f"NAME is missing; choose one of {', '.join(subcommands)}")
  chosen = subcommands[given.name]
  sys.modules["__main__"].__doc__ = chosen.text  # which absl shows for --help
  others = {*flags.FLAGS}
  chosen.define_flags()
  for name in {*flags.FLAGS} - others:
    flags.declare_key_flag(name)  # wherever it is defined, it is this command's
  console.run_command(
    chosen.main,
    config=chosen.config,
    argv=[sys.argv[0], *options],
    subcommand=given.name,
    several=chosen.several,
  )
