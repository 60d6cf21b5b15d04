"""Meshes of TPUs or GPUs to compile for, on a machine that has neither.

libtpu, which the extra [tpu] installs (or TPU_LIBRARY_PATH names), compiles without a TPU. The name
of a slice is its chip and the chips along each axis: v5e:4x4, v5p:2x2x4, v6e:16x16, tpu7x:2x2x4.
jax's CUDA plugin, of the extra [cuda], compiles without a GPU: h200:8 is one host of eight GPUs,
h100:4x8 is four such hosts.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from launch.engine import hardware
from launch.lab.plan.times import Chip
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError

# The slices in the table of plans: 16 chips, and one host.
SLICES = {
  "v5e": ("4x4", "2x4"),
  "v6e": ("4x4", "2x4"),
  "v5p": ("2x2x4", "2x2x1"),
  "v4": ("2x2x4", "2x2x1"),
  "tpu7x": ("2x2x4", "2x2x1"),
}
# Of one jax device: Hz, at which the multipliers of its matrix units give the data sheet's FLOP/s;
# and bytes/s to other devices, by the data sheet, all links of one direction.
_CLOCKS = {"v5e": 1.5e9, "v6e": 1.75e9, "v5p": 1.75e9, "v4": 1.05e9, "tpu7x": 2.2e9}
_LINKS = {"v5e": 200e9, "v6e": 448e9, "v5p": 600e9, "v4": 300e9, "tpu7x": 600e9}
# XLA's description of an absent GPU, from NVIDIA's data sheets and programming guide.
_HOPPER = {
  "threads_per_block_limit": 1024,
  "threads_per_warp": 32,
  "threads_per_core_limit": 2048,
  "block_dim_limit_x": 2**31 - 1,
  "block_dim_limit_y": 2**16 - 1,
  "block_dim_limit_z": 2**16 - 1,
  "shared_memory_per_block": 48 * 2**10,
  "shared_memory_per_block_optin": 227 * 2**10,
  "shared_memory_per_core": 228 * 2**10,
  "registers_per_block_limit": 2**16,
  "registers_per_core_limit": 2**16,
  "core_count": 132,
  "fpus_per_core": 128,
  "l2_cache_size": 50 * 2**20,
  "clock_rate_ghz": 1.98,
}
GPUS: dict[str, tuple[str, dict[str, Any]]] = {
  "h100": ("NVIDIA H100", _HOPPER | {"device_memory_size": 80 * 10**9}),
  "h200": ("NVIDIA H200", _HOPPER | {"device_memory_size": 141 * 10**9}),
}
_CUDA, _CUDNN = (13, 0, 0), (9, 28, 1)  # versions that programs are compiled for
# libtpu needs these on a machine without a TPU; the last lets two processes compile at once.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def prepare() -> None:
  """Lets this process compile for TPUs and run on its CPU; call it before jax has devices."""
  os.environ.update(_ENVIRONMENT)
  jax.config.update("jax_platforms", "cpu")


def make_mesh(topology: str, data: int = -1, fsdp: int = 1) -> Mesh:
  """The mesh of a configuration (`config.mesh`) over a slice such as "v5e:4x4", to compile for.

  Raises:
    InputError: unknown slice, no libtpu or CUDA plugin, or sizes that do not fit the slice.
  """
  chip, _, chips = topology.partition(":")
  if chip in GPUS and re.fullmatch(r"\d+(x\d+)?", chips):
    found = _gpus(chip, chips)
  elif chip in SLICES and re.fullmatch(r"\d+(x\d+){1,2}", chips):
    found = _tpus(chip, chips)
  else:
    raise InputError(
      f"--topology is {topology!r}; give one of {', '.join(SLICES)}, a colon and the chips along "
      f"each axis, such as v5e:4x4 or v5p:2x2x4; or one of {', '.join(GPUS)}, a colon and the "
      "number of GPUs, such as h200:8, or h200:4x8 for four hosts."
    )
  return mesh.make_mesh(data, fsdp, found.devices)


def chip_of(topology: str, devices: Mesh) -> Chip:
  """The rates of one device of a slice that `make_mesh` made."""
  name = topology.partition(":")[0]
  return Chip(
    flops=hardware.peak_flops(devices) / devices.size,
    bandwidth=hardware.bandwidth(devices),
    clock=_CLOCKS.get(name, 0.0),
    links=_LINKS.get(name, 0.0),
  )


def _tpus(chip: str, chips: str) -> Any:
  # Two cores of a v4 are one device.
  options: dict[str, Any] = {"chip_config_name": "megacore"} if chip == "v4" else {}
  if math.prod(int(side) for side in chips.split("x")) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  topology = f"{chip}:{chips}"
  try:
    return topologies.get_topology_desc(topology_name=topology, platform="tpu", **options)
  except RuntimeError as error:
    if "not installed" in str(error):
      raise InputError(
        "Compiling for TPUs needs libtpu: pip install -e '.[tpu]', or TPU_LIBRARY_PATH=libtpu.so."
      ) from error
    reason = str(error).strip().splitlines()[0]
    raise InputError(f"libtpu does not know --topology={topology}: {reason}") from error


def _gpus(chip: str, count: str) -> Any:
  kind, facts = GPUS[chip]
  facts = facts | {"memory_bandwidth": int(hardware.BANDWIDTH[kind])}
  hosts, _, each = count.rpartition("x")
  versions = (
    "{name} {{ major: {0} minor: {1} patch: {2} }}".format(*numbers, name=name)
    for name, numbers in (("dnn_version_info", _CUDNN), ("runtime_version", _CUDA))
  )
  target = "\n".join(
    (
      "gpu_device_info { cuda_compute_capability { major: 9 minor: 0 }",
      *(f"{name}: {value}" for name, value in facts.items()),
      "}",
      *versions,
      f'platform_name: "CUDA" device_description_str: "{kind}"',
    )
  )
  try:
    # Each host is a domain of NVLink.
    return topologies.get_topology_desc(
      topology_name="", platform="cuda", topology=f"{hosts or 1}x1x{each}", target_config=target
    )
  except (RuntimeError, ValueError) as error:
    raise InputError(
      "Compiling for GPUs needs jax's CUDA plugin: pip install -e '.[cuda]'; jax says: "
      + str(error).strip().splitlines()[0]
    ) from error
