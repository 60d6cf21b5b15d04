"""A compiled program as its HLO text says it: instructions, loops, traffic between devices.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it
runs, which for a scan is the constant that its condition compares with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {
  **dict.fromkeys(("pred", "s8", "u8", "f8e4m3fn", "f8e5m2"), 1),
  **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
  **dict.fromkeys(("s32", "u32", "f32"), 4),
  **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, (.*))?$")
_NAME = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\](?:\{([^}]*)\})?")
# Computations of a call, the branches of a condition, the body of a loop.
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_NOTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_INDEX = re.compile(r"index=(\d+)")
_TILE = re.compile(r"^([\d,]+):T\(([\d,]+)\)")
# The tables at the head of the text: which line of which function made an instruction.
_TABLES = ("FileNames", "FunctionNames", "FileLocations", "StackFrames")
_ENTRY = re.compile(r"(\w+)=(\d+)")


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind; bytes are of the results on one device, of all runs together."""

  ops: int
  runs: int
  bytes: int


class Array(NamedTuple):
  """One array in the text of a shape."""

  dtype: str
  dims: tuple[int, ...]
  layout: str  # order of the axes, tiles, and S(n) outside of the device's main memory

  @property
  def size(self) -> int:
    """Bytes, with what a TPU's tiles add."""
    dims = list(self.dims)
    if tiled := _TILE.match(self.layout):
      order, tile = ([int(x) for x in text.split(",")] for text in tiled.groups())
      for axis, side in zip(order, reversed(tile), strict=False):
        dims[axis] = -(-dims[axis] // side) * side
    return math.prod(dims) * _BYTES.get(self.dtype, 4)

  @property
  def in_memory(self) -> bool:
    """Whether it lies in the device's main memory, which on a TPU is not its VMEM."""
    return "S(" not in self.layout


class Frame(NamedTuple):
  """A place in the code."""

  file: str
  function: str
  line: int


class Instruction(NamedTuple):
  """One line of a computation."""

  name: str
  code: str
  arrays: tuple[Array, ...]  # the results
  operands: list[str]
  attributes: str
  root: bool

  @property
  def size(self) -> int:
    """Bytes of the results that lie in the device's memory."""
    return sum(x.size for x in self.arrays if x.in_memory)

  @property
  def called(self) -> list[str]:
    """The computations that it runs, but for a loop's condition."""
    found = (several or one for several, one in _CALLED.findall(self.attributes))
    return [word.strip().lstrip("%") for words in found for word in words.split(",")]


Body = dict[str, Instruction]  # the instructions of a computation by name


@dataclasses.dataclass(frozen=True)
class Program:
  """The computations by name."""

  bodies: dict[str, Body]
  entry: str
  tables: dict[str, dict[int, str]]

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """How often each computation runs in one run of the program."""
    found: dict[str, int] = defaultdict(int)

    def visit(name: str, factor: int) -> None:
      if factor <= found[name]:
        return  # visited already, by a caller that runs it as often
      found[name] = factor
      body = self.bodies.get(name, {})
      for x in body.values():
        if called := x.called:
          count = self.trips(x, body) if x.code == "while" else 1
          for inner in called:
            visit(inner, factor * count)

    visit(self.entry, 1)
    return found

  def trips(self, loop: Instruction, body: Body) -> int:
    """How often a loop in `body` runs: XLA's note, or the constant its counter is compared with.

    The constant is in the condition, or the loop carries it in from `body`.
    """
    if noted := _NOTED.search(loop.attributes):
      return int(noted[1])
    named = _CONDITION.search(loop.attributes)
    condition = self.bodies.get(named[1], {}) if named else {}
    limits = [_constant(x) for x in condition.values()]
    carried = body.get(loop.operands[0]) if loop.operands else None
    for x in condition.values():
      if x.code == "get-tuple-element" and carried and carried.code == "tuple":
        index = _INDEX.search(x.attributes)
        origin = body.get(carried.operands[int(index[1])]) if index else None
        while origin is not None and origin.code in ("copy", "bitcast"):
          origin = body.get(origin.operands[0])
        limits.append(_constant(origin))
    return max(limits, default=0) or 1

  def frames(self, number: int) -> list[Frame]:
    """The places that an instruction's `stack_frame_id` stands for, the innermost first."""
    found = []
    while number in self.tables["StackFrames"]:
      frame = dict(_ENTRY.findall(self.tables["StackFrames"][number]))
      place = dict(_ENTRY.findall(self.tables["FileLocations"][int(frame["file_location_id"])]))
      file = self.tables["FileNames"][int(place["file_name_id"])]
      function = self.tables["FunctionNames"][int(place["function_name_id"])]
      found.append(Frame(file, function, int(place["line"])))
      # One more than the caller's number; 1 or none where there is no caller.
      caller = int(frame.get("parent_frame_id", 0)) - 1
      if caller >= number:
        break
      number = caller
    return found


def parse(text: str) -> Program:
  """A program; `text` is its `compiled.as_text()`."""
  bodies: dict[str, Body] = {}
  tables: dict[str, dict[int, str]] = {name: {} for name in _TABLES}
  entry, current, table = "", "", ""
  for line in text.splitlines():
    if line in tables or not line.strip():
      table = line.strip()
    elif table:
      number, _, content = line.partition(" ")
      tables[table][int(number)] = content.strip('"')
    elif not line[0].isspace() and (head := _HEAD.match(line)):
      current = head[2]
      bodies[current] = {}
      entry = current if head[1] else entry
    elif current and (match := _INSTRUCTION.match(line)):
      root, name, shapes, code, operands, rest = match.groups()
      given = [operands] if code in ("parameter", "constant") else _NAME.findall(operands)
      bodies[current][name] = Instruction(
        name, code, _arrays(shapes), given, rest or "", bool(root)
      )
  return Program(bodies, entry, tables)


def collectives(program: Program) -> dict[str, Traffic]:
  """The collectives of a program by kind."""
  # One operation may be in several computations: pieces of it run beside other work.
  found: dict[tuple[str, str], tuple[int, int]] = {}
  for computation, body in program.bodies.items():
    for x in body.values():
      kind = x.code.removesuffix("-start")
      if kind in KINDS and program.runs.get(computation):
        channel = _CHANNEL.search(x.attributes)
        key = (kind, channel[1] if channel else x.name)
        starts = kind != x.code
        # A scalar counts asynchronous operations.
        sizes = [_unpadded(array) for array in x.arrays if array.dims or not starts]
        if starts and kind != "all-reduce":
          sizes = sizes[len(sizes) // 2 :]  # such an operation lists its inputs before its results
        here = (program.runs[computation], sum(sizes))
        found[key] = max(found.get(key, (0, 0)), here)
  of_kind: dict[str, list[tuple[int, int]]] = defaultdict(list)
  for (kind, _), here in found.items():
    of_kind[kind].append(here)
  return {
    kind: Traffic(len(ops), sum(runs for runs, _ in ops), sum(runs * size for runs, size in ops))
    for kind in KINDS
    if (ops := of_kind.get(kind))
  }


def _arrays(shapes: str) -> tuple[Array, ...]:
  """The arrays in the text of a shape, or of a tuple of them."""
  return tuple(
    Array(dtype, tuple(int(dim) for dim in dims.split(",") if dim), layout)
    for dtype, dims, layout in _SHAPE.findall(shapes)
  )


def _unpadded(array: Array) -> int:
  return math.prod(array.dims) * _BYTES.get(array.dtype, 4)


def _constant(x: Instruction | None) -> int:
  """An integer constant; 0 for anything else."""
  if x is None or x.code != "constant" or [(a.dtype, a.dims) for a in x.arrays] != [("s32", ())]:
    return 0
  return int(x.operands[0]) if x.operands[0].isdigit() else 0
