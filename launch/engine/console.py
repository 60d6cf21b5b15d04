"""Progress of a command: a bar with ETA on a terminal, lines in a log.

Also the end of every command: input errors as one line without a traceback, interrupts with the
command that resumes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

import jax
from absl import app, flags, logging
from huggingface_hub.utils import disable_progress_bars
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn
from rich.table import Table
from rich.text import Text

from launch.engine import command_line, hardware, output, processes, tracing, watchdog
from launch.engine.command_line import resume_command
from launch.engine.configuration import flat
from vavae_jax.common import errors
from vavae_jax.common.errors import InputError, printable
from vavae_jax.common.files import ADVICE, BUCKETS, allow_open_files, at_home

# Flags defined here belong to the command that asks for them.
flags.disclaim_key_flags()
T = TypeVar("T")
console = Console(highlight=False, soft_wrap=True)
SECONDS_BETWEEN_LINES = 10.0
GRADIO = "pip install 'gradio>=6,<7'"
_names: dict[str, str] = {}  # of settings in messages; see `naming`
# The packages of clients of buckets, with errors of their own.
CLIENTS = ("aiohttp", "gcsfs", "google", "s3fs", "botocore", "aiobotocore", "adlfs", "azure")


class Interrupted(BaseException):
  """A signal ended the work; no `except Exception` of a library catches it.

  It comes `together` if all processes of a job, or the only one, stop at the same place: they can
  wait for each other, and save what they did.
  """

  def __init__(self, signal_number: int, together: bool = False):
    super().__init__(f"interrupted by signal {signal_number}")
    self.exit_code = 128 + signal_number
    self.together = together


class SeveralError(InputError):
  """Several processes came to a command for one; they end together, as each of them is refused."""

  together = True


class Bar:
  """Progress of one long work: `with Bar("train", total=100) as bar: bar.update(step, loss=...)`.

  A live bar on a terminal, elsewhere a line every ten seconds; only in the first process. Units
  that an earlier run did (`start`) do not count for the ETA.
  """

  def __init__(self, name: str, total: int, start: int = 0):
    self._name, self._total, self._start, self._done = name, total, start, start
    self._show = jax.process_index() == 0
    self._live = self._show and console.is_terminal
    self._began = self._last_line = time.monotonic()
    self._values, self._told = "", -1

  def __enter__(self) -> Bar:
    if self._live:
      self._progress = Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        RemainingColumn(),
        TextColumn("{task.fields[values]}"),
        console=console,
      )
      self._task = self._progress.add_task(
        self._name, total=self._total, completed=self._start, values=""
      )
      self._progress.start()
    return self

  def update(self, done: int, **values: float) -> None:
    """Shows that `done` units are done, with the latest values of some quantities."""
    self._done = done
    if values:
      self._values = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    if self._live:
      self._progress.update(self._task, completed=done, values=self._values)
    elif self._show and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
      self._line()

  def _line(self) -> None:
    self._last_line, self._told = time.monotonic(), self._done
    elapsed = self._last_line - self._began
    rate = (self._done - self._start) / max(elapsed, 1e-9)
    eta = f"ETA {clock((self._total - self._done) / rate)}" if rate else ""
    share = 100 * self._done / max(self._total, 1)
    console.print(
      f"{self._name:<22} {share:3.0f}%  {self._done}/{self._total}  {clock(elapsed)}  {eta}  "
      f"{self._values}"
    )

  def __exit__(self, *_: object) -> None:
    if self._live:
      self._progress.stop()
    elif self._show and self._told != self._done:
      self._line()


def tracked(items: Iterable[T], name: str, total: int) -> Iterator[T]:
  """The items one by one, with a bar."""
  with Bar(name, total) as bar:
    for done, item in enumerate(items, 1):
      yield item
      bar.update(done)


def clock(seconds: float) -> str:
  """Seconds as 1:02:03 or 2:03."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextlib.contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
  """Messages and InputErrors of this block name settings as by `errors.naming`."""
  global _names
  before, _names = _names, dict(names)
  try:
    with errors.naming(names):
      yield
  finally:
    _names = before


def say(text: str) -> None:
  """Prints in the first process."""
  if jax.process_index() == 0:
    console.print(printable(errors.renamed(text, _names) if _names else text), markup=False)


def say_here(text: str) -> None:
  """Prints in this process, with its number where there are several."""
  who = f"process {jax.process_index()}: " if processes.several() else ""
  console.print(printable(f"{who}{text}"), markup=False)


def table(title: str, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
  """Prints a table in the first process."""
  if jax.process_index() == 0:
    grid = Table(title=Text(printable(title)), title_justify="left")
    for name in header:
      grid.add_column(name, overflow="fold")
    for row in rows:
      grid.add_row(*(Text(printable(cell)) for cell in row))
    console.print(grid)


def say_next(name: str, *options: str) -> None:
  """Prints the command that usually follows, as a line that can be copied."""
  say(f"next: {command_line.command(name, *options)}")


def say_studio(model: Path | str) -> None:
  """Prints the command that opens the studio on a model, and what it needs and lacks."""
  say_next("studio", f"--model={model}")
  if importlib.util.find_spec("gradio") is None:
    say(f"      the studio needs Gradio: {GRADIO}")


def number(value: float) -> str:
  """A number of three digits, or whole with commas."""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def endings() -> list[signal.Signals]:
  """The signals that end a command; a closed terminal's is not if nohup says to ignore it."""
  ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


def _interrupt(number: int, _frame: object) -> None:
  raise Interrupted(number)


def _settings() -> dict[str, Any]:
  """What all processes of a job must have in common: configuration and command line."""
  config = flags.FLAGS.config if "config" in flags.FLAGS else None
  keys = {f"config.{k}": v for k, v in flat(config.to_dict())} if config else {}
  words = (word.partition("=") for word in sys.argv[1:] if not word.startswith("--config."))
  return json.loads(json.dumps({**keys, **{k: v for k, _, v in words}}, default=str))


def _explained(error: BaseException) -> int | None:
  """Prints an expected end in one line and returns its exit code; None: it is a mistake of ours."""
  if isinstance(error, InputError):
    print(printable(f"error: {error}"), file=sys.stderr)
    return 2
  if isinstance(error, OSError) and error.errno in ADVICE:
    return _resumable(error, ADVICE[error.errno])
  if type(error).__module__.partition(".")[0] in CLIENTS:
    return _resumable(error, "look after the network, the address and your credentials")
  if isinstance(error, KeyboardInterrupt | Interrupted):
    print(printable(f"stopped; resume with: {resume_command()}"), file=sys.stderr, flush=True)
    return error.exit_code if isinstance(error, Interrupted) else 128 + signal.SIGINT
  return None


def _end(number: int, save: watchdog.Save | None) -> None:
  """Ends the process, from another thread than the main one."""
  code: int | None = None
  try:
    if save:
      save()
    raise Interrupted(number)
  except BaseException as error:
    code = _explained(error)
    if code is None:
      traceback.print_exc()
  finally:  # also where the explanation fails
    os._exit(code or 1)


def _resumable(error: BaseException, advice: str) -> int:
  """Prints the end of a run that can go on, since files are written whole or not at all."""
  text = f"error: {' '.join(str(error).split())}; {advice}, then resume with: {resume_command()}"
  print(printable(text), file=sys.stderr)
  return 2


def run_command(
  main: Callable[..., None],
  *,
  arguments: int = 0,
  config: str | None = None,
  argv: list[str] | None = None,
  subcommand: str = "",
  several: bool = False,
) -> None:
  """Runs a command's main by absl and ends the process with a message and an exit code.

  Wrong flags and input end with 2; interrupts with the resume command and 128 + signal.

  Args:
    main: takes the words of the command line beside options, at most `arguments`.
    config: default of --config.
    argv: the command line, without a subcommand's name; the process's own if None.
    subcommand: its name, for messages.
    several: whether the processes of a job can share its work; else they are refused.
  """

  def guarded(argv: list[str]) -> None:
    # Libraries log every file they touch; their warnings are enough.
    logging.set_verbosity(logging.WARNING)
    # What Pillow minds of a picture's metadata, which nobody here reads; errors are not among them.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    if not console.is_terminal:
      disable_progress_bars()  # of downloads, which would fill a log
    for name in BUCKETS.values():  # which log every retry with its traceback
      getLogger(name).setLevel("CRITICAL")
    try:
      if len(argv) > arguments + 1:
        unexpected = argv[arguments + 1]
        raise InputError(f"Unexpected argument {unexpected!r}: options begin with --, see --help.")
      if "" in argv:
        raise InputError("An argument is empty: give what it is to name, see --help.")
      for number in endings():
        signal.signal(number, _interrupt)
      allow_open_files()
      hardware.prepare()
      # Tracing makes millions of objects, few of them in cycles: looking for these among all
      # modules at every 700th object takes a seventh of a start.
      gc.freeze()
      gc.set_threshold(10_000)
      with watchdog.watching((signal.SIGINT, *endings()), _end):
        processes.start(_settings())  # jax waits there for the others, minutes where one is missing
        if processes.several() and not several:
          raise SeveralError(
            f"This command is for one process, and {jax.process_count()} were started: start it on "
            "one machine, without DISTRIBUTED=1, JAX_NUM_PROCESSES or a list in "
            "TPU_WORKER_HOSTNAMES."
          )
        with tracing.traced(say):
          main(*map(at_home, argv[1:]))
    except SystemExit:
      raise
    except BaseException as error:
      code = _explained(error)
      if code is None and not processes.several():
        raise
      if code is None:
        traceback.print_exc()
      if isinstance(error, KeyboardInterrupt | Interrupted) or processes.several():
        processes.end(code or 1, together=getattr(error, "together", False))
      sys.exit(code or 1)

  output.keep_harmless()
  tracing.define_flags()
  # Not as the flag's default, which is parsed before errors can be caught.
  argv = [command_line.expanded(word) for word in argv or sys.argv]
  if config and not any(word.split("=")[0] in ("--config", "-config") for word in argv):
    argv.insert(1, f"--config={config}")
  if "config" in flags.FLAGS:
    flags.FLAGS["config"].default_as_str = config or ""  # for --help
  parse = functools.partial(command_line.parse_flags, subcommand=subcommand)
  app.run(guarded, argv, flags_parser=parse)
