"""Devices -> mesh, one rule for parameter sharding, host arrays -> global arrays.

One mesh ("data", "fsdp"). The batch goes over both axes; parameters, EMA and optimizer state over
"fsdp" by their shapes alone, so that no module carries partition metadata.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import BATCH_AXES

# Below this many elements an array costs less to hold everywhere than to gather.
MIN_SHARDED_SIZE = 2**14


def make_mesh(data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh ("data", "fsdp") over devices, by default all of all processes.

  A size of -1 takes what the other leaves; `fsdp` is the number of shards of parameters and
  optimizer state. Auto axes: Explicit ones, jax's default, break patchify and embedding look-ups.

  jax orders the devices by the links between them, so that those of a process need not be
  neighbours: on v5e:4x4, `fsdp` over all, they are of the processes 0 0 1 1 1 1 0 2 3 3 3 3 2 2 2
  0. Whose rows are whose is for `own_rows` to say. Several slices of TPUs, or hosts of GPUs, lie
  along "data" as far as that divides, so that only gradients go over the slow network.
  """
  found = devices or jax.devices()
  sizes = axis_sizes(data, fsdp, len(found))
  slices = len({getattr(device, "slice_index", 0) for device in found})
  try:
    if slices == 1:
      return jax.make_mesh(sizes, BATCH_AXES, (AxisType.Auto,) * 2, devices=devices)
    between = (math.gcd(sizes[0], slices), slices // math.gcd(sizes[0], slices))
    within = [size // count for size, count in zip(sizes, between, strict=True)]
    placed = mesh_utils.create_hybrid_device_mesh(
      within, between, found, allow_split_physical_axes=True
    )
    return Mesh(placed, BATCH_AXES, (AxisType.Auto,) * 2)
  except NotImplementedError as error:
    raise InputError(
      f"config.mesh asks for data={sizes[0]} x fsdp={sizes[1]}, which does not lie on these "
      f"devices: each must be a product of sides of the slice, such as 1 and {sizes[0] * sizes[1]}."
    ) from error


def use(count: int) -> None:
  """Confines this process to so many devices (virtual ones on a CPU), before jax looks for any."""
  jax.config.update("jax_num_cpu_devices", count)
  jax.config.update("jax_cuda_visible_devices", ",".join(map(str, range(count))))
  if jax.device_count() != count:
    raise InputError(
      f"--devices is {count}, but there are {jax.device_count()} of {jax.default_backend()}; GPUs "
      "and virtual devices of CPUs can be chosen, others are used together."
    )


def axis_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
  """The axes of a mesh of `count` devices; for arguments and error see `make_mesh`."""
  sizes = {"data": data, "fsdp": fsdp}
  for axis, other in (("data", "fsdp"), ("fsdp", "data")):
    if sizes[axis] == -1 and sizes[other] > 0:
      sizes[axis] = count // sizes[other]
  if min(sizes.values()) < 1 or sizes["data"] * sizes["fsdp"] != count:
    raise InputError(
      f"config.mesh asks for data={data} x fsdp={fsdp}, but there are {count} devices; "
      "choose two sizes whose product is that number, or -1 for one of them."
    )
  return sizes["data"], sizes["fsdp"]


def local_mesh() -> Mesh:
  """The mesh over this process's devices alone, for work that processes do separately."""
  devices = jax.local_devices()
  return jax.make_mesh((len(devices), 1), BATCH_AXES, (AxisType.Auto,) * 2, devices=devices)


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
  """A `NamedSharding` for each array or shape of a tree: the largest axis that "fsdp" divides over
  it, else replicated.
  """
  shards = mesh.shape["fsdp"]

  def rule(leaf: Any) -> NamedSharding:
    axes = [axis for axis, size in enumerate(leaf.shape) if size % shards == 0]
    if shards == 1 or leaf.size < MIN_SHARDED_SIZE or not axes:
      return replicated(mesh)
    largest = max(axes, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

  return jax.tree.map(rule, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
  """Raises InputError unless the global batch divides over the mesh and the processes."""
  if batch_size < 1 or batch_size % mesh.size:
    raise InputError(
      f"batch_size is {batch_size}, but it must be a positive multiple of the {mesh.size} devices; "
      f"the nearest are {max(batch_size // mesh.size, 1) * mesh.size} and "
      f"{(batch_size // mesh.size + 1) * mesh.size}."
    )


def round_up(batch_size: int, mesh: Mesh) -> int:
  """The next multiple of the number of devices."""
  return -(-batch_size // mesh.size) * mesh.size


def batches(mesh: Mesh) -> NamedSharding:
  """The leading axis over the whole mesh."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def own_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
  """The rows of a batch that the devices of this process hold, ascending, as `to_global` takes
  them; together the processes of the mesh have each row once.
  """
  held = batches(mesh).addressable_devices_indices_map((batch_size,)).values()
  return np.sort(np.concatenate([np.arange(batch_size)[rows] for rows in held]))


def to_global(batch: Any, mesh: Mesh) -> Any:
  """This process's `own_rows` of a batch, a pytree of host arrays [n, ...] -> global arrays
  [B, ...], the leading axis over the whole mesh.
  """
  place = functools.partial(jax.make_array_from_process_local_data, batches(mesh))
  return jax.tree.map(lambda x: place(np.asarray(x)), batch)


def to_host(x: jax.Array) -> np.ndarray:
  """The rows of `own_rows` of a global array [B, ...] over the whole mesh; all rows of one that is
  whole on every device.
  """
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  shards = sorted(x.addressable_shards, key=lambda shard: shard.index[0].start)
  return np.concatenate([shard.data for shard in shards])
