"""The operations of a compiled program: what each costs, and which part of the model made it.

The TPU compiler notes an estimate of cycles in each operation, but not in copies beside other work,
in collectives and in Pallas kernels. Of a Pallas kernel the schedule's cycles count instead, and
the cost that it declares.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from launch.lab.plan import costs, hlo
from launch.lab.plan.hlo import Body, Frame, Instruction, Program

_OP_NAME = re.compile(r'op_name="([^"]*)"')
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_DECLARED = re.compile(r'"cost_estimate":\{([^}]*)\}')
_COST = re.compile(r'"(\w+)":"(\d+)"')
_PALLAS = 'custom_call_target="tpu_custom_call"'
_OURS = re.compile(r"/(?:vavae_jax|lightningdit_jax|launch|configs|tests)/")
_NUMBER = re.compile(r"(?:\.clone|\.\d+|\.remat\d*)+$")
# A fusion of these changes a layout and computes nothing.
_MOVES = frozenset(("copy", "transpose", "reshape", "bitcast-convert", "fusion", *costs.FREE))
_STACKS = re.compile(r"while/body/(?:\w+\(?)?dynamic_|dynamic_(?:update_)?index_in_dim")
_NORM = re.compile(r"[Nn]orm|modulate|_compute_stats|_normalize")
_OPTIMIZER = re.compile(r"/optax/|/optimizer\.py$|/functional\.py$")  # and the check for NaN
# Networks beside the model, by the file.
_NETWORKS = {"/teachers/": "teacher", "/perceptual": "LPIPS", "/discriminator": "discriminator"}


@dataclasses.dataclass(frozen=True)
class Operation:
  """One operation of a program, or several alike; bytes, FLOPs and cycles are of each run."""

  name: str
  source: str  # function and line that made it, and what it is there
  group: str
  runs: int  # in one run of the program
  bytes: int  # from and to the device's memory
  flops: float = 0.0  # of products
  cycles: int | None = None  # the compiler's estimate
  pallas: bool = False  # a kernel: bytes and FLOPs as it declares, cycles by its schedule


def of(program: Program, scheduled: Mapping[str, int] | None = None) -> list[Operation]:
  """The operations of a program, those that move most first; `scheduled` is of `schedule.cycles`.

  Of a condition only the branch that moves most counts. Bytes that one operation writes and the
  next reads count twice, though caches may serve them.
  """

  def within(name: str, runs: int) -> Iterator[Operation]:
    body = program.bodies[name]
    for x in body.values():
      if x.code == "while":
        yield from within(x.called[-1], runs * program.trips(x, body))
      elif x.code in ("call", "async-start"):
        yield from within(x.called[0], runs)
      elif x.code == "conditional":
        yield from max((list(within(branch, runs)) for branch in x.called), key=moved)
      elif not costs.is_free(x):
        yield _operation(x, body, runs, program, scheduled or {})

  return sorted(within(program.entry, 1), key=lambda one: -one.runs * one.bytes)


def moved(found: Iterable[Operation]) -> int:
  """Bytes that operations read and write in one run of the program."""
  return sum(one.runs * one.bytes for one in found)


def joined(found: Iterable[Operation]) -> list[Operation]:
  """Joins operations that differ only by the number in their name, such as those of each layer."""
  runs: dict[Operation, int] = defaultdict(int)
  for one in found:
    runs[dataclasses.replace(one, name=_NUMBER.sub("", one.name), runs=0)] += one.runs
  together = [dataclasses.replace(one, runs=count) for one, count in runs.items()]
  return sorted(together, key=lambda one: -one.runs * one.bytes)


def is_pallas(x: Instruction) -> bool:
  """Whether an instruction is a kernel by Pallas."""
  return x.code == "custom-call" and _PALLAS in x.attributes


def identity(kernel: Instruction) -> str:
  """A kernel's name without its number, and the shapes of its results."""
  shapes = (f"{x.dtype}{list(x.dims)}" for x in kernel.arrays)
  return " ".join((_NUMBER.sub("", kernel.name), *shapes))


def _operation(
  x: Instruction, body: Body, runs: int, program: Program, scheduled: Mapping[str, int]
) -> Operation:
  place, frames = _origin(x, program)
  source = " ".join(part for part in (_where(frames), place.rpartition("/")[2] or x.code) if part)
  if "transpose(" in place:
    source += ", backward"
  group = _group(x, place, frames, program)
  size, work = costs.moved(x, body, program), costs.flops(x, body, program)
  if is_pallas(x):
    if noted := _DECLARED.search(x.attributes):
      cost = {name: int(value) for name, value in _COST.findall(noted[1])}
      size, work = cost.get("bytes_accessed", size), float(cost.get("flops", 0))
    cycles = scheduled.get(identity(x))
    return Operation(x.name, source, group, runs, size, work, cycles, pallas=True)
  noted = _CYCLES.search(x.attributes)
  return Operation(x.name, source, group, runs, size, work, int(noted[1]) if noted else None)


def _origin(x: Instruction, program: Program) -> tuple[str, list[Frame]]:
  """What made an instruction: the name in jax, and our frames, innermost first.

  A fusion stands for its product, if it has one.
  """
  inner = [y for y, _ in costs.inside(x, program)]
  products = [y for y in inner if y.code in ("convolution", "dot")]
  for y in (*products[:1], x, *inner):
    if named := _OP_NAME.search(y.attributes):
      number = _FRAME.search(y.attributes)
      frames = program.frames(int(number[1])) if number else []
      return named[1], [frame for frame in frames if frame.function != "<module>"]
  return "", []


def _where(frames: list[Frame]) -> str:
  """The innermost function of ours, but for the one through which all products go."""
  for frame in frames:
    if _OURS.search(frame.file) and not frame.file.endswith("/dense.py"):
      return f"{frame.function.replace('.<locals>', '')}:{frame.line}"
  return ""


def _group(x: Instruction, place: str, frames: list[Frame], program: Program) -> str:
  """The part of the table by source to which an instruction belongs."""
  files = " ".join(frame.file for frame in frames)
  network = next((name for part, name in _NETWORKS.items() if part in files), "")
  kind = _kind(x, place, frames, program)
  return f"{network}: {kind}" if network else kind


def _kind(x: Instruction, place: str, frames: list[Frame], program: Program) -> str:
  codes = {x.code, *(y.code for y, _ in costs.inside(x, program))}
  files = {frame.file.rpartition("/")[2] for frame in frames}
  functions = [frame.function for frame in frames]
  if x.code.removesuffix("-start") in hlo.KINDS:
    return "collectives"
  if x.code in ("copy-start", "slice-start"):
    return "copies beside other work"
  if _STACKS.search(place):
    return "scan stacks"
  if codes <= _MOVES:
    return "layout copies"
  if "attend" in functions or any("attention" in file for file in files):
    return "attention"
  if codes & {"convolution", "dot"}:
    return "products"
  if "positions.py" in files:
    return "RoPE"
  if "jvp" not in place and any(_OPTIMIZER.search(frame.file) for frame in frames):
    return "optimizer"
  if functions[:1] == ["Linear.__call__"]:
    return "biases"
  ours = [frame.function for frame in frames if _OURS.search(frame.file)]
  if any(_NORM.search(name) for name in (functions[:1] + ours[:1])):
    return "norm and modulation"
  return "other elementwise" if frames else "unnamed"
