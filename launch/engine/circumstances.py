"""The circumstances that a measurement is reported with."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import jax
from absl import flags


def circumstances() -> dict[str, str]:
  """Command, commit, date, devices and version of jax."""
  return {
    "command": whole_command(),
    "commit": commit(),
    "date": datetime.date.today().isoformat(),
    "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    "jax": jax.__version__,
  }


def whole_command(without: Collection[str] = ()) -> str:
  """The command line that started this process, without some flags."""
  words, given = [], iter(sys.argv[1:])
  for word in given:
    name, assigned, _ = word.lstrip("-").partition("=")
    is_flag = word.startswith("-")  # a subcommand may be called as a flag is
    if not is_flag or (name not in without and name.removeprefix("no") not in without):
      words.append(word)
    elif not assigned and not flags.FLAGS[name.removeprefix("no")].boolean:
      next(given)
  return shlex.join(["python", *own_program(), *words])


def own_program() -> list[str]:
  """The words behind `python` that started this process, without their arguments."""
  spec = getattr(sys.modules["__main__"], "__spec__", None)
  return ["-m", spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]


def processor() -> str:
  """How many cores of which processor this process may use."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
  name = platform.processor() or platform.machine()
  if Path("/proc/cpuinfo").is_file():
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    name = found[1] if found else name
  return f"{cores} cores of {name}"


def commit() -> str:
  """The commit of this checkout, with "-dirty" if its code has changed since, not only its docs.

  "unknown" for an installed package.
  """
  git = ("git", "-C", str(Path(__file__).parent))
  try:
    found = [
      subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
      for words in (
        ("describe", "--always"),
        # A command that writes a page of docs after each of its parts is the same command.
        ("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs"),
      )
    ]
    return found[0] + ("-dirty" if found[1] else "")
  except (OSError, subprocess.CalledProcessError):
    return "unknown"
