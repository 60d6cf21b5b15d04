"""Runs modules, and jobs of several processes, in forks of one process, so that what all of them
import is imported once.

  python -m tests.forked FOLDER IMPORTED,... <LINES

LINES is a JSON list of command lines, each a list such as ["launch.train", "--workdir=..."]. A fork
leaves its output in FOLDER as N.out and N.err, and in N.json its exit code and the modules that it
had imported. No module of IMPORTED may start a backend or threads.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run(words: Sequence[str]) -> int:
  """The exit code of a module that runs as the command of this process."""
  sys.argv = list(words)
  sys.modules.pop(words[0], None)  # where others import it, it runs as itself all the same
  try:
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)
  except SystemExit as ended:
    return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def job(act: Callable[[int], None], count: int, *, last_dies: bool = False) -> None:
  """Runs `act(index)` as each process of a job of `count`; ends this one if one of them fails.

  Where the last one is to die by SIGKILL, the others are killed after it.
  """
  with socket.create_server(("127.0.0.1", 0)) as free:
    address = f"127.0.0.1:{free.getsockname()[1]}"
  children = []
  for index in range(count):
    children.append(os.fork())
    if not children[-1]:
      _be(index, count, address, act)
  last = _code(children.pop())
  if last_dies:
    for child in children:
      os.kill(child, signal.SIGKILL)
  codes = [*map(_code, children), last]
  if {*codes} != ({-signal.SIGKILL} if last_dies else {0}):
    sys.exit(f"{sys.argv}: exit codes {codes} of {count} processes")


def _be(index: int, count: int, address: str, act: Callable[[int], None]) -> None:
  """What one process of a job does, to its end."""
  from launch.engine import processes  # which the one that forks has imported

  if count > 1:
    os.environ.update(
      JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(count), JAX_PROCESS_ID=str(index)
    )
  try:
    _share_compiled()
    processes.start()
    act(index)
    processes.end(0, together=processes.several())
  except BaseException:
    traceback.print_exc()
  os._exit(1)


def _share_compiled() -> None:
  """Lets all processes of all jobs find in the cache what a first one has compiled.

  By jax's own names they would not, since these tell devices of a process, too.
  """
  from jax._src import cache_key

  options_of = cache_key._hash_serialized_compile_options

  def options_without_devices(digest: Any, options: Any, strip_device_assignment: bool) -> None:
    del strip_device_assignment
    options_of(digest, options, strip_device_assignment=True)

  cache_key._hash_serialized_compile_options = options_without_devices
  cache_key._hash_accelerator_config = lambda *_: None


def _code(child: int) -> int:
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
  """The command."""
  folder = Path(sys.argv[1])
  for name in sys.argv[2].split(","):
    importlib.import_module(name)
  for number, words in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if not child:
      streams = ((1, "out"), (2, "err"))
      if os.environ.get("READER") == "gone":  # as `| head -1` does
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        streams = streams[1:]
      for stream, suffix in streams:
        os.dup2(os.open(folder / f"{number}.{suffix}", os.O_WRONLY | os.O_CREAT), stream)
      code = run(words)
      try:
        sys.stdout.flush()
        sys.stderr.flush()
      except OSError:
        code = 120  # as Python ends then
      (folder / f"{number}.json").write_text(json.dumps({"code": code, "modules": [*sys.modules]}))
      os._exit(code)
    os.waitpid(child, 0)


if __name__ == "__main__":
  main()
