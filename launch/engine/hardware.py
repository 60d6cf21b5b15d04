"""What devices can do at most, so that a training can say what share of it it gets."""

from __future__ import annotations

import os

import jax
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


# What XLA is told on NVIDIA GPUs beyond its defaults, unless XLA_FLAGS says otherwise.
GPU_FLAGS = (
  # Weights of the next block are gathered, and gradients summed, while this one computes.
  "--xla_gpu_enable_latency_hiding_scheduler=true",
)


# Where compiled programs are kept, so that a run that is started again does not compile again.
# JAX_COMPILATION_CACHE_DIR names another folder. CPUs do without: their programs are of one
# machine, and homes are of several.
PROGRAMS = "~/.cache/vavae_jax/programs"


def prepare() -> None:
  """Sets what this machine's accelerators want set, without asking jax for them."""
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return
  gpu = os.path.exists("/dev/nvidiactl")
  if gpu:
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in GPU_FLAGS if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
  tpu = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
  if (gpu or tpu) and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(PROGRAMS))


# GiB that a program can have of one device: of TPUs as the compiler says when it refuses one; of
# GPUs 0.95 of the memory, which XLA_PYTHON_CLIENT_MEM_FRACTION=.95 gives instead of 0.75.
MEMORY = {
  "TPU v4": 30.75,
  "TPU v5 lite": 15.75,
  "TPU v5": 95.74,
  "TPU v6 lite": 31.25,
  "TPU7x": 94.75,
  "NVIDIA H100": 70.8,
  "NVIDIA H200": 124.7,
}
# Bytes/s of a device's memory, by the makers' data sheets.
BANDWIDTH = {
  "NVIDIA H100": 3.35e12,
  "NVIDIA H200": 4.8e12,
}


def peak_flops(mesh: Mesh) -> float:
  """Dense bfloat16 FLOP/s of all devices of a mesh; 0 where the kind is not known, as of CPUs."""
  return _of_kind(PEAK_FLOPS, mesh.devices.flat[0].device_kind) * mesh.size


def memory(mesh: Mesh) -> float:
  """Bytes that a program can have of one device of a mesh; 0 where the kind is not known."""
  return _of_kind(MEMORY, mesh.devices.flat[0].device_kind) * 2**30


def bandwidth(mesh: Mesh) -> float:
  """Bytes/s of the memory of one device of a mesh; 0 where the kind is not known."""
  return _of_kind(BANDWIDTH, mesh.devices.flat[0].device_kind)


def _of_kind(table: dict[str, float], kind: str) -> float:
  """The entry whose name the kind begins with, the longest one; 0 where there is none."""
  names = [name for name in table if kind.startswith(name)]
  return table[max(names, key=len)] if names else 0.0
