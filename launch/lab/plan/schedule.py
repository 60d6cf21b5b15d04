"""Cycles of Pallas kernels by the TPU compiler's schedules, for it notes none in the program.

A schedule is the list of instruction words that a core issues, one a cycle; those in a loop count
in each of its rounds. Waits for the device's memory, and stalls that the words do not show, count
nothing. Each kernel is compiled alone, in a process of its own, since libtpu reads its flags once:
of a whole program the lists would take gigabytes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from ml_collections import FrozenConfigDict

from launch.engine import console
from launch.engine.flops import inner_jaxprs
from launch.lab import programs
from launch.lab.plan import hlo, slices
from launch.lab.plan.operations import identity, is_pallas

_FLAG = "--xla_jf_dump_to="
_FILE = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
# Address, mark such as LB (a loop begins), one > for each loop around it, the instructions.
_WORD = re.compile(r"^ *(?:0x[\da-f]+|0) +(\w*): (>*) *\{(.*)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (%\w+), (\d+) /\* loop exit test \*/")
_STEP = re.compile(r"(%\w+) = sadd\.s32 (\d+), %")
_SPILLED = re.compile(r"sst \[smem:\[#(\w+)\]\] (%\w+)")
_LOADED = re.compile(r"(%\w+) = sld \[smem:\[#(\w+)\]\]")
# Rounds of the loop over a kernel's grid in which it only loads or stores.
_FILLING = 2


def cycles(config: FrozenConfigDict, topology: str, *program: str | int) -> dict[str, int]:
  """Cycles of each Pallas kernel of a program by `operations.identity`; none if that crashes.

  `program` are the further arguments of `programs.of`.
  """
  with ProcessPoolExecutor(1, get_context("spawn")) as pool:
    try:
      return pool.submit(_cycles, config, topology, *program).result()
    except BrokenProcessPool:
      console.say("The compiler crashed over its schedules: Pallas kernels count as they declare.")
      return {}


def _cycles(config: FrozenConfigDict, topology: str, *program: Any) -> dict[str, int]:
  with tempfile.TemporaryDirectory(prefix="schedules-") as folder:
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {_FLAG}{folder}".strip()
    slices.prepare()
    devices = slices.make_mesh(topology, config.mesh.data, config.mesh.fsdp)
    traced = programs.traced(programs.of(config, devices, *program), devices)
    sharding = SingleDeviceSharding(devices.devices.flat[0])
    found: dict[str, int] = {}
    for kernel in kernels_of(traced.jaxpr):
      shapes = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=sharding) for x in kernel.invars
      ]
      compiled: Any = jax.jit(alone(kernel)).lower(*shapes).compile()
      found |= _named(compiled.as_text(), read(Path(folder)))
    return found


def kernels_of(jaxpr: Any) -> Iterator[Any]:
  """The equations of a jaxpr, and of those in it, that are Pallas kernels."""
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if equation.primitive.name == "pallas_call":
      yield equation
    else:
      for inner in inner_jaxprs(equation):
        yield from kernels_of(inner)


@dataclasses.dataclass
class _Loop:
  """A loop of a schedule: words of each round, beside those of the loops in it."""

  words: int = 0
  rounds: int = 0
  inside: list[_Loop] = dataclasses.field(default_factory=list)

  @property
  def cycles(self) -> int:
    if not self.rounds:
      raise ValueError("A loop of the schedule does not say how many rounds it has.")
    return self.rounds * (self.words + sum(loop.cycles for loop in self.inside))


def cycles_of(schedule: str) -> int:
  """The cycles of a schedule, a text that the compiler calls final bundles."""
  around = [_Loop(rounds=1)]  # the whole kernel, then the loop at each depth that began last
  steps: dict[str, int] = {}  # of counters, also where they are spilled
  for line in schedule.splitlines():
    if not (word := _WORD.match(line)):
      continue  # a comment
    mark, depth, content = word[1], len(word[2]), word[3]
    if mark == "LB":
      del around[depth:]
      around[-1].inside.append(_Loop())
      around.append(around[-1].inside[-1])
    around[depth].words += 1
    steps |= {name: int(step) for name, step in _STEP.findall(content)}
    steps |= {place: steps[name] for place, name in _SPILLED.findall(content) if name in steps}
    steps |= {name: steps[place] for name, place in _LOADED.findall(content) if place in steps}
    if end := _EXIT.search(content):
      around[depth].rounds = -(-int(end[2]) // steps[end[1]]) - (_FILLING if depth == 1 else 0)
  return around[0].cycles


def read(folder: Path) -> dict[str, int]:
  """Cycles by an operation's name, as the compiler wrote them; the files are gone then."""
  found: dict[str, int] = {}
  for file in folder.iterdir():
    if named := _FILE.fullmatch(file.name):
      found[named[1]] = cycles_of(file.read_text())
    file.unlink()
  return found


def alone(kernel: Any) -> Any:
  """A function of the kernel's inputs, under the kernel's name as in the whole program."""

  def run(*arrays: jax.Array) -> Any:
    with jax.named_scope(kernel.params["name"]):
      return kernel.primitive.bind(*arrays, **kernel.params)

  return run


def _named(text: str, by_name: dict[str, int]) -> dict[str, int]:
  instructions = (x for body in hlo.parse(text).bodies.values() for x in body.values())
  return {identity(x): by_name[x.name] for x in instructions if is_pallas(x) and x.name in by_name}
