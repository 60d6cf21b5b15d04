"""TPU slices that are not here: meshes of devices to compile for, on any CPU machine.

libtpu, which the extra [tpu] installs (or TPU_LIBRARY_PATH names), compiles without a TPU. A slice
is named by chip and topology in chips: v5e:4x4, v5p:2x2x4, v4:2x2x2, v6e:16x16, tpu7x:2x2x4.
"""

from __future__ import annotations

import math
import os
import re
from typing import Any

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from launch.engine.mesh import axis_sizes
from vavae_jax.errors import InputError
from vavae_jax.sharding import BATCH_AXES

# Of each chip, the slices that the table of plans has: 16 chips, and one host.
SLICES = {
  "v5e": ("4x4", "2x4"),
  "v6e": ("4x4", "2x4"),
  "v5p": ("2x2x4", "2x2x1"),
  "v4": ("2x2x4", "2x2x1"),
  "tpu7x": ("2x2x4", "2x2x1"),
}
# What libtpu asks of a machine without a TPU; and two processes may compile at once.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# Two cores of a v4 are one device.
_OPTIONS: dict[str, dict[str, Any]] = {"v4": {"chip_config_name": "megacore"}}


def prepare() -> None:
  """Makes this process one that compiles for TPUs and runs on its CPU; before jax has devices."""
  os.environ.update(_ENVIRONMENT)
  jax.config.update("jax_platforms", "cpu")


def make_mesh(topology: str, data: int = -1, fsdp: int = 1) -> Mesh:
  """The mesh of a configuration over the devices of a slice.

  Args:
    topology: such as "v5e:4x4".
    data: as in `config.mesh`.
    fsdp: as in `config.mesh`.

  Returns:
    A mesh that can be compiled for, and not run on.

  Raises:
    InputError: no such slice, no libtpu, or sizes that do not fit it.
  """
  chip, _, chips = topology.partition(":")
  if chip not in SLICES or not re.fullmatch(r"\d+(x\d+){1,2}", chips):
    raise InputError(
      f"--topology is {topology!r}; give one of {', '.join(SLICES)}, a colon and the chips along "
      "each axis, such as v5e:4x4 or v5p:2x2x4."
    )
  options = dict(_OPTIONS.get(chip, {}))
  sides = [int(side) for side in chips.split("x")]
  if math.prod(sides) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options)
  except RuntimeError as error:
    if "not installed" in str(error):
      raise InputError(
        "Compiling for TPUs takes libtpu: pip install -e '.[tpu]', or TPU_LIBRARY_PATH=libtpu.so."
      ) from error
    reason = str(error).strip().splitlines()[0]
    raise InputError(f"--topology={topology} is no slice that libtpu knows: {reason}") from error
  sizes = axis_sizes(data, fsdp, len(found.devices))
  try:
    devices = mesh_utils.create_device_mesh(sizes, list(found.devices))
  except NotImplementedError as error:
    raise InputError(
      f"A mesh of data={sizes[0]} x fsdp={sizes[1]} does not lie on {topology}: each must be a "
      "product of sides of the slice."
    ) from error
  return Mesh(devices, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)
