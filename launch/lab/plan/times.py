"""How long a program would take on a TPU: the compiler's estimate beside two limits.

None of these is a measurement. The compiler's estimate is the sum of its cycles at the chip's
clock; the roofline lets each operation take as long as its products at the data sheet's rate or its
bytes at 0.8 of the data sheet's bandwidth, whichever is longer; the ideal is the model's FLOPs at
the data sheet's rate and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable

from launch.lab.plan.hlo import Traffic
from launch.lab.plan.operations import Operation

REACHED = 0.8  # of the data sheet's bandwidth, which is about what real chips stream
# How often the links carry a result, or what is reduced to it.
_PASSES = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True)
class Chip:
  """One jax device's rates by the data sheet."""

  flops: float  # FLOP/s in bfloat16
  bandwidth: float  # bytes/s of its memory
  clock: float = 0.0  # Hz; 0 for GPUs, whose compiler gives no cycles
  links: float = 0.0  # bytes/s to other devices, all links in one direction

  def roofline(self, one: Operation) -> float:
    """Seconds of one run of an operation at the least."""
    return max(one.flops / self.flops, one.bytes / (REACHED * self.bandwidth))

  def seconds(self, one: Operation) -> float:
    """Estimated seconds of one run: the compiler's cycles, and of a Pallas kernel no less than the
    roofline of what it declares.
    """
    if not self.clock:
      return self.roofline(one)
    seconds = (one.cycles or 0) / self.clock
    return max(seconds, self.roofline(one)) if one.pallas else seconds


@dataclasses.dataclass(frozen=True)
class Times:
  """Seconds of one run of a program on a device."""

  compiler: float  # by its cycles
  kernels: float  # of Pallas, by their schedules and what they declare
  network: float  # collectives at the data sheet's rate of all links, for which there are none
  roofline: float
  ideal: float

  @property
  def estimate(self) -> float:
    """Of a whole run, its parts one after the other; of a GPU's, at the least."""
    known = self.compiler + self.kernels + self.network
    return known if self.compiler else max(self.roofline, self.ideal)


@dataclasses.dataclass
class Source:
  """What one part of the model takes in a run of the program."""

  group: str
  seconds: float = 0.0  # estimated
  roofline: float = 0.0
  bytes: int = 0
  flops: float = 0.0
  runs: int = 0


def times(
  found: Iterable[Operation], traffic: dict[str, Traffic], chip: Chip, model_flops: float
) -> Times:
  """The step times of a program; `model_flops` are those of one device in a run."""
  found = list(found)
  carried = sum(_PASSES.get(kind, 1.0) * t.bytes for kind, t in traffic.items())
  known = dict.fromkeys((False, True), 0.0)
  for one in found if chip.clock else ():
    known[one.pallas] += one.runs * chip.seconds(one)
  return Times(
    compiler=known[False],
    kernels=known[True],
    network=carried / chip.links if chip.links else 0.0,
    roofline=sum(one.runs * chip.roofline(one) for one in found),
    ideal=model_flops / chip.flops,
  )


def by_source(found: Iterable[Operation], chip: Chip, network: float) -> list[Source]:
  """The parts of the model, those that take longest first; collectives take `network` seconds."""
  parts: dict[str, Source] = defaultdict(lambda: Source(""))
  for one in found:
    part = parts[one.group]
    part.group = one.group
    part.seconds += one.runs * chip.seconds(one)
    part.roofline += one.runs * chip.roofline(one)
    part.bytes += one.runs * one.bytes
    part.flops += one.runs * one.flops
    part.runs += one.runs
  if network:
    part = parts["collectives"]
    part.group, part.seconds = "collectives", network
  return sorted(parts.values(), key=lambda part: -part.seconds)
