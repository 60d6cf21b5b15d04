"""`--trace=FOLDER` of every command: records how busy the devices were, and with what.

It traces a while in the middle of the work, so that waiting for data, the host or a file shows.
"""

from __future__ import annotations

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from absl import flags

from launch.engine import processes

LARGEST = 10
# Their time is that of the operations inside, which are listed themselves.
_CONTAINERS = ("while", "cond", "call")


class Operation(NamedTuple):
  """Something that a device did; times in nanoseconds."""

  device: str
  name: str
  begin: float
  end: float


class Activity(NamedTuple):
  """What the devices did while they were traced."""

  # The share of the time in which a device computed, the mean over this process's devices; the
  # virtual devices of a CPU count as one.
  busy: float
  largest: list[tuple[str, float]]  # (operation, its share of the time of all), the ten largest


def define_flags() -> None:
  """Defines the flags of `traced`, once; --helpfull shows them."""
  if "trace" in flags.FLAGS:
    return
  flags.DEFINE_string("trace", "", "Folder; records there how busy the device was.")
  flags.DEFINE_float("trace_after", 60.0, "Seconds before the trace begins.", lower_bound=0)
  flags.DEFINE_float("trace_seconds", 5.0, "Length of the trace in seconds.", lower_bound=0.1)


def read(folder: Path, seconds: float) -> Activity:
  """Reads the newest trace that jax.profiler wrote into a folder, `seconds` long.

  Nothing was busy where the profile of this kind of device has no operations.
  """
  file = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
  spent: dict[str, float] = collections.defaultdict(float)
  spans: dict[str, list[tuple[float, float]]] = {}
  cpu = jax.default_backend() == "cpu"
  for operation in _operations(file):
    if not cpu and not operation.device.startswith("/device:"):
      continue  # the host's own work
    spans.setdefault(operation.device, []).append((operation.begin, operation.end))
    if not operation.name.removeprefix("%").startswith(_CONTAINERS):
      spent[operation.name] += operation.end - operation.begin
  total = sum(spent.values())
  count = 1 if cpu else jax.local_device_count()
  busy = sum(union(each) for each in spans.values()) / 1e9 / seconds / count
  largest = sorted(spent, key=lambda name: -spent[name])[:LARGEST]
  return Activity(min(busy, 1.0), [(name, spent[name] / total) for name in largest])


def _operations(file: Path) -> Iterator[Operation]:
  for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
    for line in plane.lines:
      for event in line.events:
        # On TPUs operations have a line of their own; elsewhere a note that they are one.
        if line.name == "XLA Ops" or any(name == "hlo_op" for name, _ in event.stats):
          begin = event.start_ns
          yield Operation(plane.name, event.name, begin, begin + event.duration_ns)


def union(spans: Sequence[tuple[float, float]]) -> float:
  """How long at least one of some spans (begin, end) lasts."""
  total, until = 0.0, float("-inf")
  for begin, end in sorted(spans):
    total += max(end - max(begin, until), 0.0)
    until = max(until, end)
  return total


@contextlib.contextmanager
def traced(say: Callable[[str], None]) -> Iterator[None]:
  """Traces what runs in this block as the flags ask; `say` reports it in a line."""
  if not flags.FLAGS.trace:
    yield
    return
  folder = Path(flags.FLAGS.trace)
  if processes.several():
    folder /= f"process{jax.process_index()}"
  folder.mkdir(parents=True, exist_ok=True)  # fails now where it cannot be written
  ended = threading.Event()

  def trace() -> None:
    if ended.wait(flags.FLAGS.trace_after):
      say(f"no trace: the command ended before --trace_after={flags.FLAGS.trace_after:g} seconds")
      return
    try:
      with jax.profiler.trace(str(folder)):
        began = time.perf_counter()
        ended.wait(flags.FLAGS.trace_seconds)
        seconds = time.perf_counter() - began
      seen = read(folder, seconds)
    except (RuntimeError, OSError, ValueError) as error:
      say(f"no trace: {error}")  # the command's own work goes on
      return
    parts = ", ".join(f"{name} {share:.1%}" for name, share in seen.largest)
    say(
      f"traced {seconds:.1f} s into {folder}: the device was busy {seen.busy:.1%} of the time; "
      f"largest operations: {parts or 'none seen'}"
    )

  thread = threading.Thread(target=trace, name="trace")
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
