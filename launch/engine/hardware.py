"""The devices' limits, by which a training reports its utilisation, and settings for them."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Dense bfloat16 FLOP/s of one jax device, from the makers' data sheets; the longest name that
# `device_kind` begins with counts.
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


# Flags for XLA on NVIDIA GPUs, unless XLA_FLAGS says otherwise.
GPU_FLAGS = (
  # Weights of the next block are gathered, and gradients summed, while this one computes.
  "--xla_gpu_enable_latency_hiding_scheduler=true",
)


# The cache of compiled programs, for runs that are started again; JAX_COMPILATION_CACHE_DIR names
# another folder. Not on CPUs: their programs fit one machine, and several may share a home.
PROGRAMS = "~/.cache/vavae_jax/programs"


def expected() -> str:
  """The platform that jax will find, "gpu", "tpu" or "cpu", before it looks."""
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return "cpu"
  if os.path.exists("/dev/nvidiactl"):
    return "gpu"
  tpu = any(os.path.exists(path) for path in ("/dev/accel0", "/dev/vfio/0"))
  return "tpu" if tpu else "cpu"


def prepare() -> None:
  """Sets XLA's flags and the cache for this machine's accelerators, before jax looks for them."""
  platform = expected()
  if platform == "gpu":
    given = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in GPU_FLAGS if flag.partition("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join([given, *missing]).strip()
  if platform != "cpu" and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(PROGRAMS))


# GiB of one device that a program can use: on TPUs as the compiler says when it refuses one; on
# GPUs 0.95 of the memory, as with XLA_PYTHON_CLIENT_MEM_FRACTION=.95 instead of 0.75.
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
  "TPU v4": 1.228e12,
  "TPU v5 lite": 0.819e12,
  "TPU v5": 2.765e12,
  "TPU v6 lite": 1.638e12,
  "TPU7x": 3.69e12,  # of 7.38 a chip, which is two devices
  "NVIDIA H100": 3.35e12,
  "NVIDIA H200": 4.8e12,
}


# KiB of VMEM that one operation of a training step may use on TPUs, if LIBTPU_INIT_ARGS does not
# say it; 0: XLA's own limit, by which products work on smaller pieces.
VMEM_OPTION = "xla_tpu_scoped_vmem_limit_kib"
VMEM: dict[str, float] = {"TPU v5": 65536, "TPU v5 lite": 0, "TPU v6 lite": 65536}


def compiler_options(shardings: Any, task: str | None) -> dict[str, str]:
  """Options for the compiler of a training step whose state lies as a tree of shardings says."""
  # They have been compared for LightningDiT alone.
  for sharding in jax.tree.leaves(shardings)[:1] if task == "diffusion" else ():
    device = next(iter(sharding.device_set))
    kib = _of_kind(VMEM, device.device_kind)
    if kib and VMEM_OPTION not in os.environ.get("LIBTPU_INIT_ARGS", ""):
      return {VMEM_OPTION: f"{kib:.0f}"}
  return {}


def peak_flops(mesh: Mesh) -> float:
  """Dense bfloat16 FLOP/s of all devices of a mesh; 0 for an unknown kind, such as CPUs."""
  return _of_kind(PEAK_FLOPS, mesh.devices.flat[0].device_kind) * mesh.size


def memory(mesh: Mesh) -> float:
  """Bytes of one device of a mesh that a program can use; 0 for an unknown kind."""
  return _of_kind(MEMORY, mesh.devices.flat[0].device_kind) * 2**30


def bandwidth(mesh: Mesh) -> float:
  """Bytes/s of the memory of one device of a mesh; 0 for an unknown kind."""
  return _of_kind(BANDWIDTH, mesh.devices.flat[0].device_kind)


def limit() -> float:
  """Bytes of the first device that a program can use, as its driver says; 0 where none does."""
  return float((jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0))


def product_rate() -> float:
  """FLOP/s of products on all devices, the fastest of a few: without other work.

  On a CPU float32 of 512 x 512, elsewhere bfloat16 of 4096 x 4096.
  """
  cpu = jax.default_backend() == "cpu"  # all cores work on one product, however many devices
  size, dtype, devices = (512, jnp.float32, 1) if cpu else (4096, jnp.bfloat16, jax.device_count())
  x = jnp.ones((size, size), dtype)
  run = jax.jit(jnp.matmul)
  run(x, x).block_until_ready()
  best = math.inf
  for _ in range(50):
    began = time.perf_counter()
    run(x, x).block_until_ready()
    best = min(best, time.perf_counter() - began)
  return 2 * size**3 / best * devices


def _of_kind(table: dict[str, float], kind: str) -> float:
  names = [name for name in table if kind.startswith(name)]
  return table[max(names, key=len)] if names else 0.0
