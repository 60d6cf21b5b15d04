"""What devices can do at most, so that a training can say what share of it it gets."""

from __future__ import annotations

from jax.sharding import Mesh

# Dense bfloat16 FLOP/s of one jax device, from the makers' data sheets; a name is matched by how
# `device_kind` begins, longer ones first.
PEAK_FLOPS = {
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5p": 459e12,
  "TPU v5": 459e12,
  "TPU v6 lite": 918e12,
  "TPU7x": 1153e12,  # of 2,307 a chip, which is two devices
  "NVIDIA A100": 312e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H800": 989e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40": 181e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA B200": 2250e12,
}


def peak_flops(mesh: Mesh) -> float:
  """Dense bfloat16 FLOP/s of all devices of a mesh; 0 where the kind is not known, as of CPUs."""
  kind = mesh.devices.flat[0].device_kind
  for name in sorted(PEAK_FLOPS, key=len, reverse=True):
    if kind.startswith(name):
      return PEAK_FLOPS[name] * mesh.size
  return 0.0
