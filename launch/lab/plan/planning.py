"""What a program of a training takes on devices that are not here, as their compiler says."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
import vavae_jax.training
from launch import restore
from launch.engine import configuration, flops, hardware
from launch.lab import programs
from launch.lab.plan import hlo, kernels, slices
from vavae_jax import stages
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError

IMAGENET = 1_281_167
Settings = dict[str, Any]


@dataclasses.dataclass
class Plan:
  """What a program would take on a slice.

  Attributes:
    settings: the changes of the configuration that it is with.
    mesh: "data x fsdp".
    fits: whether the compiler found room.
    needed: bytes of a device, all parts together, of which not all need be there at one time (so
      that it can exceed `available` where the compiler finds room); 0 where it did not say.
    available: bytes of a device.
    parts: bytes of a device by kind; they sum up to `needed`.
    traffic: of the devices, by kind of collective.
    flops: of the model in one run, a device's share; what is computed again does not count.
    computed: of a device in one run, with what is computed again.
    hours: for all runs, at the stated share of the chips' peak; 0 where it does not fit.
    images_per_second: likewise.
    compile_seconds: here.
    kernels: of a GPU, alike ones together, those that move most first.
    bandwidth: of a GPU's memory, bytes/s.
  """

  settings: Settings
  mesh: str
  fits: bool
  needed: float
  available: float
  parts: dict[str, int]
  traffic: dict[str, hlo.Traffic]
  flops: float
  computed: float
  hours: float
  images_per_second: float
  compile_seconds: float
  kernels: list[kernels.Kernel]
  bandwidth: float = 0.0

  @property
  def moved(self) -> int:
    """Bytes that a device's kernels read and write in one run."""
    return kernels.moved(self.kernels)

  def to_dict(self) -> dict[str, Any]:
    """For a JSON file."""
    return dataclasses.asdict(self) | {
      "traffic": {kind: t._asdict() for kind, t in self.traffic.items()},
      "kernels": [x._asdict() for x in self.kernels],
      "moved": self.moved,
    }


def _bytes_of_one_device(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def plan(
  config: FrozenConfigDict,
  topology: str,
  what: str = "train",
  *,
  mfu: float = 0.4,
  num_images: int = IMAGENET,
  settings: Settings | None = None,
) -> Plan:
  """Compiles one program for a slice.

  Args:
    config: of a training, resolved.
    topology: as of `slices.make_mesh`.
    what: one of `programs.WHAT[config.task]`.
    mfu: the share of the chips' peak that the hours are told for.
    num_images: to encode, or to sample.
    settings: which changes led to this configuration.

  Returns:
    The plan; of a program that does not fit, without traffic.

  Raises:
    InputError: no such slice, or a mesh or batch that does not fit it.
  """
  programs.check(config, what)
  devices = slices.make_mesh(topology, config.mesh.data, config.mesh.fsdp)
  program = programs.of(config, devices, what, num_images)
  began = time.perf_counter()
  with jax.set_mesh(devices):
    traced = program.function.trace(*program.arguments)
    computed = flops.count(traced.jaxpr) / devices.size
    refused, compiled = "", None
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      refused = str(error)
      if "RESOURCE_EXHAUSTED" not in refused:
        raise
  one_run = _model_flops(config, devices, what, num_images) or computed
  seconds = program.runs * one_run / (hardware.peak_flops(devices) / devices.size * mfu)
  result = Plan(
    settings=settings or {},
    mesh=f"{devices.shape['data']} x {devices.shape['fsdp']}",
    fits=compiled is not None,
    needed=_told_bytes(refused),
    available=hardware.memory(devices),
    parts={name: _bytes_of_one_device(tree) for name, tree in program.parts.items()},
    traffic={},
    flops=one_run,
    computed=computed,
    hours=0.0,
    images_per_second=0.0,
    compile_seconds=time.perf_counter() - began,
    kernels=[],
  )
  if compiled is None:
    return result
  memory = compiled.memory_analysis()
  result.parts["temporary"] = memory.temp_size_in_bytes
  result.parts["program"] = memory.generated_code_size_in_bytes
  returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
  result.needed = (
    memory.argument_size_in_bytes
    + returned
    + sum(result.parts[name] for name in ("temporary", "program"))
  )
  result.parts["other"] = int(result.needed) - sum(result.parts.values())
  text = compiled.as_text()
  result.traffic = hlo.collectives(text)
  if topology.partition(":")[0] in slices.GPUS:
    # Its compiler makes programs that do not fit, too.
    result.fits = result.needed <= result.available
    result.kernels = kernels.grouped(kernels.kernels(text))
    result.bandwidth = hardware.bandwidth(devices)
  if not result.fits:
    return result
  result.hours = seconds / 3600
  result.images_per_second = program.runs * program.images / seconds
  return result


def _model_flops(config: FrozenConfigDict, devices: Mesh, what: str, num_images: int) -> float:
  """A device's share of one run where nothing is computed again; 0 where nothing is anyhow."""
  if not config.model.use_checkpoint or what != "train":
    return 0.0
  plain = ConfigDict(config.to_dict())
  plain.model.use_checkpoint = False
  program = programs.of(FrozenConfigDict(plain), devices, what, num_images)
  with jax.set_mesh(devices):
    traced = program.function.trace(*program.arguments)
  return flops.count(traced.jaxpr) / devices.size


def _told_bytes(message: str) -> float:
  """How much memory a program would have needed, where the compiler says so."""
  found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", message)
  if not found:
    return 0.0
  number, unit = (word for word in found.groups() if word)
  return float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))


def remedies(config: FrozenConfigDict, what: str, devices: int) -> Iterator[Settings]:
  """Changes that save memory, cheapest first; each says what is set."""
  if what != "train":
    sizes = {"sample": config.sample.batch_size} if what == "sample" else {}
    for size in sizes.values():
      while size > devices and size % 2 == 0:
        size //= 2
        yield {"sample.batch_size": size}
    return
  sharded = {"mesh.data": 1, "mesh.fsdp": -1}
  yield sharded
  if config.task == "tokenizer":
    yield sharded | {"model.use_checkpoint": True}
    return
  share = config.batch_size // devices
  parts = [n for n in (2, 4, 8, 16, 32) if share % n == 0 and share // n >= 4]
  policies = ("dots", "dense", "full")
  for count in parts:
    yield sharded | {"accumulate_steps": count}
  for policy in policies:
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
  **options: Any,
) -> Iterator[Plan]:
  """The plan of a configuration and, with `search`, of remedies until one fits."""
  first = plan(_resolved(config, num_images), topology, what, num_images=num_images, **options)
  yield first
  if first.fits or not search:
    return
  count = slices.make_mesh(topology).size
  for settings in remedies(FrozenConfigDict(config.copy_and_resolve_references()), what, count):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    tried = plan(
      _resolved(changed, num_images),
      topology,
      what,
      num_images=num_images,
      settings=settings,
      **options,
    )
    yield tried
    if tried.fits:
      return


def _resolved(config: ConfigDict, num_images: int) -> FrozenConfigDict:
  task = config.get("task")
  if task not in restore.TASKS:
    raise InputError(f"config.task is {task!r}; choose one of {sorted(restore.TASKS)}.")
  resolved = configuration.resolve(config, getattr(configs.base, task)())
  if task == "tokenizer":
    functional.outline(vavae_jax.training.build_autoencoder(resolved), "config.model")
    return stages.with_steps(resolved, num_images)
  return resolved
