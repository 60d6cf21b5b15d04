"""The bytes that kernels of a compiled GPU program read and write in the device's memory.

XLA's own cost analysis counts the body of a loop once; here it counts as often as it runs. If a
loop keeps an array for all layers, only the layer that a kernel touches counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from launch.lab.plan import hlo

_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, (.*))?$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
# Computations of a call, the branches of a condition, the condition and body of a loop.
_INNER = re.compile(
  r"(?:calls|to_apply|condition|body|(?:true|false)_computation|branch_computations)="
  r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)
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


class Kernel(NamedTuple):
  """One operation of a program."""

  name: str
  operation: str  # its place in the model
  runs: int  # in one run of the program
  bytes: int  # read and written by each


class _Instruction(NamedTuple):
  name: str
  code: str
  sizes: list[int]  # of the results
  operands: list[str]
  attributes: str
  root: bool


def kernels(text: str) -> list[Kernel]:
  """The kernels of a program for a GPU, largest first; `text` is its `compiled.as_text()`.

  Of a condition only the branch that moves most counts. Bytes that one kernel writes and the next
  reads count twice, though caches may serve them.
  """
  bodies, entry = hlo.computations(text)
  programs = {name: _parsed(lines) for name, lines in bodies.items()}

  def within(name: str, runs: int) -> Iterator[Kernel]:
    for x in programs[name].values():
      found = (several or one for several, one in _INNER.findall(x.attributes))
      called = [word.strip().lstrip("%") for words in found for word in words.split(",")]
      if x.code == "while":
        yield from within(called[-1], runs * hlo.trips(x.attributes, bodies))
      elif x.code in ("call", "async-start"):
        yield from within(called[0], runs)
      elif x.code == "conditional":
        yield from max((list(within(branch, runs)) for branch in called), key=moved)
      elif x.code not in _FREE and not x.code.endswith(("-done", "-update")):
        source = _OP_NAME.search(x.attributes)
        yield Kernel(
          x.name, source[1] if source else x.code, runs, _moved(x, programs[name], programs)
        )

  return sorted(within(entry, 1), key=lambda kernel: -kernel.runs * kernel.bytes)


def moved(found: Iterable[Kernel]) -> int:
  """Bytes that kernels read and write in one run of the program."""
  return sum(x.runs * x.bytes for x in found)


def grouped(found: Sequence[Kernel]) -> list[Kernel]:
  """Joins kernels that differ only by the number in their name, such as those of each layer."""
  runs: dict[tuple[str, str, int], int] = {}
  for x in found:
    key = (re.sub(r"[.\d]+$", "", x.name), x.operation, x.bytes)
    runs[key] = runs.get(key, 0) + x.runs
  together = [Kernel(name, operation, n, size) for (name, operation, size), n in runs.items()]
  return sorted(together, key=lambda x: -x.runs * x.bytes)


def _parsed(lines: list[str]) -> dict[str, _Instruction]:
  found = {}
  for line in lines:
    if match := _INSTRUCTION.match(line):
      root, name, shapes, code, operands, rest = match.groups()
      names = [operands] if code == "parameter" else _NAME.findall(operands)
      sizes = hlo.sizes(shapes)
      found[name] = _Instruction(name, code, sizes, names, rest or "", bool(root))
  return found


def _moved(
  x: _Instruction, program: dict[str, _Instruction], programs: dict[str, dict[str, _Instruction]]
) -> int:
  read = [sum(program[name].sizes) if name in program else 0 for name in x.operands]
  if x.code in _SLICES:
    return 2 * sum(x.sizes)
  if x.code == _UPDATE:
    return 2 * read[1]
  called = _CALLS.search(x.attributes) if x.code == "fusion" else None
  if not called:
    return sum(read) + sum(x.sizes)
  body = programs[called[1]]
  numbers = {y.name: int(y.operands[0]) for y in body.values() if y.code == "parameter"}
  for name, number in numbers.items():
    read[number] = min(read[number], _read_of(name, body))
  return sum(read) + _written_of(next(y for y in body.values() if y.root), body)


def _read_of(name: str, body: dict[str, _Instruction]) -> int:
  """Bytes of an array that a fusion reads; only the slices, where it takes slices."""
  size = 0
  for x in body.values():
    if name not in x.operands:
      continue
    if x.code == "bitcast":
      size += _read_of(x.name, body)
    elif x.code in _SLICES and x.operands[0] == name:
      size += sum(x.sizes)
    elif x.code == _UPDATE and x.operands[0] == name:
      continue  # written in place
    else:
      return sum(body[name].sizes)
  return size


def _written_of(x: _Instruction, body: dict[str, _Instruction]) -> int:
  """Bytes that a fusion writes; only the update, where it updates an array in place."""
  if x.code == "tuple":
    return sum(_written_of(body[name], body) for name in x.operands)
  if x.code == "bitcast":
    return _written_of(body[x.operands[0]], body)
  return sum(body[x.operands[1]].sizes) if x.code == _UPDATE else sum(x.sizes)
