"""The traffic between devices in a compiled step, read from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as
often as it runs, which for a scan is the constant that its condition compares with.
"""

from __future__ import annotations

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
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+[0-9]*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|\w+_computations?)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_NOTED = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_CONSTANT = re.compile(r"s32\[\](?:\{[^}]*\})? constant\((\d+)\)")


class Traffic(NamedTuple):
  """Collectives of one kind; bytes are of the results on one device, of all runs together."""

  ops: int
  runs: int
  bytes: int


def collectives(text: str) -> dict[str, Traffic]:
  """The collectives of a program by kind; `text` is its `compiled.as_text()`."""
  bodies, entry = computations(text)
  runs_of = _times(bodies, entry)
  # One operation may be in several computations: pieces of it run beside other work.
  found: dict[tuple[str, str], tuple[int, int]] = {}
  for name, lines in bodies.items():
    for line in lines:
      match = _COLLECTIVE.search(line)
      if not match or not runs_of.get(name):
        continue
      channel = _CHANNEL.search(line)
      key = (match[2], channel[1] if channel else line.split(" = ")[0].strip())
      here = (runs_of[name], _result_bytes(match[1], match[2], starts=bool(match[3])))
      found[key] = max(found.get(key, (0, 0)), here)
  sums: dict[str, Traffic] = {}
  for (kind, _), (runs, size) in found.items():
    before = sums.get(kind, Traffic(0, 0, 0))
    sums[kind] = Traffic(before.ops + 1, before.runs + runs, before.bytes + runs * size)
  return {kind: sums[kind] for kind in KINDS if kind in sums}


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """The lines of each computation by name, and the name of the entry computation."""
  bodies: dict[str, list[str]] = {}
  entry, current = "", ""
  for line in text.splitlines():
    if line and not line[0].isspace() and (head := _HEAD.match(line)):
      current = head[2]
      bodies[current] = []
      if head[1]:
        entry = current
    elif current:
      bodies[current].append(line)
  return bodies, entry


def _times(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
  """How often each computation runs in one run of the program."""
  found: dict[str, int] = defaultdict(int)

  def visit(name: str, factor: int) -> None:
    if factor <= found[name]:
      return  # visited already, by a caller that runs it as often
    found[name] = factor
    for line in bodies.get(name, ()):
      count = trips(line, bodies)
      for match in _CALLED.finditer(line):
        for called in (match[1] or match[2]).split(","):
          visit(called.strip().lstrip("%"), factor * count)

  visit(entry, 1)
  return found


def trips(line: str, bodies: dict[str, list[str]]) -> int:
  """How often a loop runs: XLA's note, or the constant that its counter is compared with."""
  loop = _LOOP.search(line)
  if not loop:
    return 1
  if noted := _NOTED.search(line):
    return int(noted[1])
  numbers = [int(x) for text in bodies.get(loop[1], []) for x in _CONSTANT.findall(text)]
  return max(numbers, default=1)


def sizes(shapes: str, scalars: bool = True) -> list[int]:
  """Bytes of each array in the text of a shape, or of a tuple of them."""
  return [
    math.prod(int(dim) for dim in dims.split(",") if dim) * _BYTES.get(dtype, 4)
    for dtype, dims in _SHAPE.findall(shapes)
    if scalars or dims
  ]


def _result_bytes(shapes: str, kind: str, starts: bool) -> int:
  found = sizes(shapes, scalars=not starts)  # a scalar is a counter of an asynchronous operation
  # Except for an all-reduce, the operation that starts one lists its inputs before its results.
  return sum(found[len(found) // 2 :] if starts and kind != "all-reduce" else found)
