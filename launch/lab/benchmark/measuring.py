"""How fast, how large and how long to compile a program is, and where its time goes."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from launch.engine import console, flops
from launch.engine.circumstances import circumstances
from launch.lab import programs
from launch.lab.programs import Program
from vavae_jax.common.files import write_json


@functools.cache
def matmul_rate(dtype: str) -> float:
  """FLOP/s of a large square matrix product on one device."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in (0, 1))
  return 2 * size**3 / _median_seconds(functools.partial(jax.jit(jnp.matmul), a, b))


@functools.cache
def copy_rate() -> float:
  """Bytes/s of reading a large array and writing another on one device."""
  count = 2**26 if jax.default_backend() == "cpu" else 2**29
  x = jax.random.normal(jax.random.key(0), (count,), jnp.float32)
  return 2 * x.nbytes / _median_seconds(functools.partial(jax.jit(jnp.negative), x))


def _median_seconds(run: Callable[[], Any]) -> float:
  return float(np.median([timed(run) for _ in range(10)][2:]))


def keep(result: dict[str, Any], output: Path | None) -> None:
  """Writes the result and its circumstances to the file of --output, if it is given."""
  if output:
    write_json(output, {**circumstances(), **result})
    console.say(f"written to {output}")


def in_turns(works: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
  """What each work returns in each round; in a round all take a turn."""
  found: dict[str, list[float]] = {name: [] for name in works}
  for _ in console.tracked(range(rounds), "rounds", rounds):
    for name, work in works.items():
      found[name].append(work())
  return found


def timed(work: Callable[[], Any]) -> float:
  """Seconds until the arrays that `work` returns are computed."""
  began = time.perf_counter()
  jax.block_until_ready(work())
  return time.perf_counter() - began


class Prepared:
  """A program with arrays, compiled twice: without and with a filled compilation cache.

  Attributes:
    flops: of one run on all devices.
    least_bytes: of all arguments and results, each once on every device that has it.
    memory: bytes of one device for arguments, results and temporaries.
    compile_cold: seconds to trace, lower and compile.
    compile_warm: the same with the compiler's result in the cache.
  """

  def __init__(self, program: Program, devices: Mesh, state: Any = None):
    """`state` is the argument that each run hands on to the next; random if None."""
    self._devices, self._program = devices, program
    with tempfile.TemporaryDirectory() as folder, _cache(folder):
      self.compile_cold, _ = self._compile()
      jax.clear_caches()
      self.compile_warm, self._compiled = self._compile()
    memory = self._compiled.memory_analysis()
    each = memory.argument_size_in_bytes + memory.output_size_in_bytes
    self.least_bytes = each * devices.size
    self.memory = each - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    draw = np.random.default_rng(0)
    self._arguments = [
      state if place == program.handed_on and state is not None else _arrays(argument, draw)
      for place, argument in enumerate(program.arrays)
    ]

  def _compile(self) -> tuple[float, Any]:
    began = time.perf_counter()
    traced = programs.traced(self._program, self._devices)
    with jax.set_mesh(self._devices):
      compiled = traced.lower().compile()
    seconds = time.perf_counter() - began
    self.flops = flops.count(traced.jaxpr)
    return seconds, compiled

  def run(self) -> Any:
    """Runs it once without waiting; a training step takes the state that the last one left."""
    with jax.set_mesh(self._devices):
      result = self._compiled(*self._arguments)
    if self._program.handed_on is not None:
      self._arguments[self._program.handed_on] = result[0]
    return result


@contextlib.contextmanager
def _cache(folder: str) -> Iterator[None]:
  """A compilation cache that starts empty and stores every program."""
  settings = {
    "jax_compilation_cache_dir": folder,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  try:
    for name, value in settings.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
  finally:
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


def _arrays(tree: Any, draw: np.random.Generator) -> Any:
  """Random arrays of these shapes and shardings; never zeros, which some kernels skip."""

  def array(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.device_put(jax.random.key(1), leaf.sharding)
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      values = draw.integers(0, 10, size=leaf.shape).astype(leaf.dtype)
    else:
      values = (0.02 * draw.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
    return jax.device_put(values, leaf.sharding)

  return jax.tree.map(array, tree)


def peak_memory() -> int:
  """Most bytes that this process has used on its first device; 0 if the device counts none."""
  statistics = jax.local_devices()[0].memory_stats() or {}
  return int(statistics.get("peak_bytes_in_use", 0))
