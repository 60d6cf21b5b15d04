"""The command line: how commands are called, and what is wrong with their flags, in one line."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from launch.engine.circumstances import own_program
from vavae_jax.common.errors import InputError, printable
from vavae_jax.common.files import at_home, local_place
from vavae_jax.common.keys import Key

# Flags defined here belong to the command that asks for them.
flags.disclaim_key_flags()


def _after_vavae() -> int:
  """Which word follows `vavae` in the line that started this process; 0 if it was not called so."""
  names = [Path(word).name for word in sys.orig_argv[:2]]
  return names.index("vavae") + 1 if "vavae" in names else 0


def command(name: str, *options: str) -> str:
  """The line that calls the command `launch.NAME` as this process was called."""
  words = ["vavae", name] if _after_vavae() else ["python", "-m", f"launch.{name}"]
  return " ".join(map(quoted, (*words, *options)))


def own_command() -> str:
  """The words that call this process's command, without its options."""
  if at := _after_vavae():
    return " ".join(["vavae", *sys.orig_argv[at : at + 1]])
  return " ".join(["python", *own_program()])


def resume_command() -> str:
  """The command line that started this process, usable from any folder."""
  words = [sys.executable, *own_program(), *sys.argv[1:]]
  try:
    folder = os.getcwd()
  except OSError:  # it was deleted, or its disk is gone
    folder = os.sep
  return f"cd {quoted(folder)} && {' '.join(map(quoted, words))}"


def quoted(word: str) -> str:
  """A word for a shell's command line; of other characters than printable ones by their bytes."""
  if word.isprintable():
    return shlex.quote(word)
  plain = {c: c for c in word if c.isprintable() and c not in "\\'"}
  escaped = {c: "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in {*word}}
  return f"$'{''.join((escaped | plain)[c] for c in word)}'"


def expanded(word: str) -> str:
  """--flag=~/path with the home folder, which shells put in only at the beginning of a word.

  Of --config=configs/NAME.py:ARGUMENT where the recipes are installed, away from a checkout.
  """
  flag, _, value = word.partition("=")
  if flag.startswith("-") and value:
    value = at_home(value)
    word = f"{flag}={value}"
  path, colon, argument = value.partition(":")
  if flag.lstrip("-") != "config" or not path.startswith("configs/") or os.path.exists(path):
    return word
  package = importlib.util.find_spec("configs")
  installed = Path((package and package.origin) or "").parent / path.removeprefix("configs/")
  return f"{flag}={installed}{colon}{argument}" if installed.is_file() else word


class _LocalPlace(flags.ArgumentParser):
  def parse(self, argument: str) -> Path:
    if not argument:
      raise InputError("it is empty; give a path")
    return local_place(argument)


def define_output(name: str, default: str | None, text: str, *, required: bool = False) -> None:
  """Defines a flag for the path of an output, which a bucket's cannot be."""
  flags.DEFINE(_LocalPlace(), name, default, text, required=required)


def parse_flags(argv: list[str], subcommand: str = "") -> list[str]:
  """The command line without its flags; a wrong flag or configuration file ends the process."""
  try:
    words = flags.FLAGS(argv)
    for flag in (flags.FLAGS[name] for name in flags.FLAGS):
      key = flag.name.startswith("config.")  # some may be empty: their table says so
      if flag.present and flag.value == "" != flag.default and not key:
        raise InputError(f"--{flag.name} is empty")
    return words
  except (flags.Error, InputError, TypeError) as error:
    message = InputError(" ".join(_explained(error, argv).split()))
  except SystemExit:  # of --help, which absl takes for a failure
    sys.exit(0)
  page = f"{own_command()} {subcommand}".strip() + " --help"
  page = "docs/configuration.md" if "--config." in str(message) else page
  refuse(f"{str(message).removesuffix('.')}; see {page}")


def refuse(message: str) -> NoReturn:
  """Ends the process with a message about its command line."""
  print(printable(f"error: {message}"), file=sys.stderr)
  sys.exit(2)


def _explained(error: Exception, argv: list[str]) -> str:
  """What absl finds wrong, in our words."""
  text = str(error)
  if missing := re.findall(r"flag --([\w.]+)=None: Flag --\1 must have a value", text):
    listed = " and ".join(f"--{name}" for name in missing)
    example = " ".join(_example(name) for name in missing)
    return f"{listed} {'is' if len(missing) == 1 else 'are'} missing; give {example}"
  if isinstance(error, flags.UnrecognizedFlagError):
    near = re.search(r"Did you mean: (.*?) \?", text)
    hint = f"; did you mean --{near[1].replace(', ', ' or --')}?" if near else ""
    return f"there is no flag --{error.flagname}{hint}"
  if found := re.fullmatch(r"Missing value for flag --?([\w.]+)", text):
    return f"--{found[1]} has no value; give {_example(found[1])}"
  name = (re.match(r"flag --([\w.]+)=", text) or ("", ""))[1]
  if name not in flags.FLAGS:
    return text
  return _unfit(name, text.removeprefix(f"flag --{name}="), argv)


def _unfit(name: str, text: str, argv: list[str]) -> str:
  """A value that a flag cannot have, where absl says "VALUE: REASON"."""
  pairs = zip(argv, [*argv[1:], ""], strict=True)
  values = [word.partition("=")[2] or after for word, after in pairs]
  given = max((x for x in values if text.startswith(f"{x}: ")), key=len, default="")
  if "as a ConfigDict" in text:  # whose parser tells nothing else
    return f"--{name} is a section; give one of its keys, --{name}.KEY={given}"
  needed = _needed(flags.FLAGS[name].parser)
  return f"--{name} is {quoted(given)}; {needed}" if needed else f"--{name}={text}"


def _example(name: str) -> str:
  """A flag with a value, as the text of --help has it; else with what the value is."""
  found = re.search(rf"--{name}=\S+", str(sys.modules["__main__"].__doc__))
  return found[0] if found else f"--{name}=VALUE ({flags.FLAGS[name].help.rstrip('.')})"


def _needed(parser: Any) -> str:
  """What a parser takes, as `Key.needed` says it; "" for a parser with errors of its own."""
  if isinstance(parser, flags.EnumParser):
    return Key("", tuple(parser.enum_values)).needed()
  if isinstance(parser, flags.BooleanParser):
    return Key(False).needed()
  if not isinstance(parser, flags.IntegerParser | flags.FloatParser):
    return ""
  low, high = parser.lower_bound, parser.upper_bound
  least = "(-inf" if low is None else f"[{low}"
  most = "inf)" if high is None else f"{high}]"
  within = "" if low is None and high is None else f"{least}, {most}"
  return Key(0 if isinstance(parser, flags.IntegerParser) else 0.0, within).needed()
