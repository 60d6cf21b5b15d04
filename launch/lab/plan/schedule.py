"""Cycles of Pallas kernels by the TPU compiler's schedules, for it notes none in the program.

They count loops and stalls in a kernel, but not how long it waits for the device's memory. Each
kernel is compiled alone, in a process of its own: of a whole program the schedules take the
compiler hours and ten gigabytes.
"""

from __future__ import annotations

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

_FLAG = "--xla_jf_dump_static_llo_profile_to="
_ENTRY = re.compile(r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)')


def cycles(config: FrozenConfigDict, topology: str, what: str, num_images: int) -> dict[str, int]:
  """Cycles of each Pallas kernel of a program by `operations.identity`; none if that crashes."""
  with ProcessPoolExecutor(1, get_context("spawn")) as pool:
    try:
      return pool.submit(_cycles, config, topology, what, num_images).result()
    except BrokenProcessPool:
      console.say("The compiler crashed over its schedules: Pallas kernels count as they declare.")
      return {}


def _cycles(config: FrozenConfigDict, topology: str, what: str, num_images: int) -> dict[str, int]:
  with tempfile.TemporaryDirectory(prefix="schedules-") as folder:
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {_FLAG}{folder}".strip()
    slices.prepare()
    devices = slices.make_mesh(topology, config.mesh.data, config.mesh.fsdp)
    traced = programs.traced(programs.of(config, devices, what, num_images), devices)
    sharding = SingleDeviceSharding(devices.devices.flat[0])
    found: dict[str, int] = {}
    for kernel in kernels_of(traced.jaxpr):
      shapes = [
        jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype, sharding=sharding) for x in kernel.invars
      ]
      compiled: Any = jax.jit(_alone(kernel)).lower(*shapes).compile()
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


def read(folder: Path) -> dict[str, int]:
  """Cycles by an operation's name, as the compiler wrote them; the files are gone then."""
  found: dict[str, int] = {}
  for file in folder.iterdir():
    found |= {name: int(count) for name, count in _ENTRY.findall(file.read_text())}
    file.unlink()
  return found


def _alone(kernel: Any) -> Any:
  """A function of the kernel's inputs, under the kernel's name as in the whole program."""

  def run(*arrays: jax.Array) -> Any:
    with jax.named_scope(kernel.params["name"]):
      return kernel.primitive.bind(*arrays, **kernel.params)

  return run


def _named(text: str, by_name: dict[str, int]) -> dict[str, int]:
  instructions = (x for body in hlo.parse(text).bodies.values() for x in body.values())
  return {identity(x): by_name[x.name] for x in instructions if is_pallas(x) and x.name in by_name}
