"""What a compiled program's HLO text says: traffic between devices, and bytes that kernels move.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it
runs, which for a scan is the constant that its condition compares with. If a loop keeps an array
for all layers, only the layer that a kernel touches counts.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
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
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
# Computations of a call, the branches of a condition, the body of a loop.
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_NOTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# They name memory and move nothing.
_FREE = frozenset(
  (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "partition-id", "replica-id", "opt-barrier"),
  )
)
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATE = "dynamic-update-slice"


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Collectives of one kind; bytes are of the results on one device, of all runs together."""

  ops: int
  runs: int
  bytes: int


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One operation of a program for a GPU."""

  name: str
  operation: str  # its place in the model
  runs: int  # in one run of the program
  bytes: int  # read and written by each


class _Instruction(NamedTuple):
  name: str
  code: str
  shapes: str  # of the results
  size: int  # of the results, bytes
  operands: list[str]
  attributes: str
  root: bool

  @property
  def called(self) -> list[str]:
    """The computations that it runs, but for a loop's condition."""
    found = (several or one for several, one in _CALLED.findall(self.attributes))
    return [word.strip().lstrip("%") for words in found for word in words.split(",")]


_Body = dict[str, _Instruction]  # the instructions of a computation by name


def collectives(text: str) -> dict[str, Traffic]:
  """The collectives of a program by kind; `text` is its `compiled.as_text()`."""
  bodies, entry = _parsed(text)
  runs_of = _times(bodies, entry)
  # One operation may be in several computations: pieces of it run beside other work.
  found: dict[tuple[str, str], tuple[int, int]] = {}
  for computation, body in bodies.items():
    for x in body.values():
      kind = x.code.removesuffix("-start")
      if kind in KINDS and runs_of.get(computation):
        channel = _CHANNEL.search(x.attributes)
        key = (kind, channel[1] if channel else x.name)
        starts = kind != x.code
        sizes = _sizes(x.shapes, scalars=not starts)  # a scalar counts asynchronous operations
        if starts and kind != "all-reduce":
          sizes = sizes[len(sizes) // 2 :]  # such an operation lists its inputs before its results
        here = (runs_of[computation], sum(sizes))
        found[key] = max(found.get(key, (0, 0)), here)
  of_kind: dict[str, list[tuple[int, int]]] = defaultdict(list)
  for (kind, _), here in found.items():
    of_kind[kind].append(here)
  return {
    kind: Traffic(len(ops), sum(runs for runs, _ in ops), sum(runs * size for runs, size in ops))
    for kind in KINDS
    if (ops := of_kind.get(kind))
  }


def kernels(text: str) -> list[Kernel]:
  """The kernels of a program for a GPU, largest first; `text` is its `compiled.as_text()`.

  Of a condition only the branch that moves most counts. Bytes that one kernel writes and the next
  reads count twice, though caches may serve them.
  """
  bodies, entry = _parsed(text)

  def within(name: str, runs: int) -> Iterator[Kernel]:
    for x in bodies[name].values():
      if x.code == "while":
        yield from within(x.called[-1], runs * _trips(x, bodies))
      elif x.code in ("call", "async-start"):
        yield from within(x.called[0], runs)
      elif x.code == "conditional":
        yield from max((list(within(branch, runs)) for branch in x.called), key=moved)
      elif x.code not in _FREE and not x.code.endswith(("-done", "-update")):
        source = _OP_NAME.search(x.attributes)
        yield Kernel(x.name, source[1] if source else x.code, runs, _moved(x, bodies[name], bodies))

  return sorted(within(entry, 1), key=lambda kernel: -kernel.runs * kernel.bytes)


def moved(found: Iterable[Kernel]) -> int:
  """Bytes that kernels read and write in one run of the program."""
  return sum(x.runs * x.bytes for x in found)


def grouped(found: Sequence[Kernel]) -> list[Kernel]:
  """Joins kernels that differ only by the number in their name, such as those of each layer."""
  runs: dict[tuple[str, str, int], int] = defaultdict(int)
  for x in found:
    runs[re.sub(r"[.\d]+$", "", x.name), x.operation, x.bytes] += x.runs
  together = [Kernel(name, operation, n, size) for (name, operation, size), n in runs.items()]
  return sorted(together, key=lambda x: -x.runs * x.bytes)


def _parsed(text: str) -> tuple[dict[str, _Body], str]:
  """The computations by name, and the name of the entry computation."""
  bodies: dict[str, _Body] = {}
  entry, current = "", ""
  for line in text.splitlines():
    if line and not line[0].isspace() and (head := _HEAD.match(line)):
      current = head[2]
      bodies[current] = {}
      entry = current if head[1] else entry
    elif current and (match := _INSTRUCTION.match(line)):
      root, name, shapes, code, operands, rest = match.groups()
      given = [operands] if code in ("parameter", "constant") else _NAME.findall(operands)
      bodies[current][name] = _Instruction(
        name, code, shapes, sum(_sizes(shapes)), given, rest or "", bool(root)
      )
  return bodies, entry


def _times(bodies: dict[str, _Body], entry: str) -> dict[str, int]:
  """How often each computation runs in one run of the program."""
  found: dict[str, int] = defaultdict(int)

  def visit(name: str, factor: int) -> None:
    if factor <= found[name]:
      return  # visited already, by a caller that runs it as often
    found[name] = factor
    for x in bodies.get(name, {}).values():
      if called := x.called:
        count = _trips(x, bodies) if x.code == "while" else 1
        for inner in called:
          visit(inner, factor * count)

  visit(entry, 1)
  return found


def _trips(loop: _Instruction, bodies: dict[str, _Body]) -> int:
  """How often a loop runs: XLA's note, or the constant that its counter is compared with."""
  if noted := _NOTED.search(loop.attributes):
    return int(noted[1])
  condition = _CONDITION.search(loop.attributes)
  body = bodies.get(condition[1], {}) if condition else {}
  limits = [x.operands[0] for x in body.values() if x.code == "constant" and "s32[]" in x.shapes]
  return max((int(limit) for limit in limits if limit.isdigit()), default=1)


def _sizes(shapes: str, scalars: bool = True) -> list[int]:
  """Bytes of each array in the text of a shape, or of a tuple of them."""
  return [
    math.prod(int(dim) for dim in dims.split(",") if dim) * _BYTES.get(dtype, 4)
    for dtype, dims in _SHAPE.findall(shapes)
    if scalars or dims
  ]


def _moved(x: _Instruction, body: _Body, bodies: dict[str, _Body]) -> int:
  """Bytes that an instruction of `body` reads and writes."""
  read = [body[name].size if name in body else 0 for name in x.operands]
  if x.code in _SLICES:
    return 2 * x.size
  if x.code == _UPDATE:
    return 2 * read[1]
  if x.code != "fusion":
    return sum(read) + x.size
  inner = bodies[x.called[0]]
  for y in inner.values():
    if y.code == "parameter":
      number = int(y.operands[0])
      read[number] = min(read[number], _read_of(y.name, inner))
  return sum(read) + _written_of(next(y for y in inner.values() if y.root), inner)


def _read_of(name: str, body: _Body) -> int:
  """Bytes of an array that a fusion reads; only the slices, where it takes slices."""
  size = 0
  for x in body.values():
    if name not in x.operands:
      continue
    if x.code == "bitcast":
      size += _read_of(x.name, body)
    elif x.code in _SLICES and x.operands[0] == name:
      size += x.size
    elif x.code == _UPDATE and x.operands[0] == name:
      continue  # written in place
    else:
      return body[name].size
  return size


def _written_of(x: _Instruction, body: _Body) -> int:
  """Bytes that a fusion writes; only the update, where it updates an array in place."""
  if x.code == "tuple":
    return sum(_written_of(body[name], body) for name in x.operands)
  if x.code == "bitcast":
    return _written_of(body[x.operands[0]], body)
  return body[x.operands[1]].size if x.code == _UPDATE else x.size
