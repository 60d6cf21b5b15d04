"""Bytes that one instruction moves from and to a device's memory, and the FLOPs of its products.

If a loop keeps an array for all layers, only the layer that a kernel touches counts. What lies in a
TPU's VMEM, S(1) in its layout, does not count.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

from launch.lab.plan.hlo import Body, Instruction, Program

# They name memory and move nothing.
FREE = frozenset(
  (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast"),
    *("after-all", "partition-id", "replica-id", "opt-barrier"),
  )
)
_FREE_CALLS = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast|Assume\w*)"')
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATE = "dynamic-update-slice"
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def is_free(x: Instruction) -> bool:
  """Whether an instruction does nothing by itself: the end of an asynchronous one, or a name."""
  if x.code in FREE or x.code.endswith(("-done", "-update")):
    return True
  return x.code == "custom-call" and bool(_FREE_CALLS.search(x.attributes))


def inside(x: Instruction, program: Program) -> Iterator[tuple[Instruction, Body]]:
  """The instructions of a fusion, those of fusions in it too, each with its computation."""
  if x.code == "fusion":
    body = program.bodies[x.called[0]]
    for y in body.values():
      yield y, body
      yield from inside(y, program)


def moved(x: Instruction, body: Body, program: Program) -> int:
  """Bytes that an instruction of `body` reads and writes."""
  read = [body[name].size if name in body else 0 for name in x.operands]
  if x.code in ("copy-start", "slice-start"):
    return _moved_aside(x, body)
  if x.code in _SLICES:
    return min(read[0], sum(a.size for a in x.arrays)) + x.size
  if x.code == _UPDATE:
    return 2 * read[1]
  if x.code != "fusion":
    return sum(read) + x.size
  inner = program.bodies[x.called[0]]
  for y in inner.values():
    if y.code == "parameter" and read[number := int(y.operands[0])]:
      read[number] = min(read[number], _read_of(y.name, inner, program))
  root = next(y for y in inner.values() if y.root)
  wrote = _written_of(root, inner, program)
  results = [a.size if a.in_memory else 0 for a in x.arrays]
  return sum(read) + sum(min(pair) for pair in zip(results, wrote, strict=True))


def _moved_aside(x: Instruction, body: Body) -> int:
  """Bytes of a copy beside other work: to and from memory, if both ends lie there."""
  # The arrays are result, source and counter; those of a slice are sources, result and counter.
  result = x.arrays[0] if x.code == "copy-start" else x.arrays[-2]
  source = body[x.operands[0]].arrays[0] if x.operands[0] in body else x.arrays[0]
  return result.size * (result.in_memory + source.in_memory)


def _read_of(name: str, body: Body, program: Program) -> int:
  """Bytes of an array that a fusion reads; only the slices, where it takes slices."""
  whole = sum(a.size for a in body[name].arrays)
  size = 0
  for x in body.values():
    if name not in x.operands:
      continue
    if _renames(x, program):
      size += _read_of(x.name, body, program)
    elif x.code in _SLICES and x.operands[0] == name:
      size += sum(a.size for a in x.arrays)
    elif x.code == _UPDATE and x.operands[0] == name:
      continue  # written in place
    elif x.code == "fusion":
      inner = program.bodies[x.called[0]]
      for y in inner.values():
        if y.code == "parameter" and x.operands[int(y.operands[0])] == name:
          size += _read_of(y.name, inner, program)
    else:
      return whole
  return min(size, whole)


def _renames(x: Instruction, program: Program) -> bool:
  """Whether an instruction within a fusion is its operand, perhaps in other tiles (tpu7x)."""
  codes = {y.code for y, _ in inside(x, program)} if x.code == "fusion" else {x.code}
  return not x.root and codes <= {"bitcast", "copy", "parameter"}


def _written_of(x: Instruction, body: Body, program: Program) -> list[int]:
  """Bytes of each result that a fusion writes; only the update, where it updates an array."""
  if x.code == "tuple":
    found = (_written_of(body[name], body, program) for name in x.operands)
    return list(itertools.chain.from_iterable(found))
  if x.code == "bitcast" and body[x.operands[0]].code in (_UPDATE, "fusion", "bitcast"):
    return _written_of(body[x.operands[0]], body, program)
  if x.code == "fusion":
    inner = program.bodies[x.called[0]]
    return _written_of(next(y for y in inner.values() if y.root), inner, program)
  if x.code == "get-tuple-element" and body[x.operands[0]].code == "fusion":
    index = int(x.attributes.partition("index=")[2].partition(",")[0])
    return [_written_of(body[x.operands[0]], body, program)[index]]
  if x.code == _UPDATE:
    return [sum(a.size for a in body[x.operands[1]].arrays)]
  return [a.size for a in x.arrays]


def flops(x: Instruction, body: Body, program: Program) -> float:
  """FLOPs, 2 a multiply-add, of the products and convolutions of an instruction of `body`."""
  found = _product(x, body)
  return found + sum(_product(y, within) for y, within in inside(x, program))


def _product(x: Instruction, body: Body) -> float:
  if x.code not in ("convolution", "dot") or not {*x.operands} <= {*body}:
    return 0.0
  left, right = (body[name].arrays[0].dims for name in x.operands)
  out = x.arrays[0].dims
  if x.code == "dot":
    contracted = _CONTRACTED.search(x.attributes)
    axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)
  labels = _LABELS.search(x.attributes)
  if labels is None:
    raise ValueError(f"The convolution {x.name} has no dim_labels.")
  lhs, rhs, result = labels.groups()
  window = _WINDOW.search(x.attributes)
  options = dict(part.split("=") for part in window[1].split()) if window else {}
  total = 2.0 * out[result.index("b")] * out[result.index("f")] * right[rhs.index("i")]
  for axis in range(sum(letter.isdigit() for letter in lhs)):
    sides = left[lhs.index(str(axis))], out[result.index(str(axis))]
    total *= _meetings(axis, options, *sides)
  return total


def _meetings(axis: int, options: dict[str, str], inputs: int, outputs: int) -> int:
  """How often a window's positions along an axis meet an input, not padding or a hole.

  A product with batch axes is a convolution whose strides and holes leave one meeting an output.
  """

  def option(name: str, default: str) -> str:
    return options[name].split("x")[axis] if name in options else default

  size, stride = int(option("size", "1")), int(option("stride", "1"))
  holes, spread = int(option("lhs_dilate", "1")), int(option("rhs_dilate", "1"))
  before = int(option("pad", "0_0").partition("_")[0])
  found = 0
  for position in range(size):
    for output in range(outputs):
      place = output * stride + position * spread - before
      found += place >= 0 and place % holes == 0 and place // holes < inputs
  return found
