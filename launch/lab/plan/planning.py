"""Plans: what a program takes on devices that this machine lacks: memory, traffic, FLOPs, time."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict, FrozenConfigDict

import vavae_jax.training
from launch import tasks
from launch.engine import flops, hardware
from launch.engine.step import without_recomputation
from launch.lab import programs
from launch.lab.plan import hlo, operations, schedule, slices, times
from launch.lab.plan.operations import Operation
from vavae_jax.common import functional

IMAGENET = 1_281_167
Settings = dict[str, Any]


@dataclasses.dataclass
class Plan:
  """The cost of a program on a slice; bytes and FLOPs are of one device and one run."""

  settings: Settings  # changes to the configuration
  images: int  # of one run
  mesh: str  # "data x fsdp"
  fits: bool  # as the compiler says
  # Of all parts, which need not all exist at one time: it can exceed `available` where the program
  # fits. 0 where the compiler gives no number.
  needed: float
  available: float
  parts: dict[str, int]  # their sum is `needed`
  flops: float  # of the model
  computed: float  # with the activations that are computed again
  compile_seconds: float
  traffic: dict[str, hlo.Traffic] = dataclasses.field(default_factory=dict)
  operations: list[Operation] = dataclasses.field(default_factory=list)  # those alike joined
  sources: list[times.Source] = dataclasses.field(default_factory=list)
  seconds: times.Times | None = None  # of one run; None where it does not fit
  hours: float = 0.0  # of all runs by the estimate; 0 where it does not fit
  images_per_second: float = 0.0

  @property
  def moved(self) -> int:
    """Bytes that a device's operations read and write in one run."""
    return operations.moved(self.operations)

  def to_dict(self) -> dict[str, Any]:
    """For a JSON file."""
    return dataclasses.asdict(self) | {"moved": self.moved}


def plan(
  config: FrozenConfigDict,
  topology: str,
  what: str = "train",
  *,
  num_images: int = IMAGENET,
  coded: int = 0,
  settings: Settings | None = None,
) -> Plan:
  """Compiles one of a task's programs for a slice, named as `slices.make_mesh` says.

  `num_images` is how many are encoded or sampled, `coded` as of `programs.of`, and `settings` what
  was changed to get this configuration. Raises InputError for an unknown slice, or a mesh or batch
  that does not fit it.
  """
  programs.check(config, what)
  devices = slices.make_mesh(topology, config.mesh.data, config.mesh.fsdp)
  program = programs.of(config, devices, what, num_images, coded)
  began = time.perf_counter()
  traced = programs.traced(program, devices)
  with jax.set_mesh(devices):
    compiled, needed = _compiled(traced)
    plain = without_recomputation(config)
  one_run = computed = flops.count(traced.jaxpr) / devices.size
  if what == "train" and plain != config:
    one_run = programs.count(programs.of(plain, devices, what, num_images), devices) / devices.size
  result = Plan(
    settings=settings or {},
    images=program.images,
    mesh=f"{devices.shape['data']} x {devices.shape['fsdp']}",
    fits=compiled is not None,
    needed=needed,
    available=hardware.memory(devices),
    parts={name: _bytes_of_one_device(tree) for name, tree in program.parts.items()},
    flops=one_run,
    computed=computed,
    compile_seconds=time.perf_counter() - began,
  )
  if compiled is not None:
    memory = compiled.memory_analysis()
    result.parts["temporary"] = memory.temp_size_in_bytes
    result.parts["program"] = memory.generated_code_size_in_bytes
    own = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
    returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
    result.needed = memory.argument_size_in_bytes + returned + own
    result.parts["other"] = int(result.needed) - sum(result.parts.values())
    text = hlo.parse(compiled.as_text())
    result.traffic = hlo.collectives(text)
    # XLA compiles programs for GPUs that do not fit, too.
    if topology.partition(":")[0] in slices.GPUS:
      result.fits = result.needed <= result.available
    found, chip = operations.of(text), slices.chip_of(topology, devices)
    if any(one.pallas for one in found) and chip.clock:
      found = operations.of(text, schedule.cycles(config, topology, what, num_images, coded))
    seconds = times.times(found, result.traffic, chip, one_run)
    result.operations = operations.joined(found)
    result.sources = times.by_source(found, chip, seconds.network)
    if result.fits:
      result.seconds = seconds
      result.hours = program.runs * seconds.estimate / 3600
      result.images_per_second = program.images / seconds.estimate
  return result


def _compiled(traced: Any) -> tuple[Any, float]:
  """The compiled program, or None and the bytes that the refusal names (0: none)."""
  try:
    return traced.lower().compile(), 0.0
  except jax.errors.JaxRuntimeError as error:
    message = str(error)
    if "RESOURCE_EXHAUSTED" not in message:
      raise
  found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", message)
  if not found:
    return None, 0.0
  number, unit = (word for word in found.groups() if word)
  return None, float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))


def _bytes_of_one_device(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def remedies(config: FrozenConfigDict, what: str, devices: int, tpu: bool) -> Iterator[Settings]:
  """Changes that save memory, cheapest first."""
  if what == "sample":
    size = config.sample.batch_size
    while size > 1 and size % 2 == 0:
      size //= 2
      yield {"sample.batch_size": size}
  if what != "train":
    return
  sharded = {"mesh.data": 1, "mesh.fsdp": -1}
  yield sharded
  if config.task == "tokenizer":
    yield sharded | {"model.use_checkpoint": True}
    return
  share = config.batch_size // devices
  parts = [n for n in (2, 4, 8, 16, 32) if share % n == 0 and share // n >= 4]
  for count in parts:
    yield sharded | {"accumulate_steps": count}
  # Policies that keep less than is kept anyway.
  for policy in ("full",) if tpu else ("dots", "dense", "full"):
    again = sharded | {"model.use_checkpoint": True, "model.remat_policy": policy}
    yield again
  for count in parts:
    yield again | {"accumulate_steps": count}


def plans(
  config: ConfigDict,
  topology: str,
  what: str,
  *,
  search: bool = False,
  num_images: int = IMAGENET,
  coded: int = 0,
) -> Iterator[Plan]:
  """The plan of a configuration and, with `search`, of remedies until one fits."""
  tries: Iterable[Settings] = ()
  if search:
    size, tpu = slices.make_mesh(topology).size, topology.partition(":")[0] in slices.SLICES
    tries = remedies(FrozenConfigDict(config), what, size, tpu)
  for settings in ({}, *tries):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    resolved = tasks.resolve(changed, num_images)
    if config.task == "tokenizer":
      functional.outline(vavae_jax.training.build_autoencoder(resolved), "config.model")
    counts = {"num_images": num_images, "coded": coded}
    found = plan(resolved, topology, what, **counts, settings=settings)
    yield found
    if found.fits:
      return
