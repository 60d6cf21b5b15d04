"""One row of a benchmark's table: what something costs here."""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

import lightningdit_jax.checks
from launch import tasks
from launch.engine import flops, hardware
from launch.engine.checkpoint import Checkpoints, survey
from launch.engine.step import jit_init, without_recomputation
from launch.evaluation.reference import feature_options
from launch.lab import programs
from launch.lab.benchmark import loading
from launch.lab.benchmark.measuring import (
  Prepared,
  copy_rate,
  matmul_rate,
  peak_memory,
  timed,
)
from launch.lab.reference import NEEDS, Checkouts, job_of
from launch.lab.torch_process import SCRIPTS, TorchProcess
from lightningdit_jax.sampling import time_grid
from vavae_jax.common import functional, mesh
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import inception
from vavae_jax.metrics.distribution import frechet_distance

ROUNDS = 2  # of ours and the reference's in turn
FID_BATCH = 50
RECORDS = 5_000
Row = dict[str, Any]


def resolved(
  config: ConfigDict, what: str, batch_size: int, attention: str = ""
) -> FrozenConfigDict:
  """The configuration of a row, checked; InputError where it has a mistake."""
  changed = config.copy_and_resolve_references()
  if what == "sample":  # whose key is of each device
    changed.sample.batch_size, rest = divmod(batch_size, jax.device_count())
    if rest:
      raise InputError(f"{batch_size} samples do not divide over {jax.device_count()} devices.")
  else:
    changed.batch_size = batch_size
  if config.task == "diffusion":
    changed.model.attention = attention
  frozen = tasks.resolve(changed, num_images=10**6)
  if config.task == "diffusion":
    lightningdit_jax.checks.check_model(frozen)
  return frozen


def measure(
  config: FrozenConfigDict,
  what: str,
  steps: int,
  checkouts: Checkouts | None = None,
) -> Row:
  """Times `steps` runs of a program, after one more, in rounds with the reference's if it is given.

  The two do not take turns run by run: each would pay for memory that the other has just freed.
  `what` is one of `programs.WHAT` or "fid".
  """
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  program = _program(config, devices, what)
  dtype = config.sample.dtype if what == "sample" else config.dtype
  dtype = "float32" if what == "fid" else dtype
  row: Row = {"what": what, "dtype": dtype, "batch_size": program.images}
  if what == "train" and config.task == "diffusion":
    row["attention"] = config.model.attention
  before = peak_memory()
  reference: TorchProcess | None = None
  if checkouts and what in programs.ALL:
    job = job_of(checkouts, config, what, program.images)
    reference = TorchProcess(checkouts.python, SCRIPTS / "steps.py", job, NEEDS)
  try:
    with reference or contextlib.nullcontext():
      prepared = prepare(config, devices, program, what)
      timed(prepared.run)
      ours, theirs = [], []
      for _ in range(ROUNDS if reference else 1):
        ours += [timed(prepared.run) for _ in range(steps + 1)][1:]
        if reference:
          theirs += [reference.ask("again").get("seconds") for _ in range(steps + 1)][1:]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return row | {"out_of_memory": True}
  seconds = float(np.median(ours))
  work = useful_flops(config, devices, what, prepared.flops)
  row |= {
    "seconds": seconds,
    "fastest": min(ours),
    "images_per_second": program.images / seconds,
    "model_tflops_per_second": work / seconds / 1e12,
    "program_gib": prepared.memory / 2**30,
    "compile_cold": prepared.compile_cold,
    "compile_warm": prepared.compile_warm,
    **_beside_limits(work, prepared.least_bytes, seconds, dtype, devices),
  }
  # The device counts for the whole process: the peak is this row's where the row raised it.
  if (most := peak_memory()) > before:
    row["peak_gib"] = most / 2**30
  if reference:
    row |= _beside_reference(reference, theirs, seconds, program.images)
  if what == "fid":
    row["arithmetic_seconds"] = _arithmetic_seconds()
  return row


def _program(config: FrozenConfigDict, devices: Mesh, what: str) -> programs.Program:
  if what == "fid":
    return _fid_program(devices)
  return programs.of(config, devices, what, 1, coded=config.batch_size)


def prepare(
  config: FrozenConfigDict, devices: Mesh, program: programs.Program, what: str
) -> Prepared:
  """A program ready to run; training begins with fresh parameters."""
  if what != "train":
    return Prepared(program, devices)
  init = functools.partial(tasks.of(config).init_state, config)
  shardings = mesh.parameter_shardings(jax.eval_shape(init, jax.random.key(0)), devices)
  with jax.set_mesh(devices):
    return Prepared(program, devices, jit_init(init, shardings)(jax.random.key(0)))


def useful_flops(config: FrozenConfigDict, devices: Mesh, what: str, computed: float) -> float:
  """FLOPs of a run that are the model's, of those that the program computes.

  Left out are what the backward pass computes again, and, in Euler's method, unconditional halves
  where guidance is off, which the trace has in a branch. How often adaptive solvers leave these
  halves out is not known.
  """

  def count_of(changed: FrozenConfigDict) -> float:
    return programs.count(_program(changed, devices, what), devices)

  if what == "train" and (plain := without_recomputation(config)) != config:
    return count_of(plain)
  if what != "sample" or (config.sample.mode, config.sample.method) != ("ODE", "euler"):
    return computed
  t = time_grid(config.sample.num_steps, config.sample.timestep_shift)[:-1]
  off = float((t < config.sample.cfg_interval_start).mean())
  if config.sample.cfg_scale == 1 or not off:
    return computed
  unguided = ConfigDict(config.to_dict())
  unguided.sample.cfg_scale = 1.0
  return computed - off * (computed - count_of(FrozenConfigDict(unguided)))


def _beside_limits(
  work: float, least_bytes: float, seconds: float, dtype: str, devices: Mesh
) -> Row:
  """Shares of what the devices can do: products alone, with memory, and by the data sheet."""
  # Virtual devices share a CPU, and a product on one of them takes all of it.
  count = 1 if jax.default_backend() == "cpu" else devices.size
  products = work / matmul_rate(dtype) / count
  copies = least_bytes / copy_rate() / count
  row = {
    "least_gib": least_bytes / 2**30,
    "share_of_matmul": products / seconds,
    "share_of_ceiling": max(products, copies) / seconds,
  }
  if peak := hardware.peak_flops(devices):
    row["mfu"] = work / seconds / peak
  return row


def _beside_reference(
  reference: TorchProcess, theirs: list[float | None], seconds: float, images: int
) -> Row:
  """What the reference took in turns with ours."""
  about = {name: x for name, x in reference.about.items() if name.startswith("torch")}
  fitting = [each for each in theirs if each is not None]
  if len(fitting) < len(theirs):
    return {"torch_out_of_memory": True, **about}
  median = float(np.median(fitting))
  return {
    "torch_seconds": median,
    "torch_fastest": min(fitting),
    "torch_images_per_second": images / median,
    "times_torch": median / seconds,
    **about,
  }


def count(config: FrozenConfigDict, what: str) -> Row:
  """FLOPs of a program, and the bytes that it cannot avoid, as a row; nothing runs.

  Bytes are those of arguments and results, each once: what is between them may stay on the chip,
  and weights that a loop reads in each round are more.
  """
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  program = _program(config, devices, what)
  traced = programs.traced(program, devices)
  arrays = jax.tree.leaves((program.arrays, traced.out_info))
  work = flops.count(traced.jaxpr)
  least = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
  return {
    "what": what,
    "batch_size": program.images,
    "tflop_per_image": work / program.images / 1e12,
    "least_gib": least / 2**30,
    "flop_per_byte": work / least,
  }


def _fid_program(devices: Mesh) -> programs.Program:
  """FID's Inception by ADM's protocol on pictures of 256 pixels, with random weights."""
  graph, weights = nnx.split(functional.abstract(lambda rngs: inception.InceptionV3(rngs=rngs)))
  prepare = inception.PROTOCOLS["adm"]

  def features(params: Any, image_BHWC: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(prepare(image_BHWC))["pool3"]

  size = mesh.round_up(FID_BATCH, devices)
  params = programs.everywhere(nnx.to_pure_dict(weights), devices)
  image = programs.rows((size, 256, 256, 3), jnp.uint8, devices)
  return programs.Program(
    jax.jit(features, compiler_options=feature_options()), (params, image), {}, 1, size
  )


def _arithmetic_seconds() -> float:
  """Of one Frechet distance of 2,048 features."""
  draw = np.random.default_rng(0)
  halves = [np.cov(draw.standard_normal((2 * 2048, 2048)), rowvar=False) for _ in range(2)]
  began = time.perf_counter()
  frechet_distance(np.zeros(2048), halves[0], np.ones(2048), halves[1])
  return time.perf_counter() - began


def measure_loader(config: FrozenConfigDict, batches: int) -> Row:
  """Times batches as training loads them, from random latents or photograph-like JPEGs."""
  with tempfile.TemporaryDirectory() as folder:
    if config.task == "diffusion":
      side = config.model.input_size
      store = loading.make_store(Path(folder), RECORDS, (side, side, config.model.in_channels))
      begin = loading.latent_batches(store, config.batch_size, config.loader)
    else:
      begin = loading.picture_batches(config.batch_size, config.loader, config.data.image_size)
    seconds = loading.timed_batches(begin, 2)(batches)
  return {
    "what": "loader",
    "batch_size": config.batch_size,
    "seconds": seconds / batches,
    "images_per_second": batches * config.batch_size / seconds,
  }


def measure_checkpoint(config: FrozenConfigDict, steps: int) -> Row:
  """Times steps during which one checkpoint is written, in turns with as many without one."""
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  program = programs.of(config, devices, "train", 1)
  prepared = prepare(config, devices, program, "train")
  timed(prepared.run)
  seconds: dict[str, list[float]] = {"plain": [], "saving": [], "blocked": [], "written": []}
  for _ in range(ROUNDS):
    seconds["plain"].append(sum(timed(prepared.run) for _ in range(steps)))
    with tempfile.TemporaryDirectory() as folder:
      checkpoints = Checkpoints(Path(folder))
      state, _ = jax.block_until_ready(prepared.run())
      began = time.perf_counter()
      checkpoints.save(state, config.to_dict())
      seconds["blocked"].append(time.perf_counter() - began)
      for _ in range(steps):
        timed(prepared.run)
      seconds["saving"].append(time.perf_counter() - began)
      checkpoints.close()
      seconds["written"].append(time.perf_counter() - began)
      size = sum(found.size for found in survey(Path(folder)))
  median = {name: float(np.median(x)) for name, x in seconds.items()}
  return {
    "what": "checkpoint",
    "batch_size": config.batch_size,
    "steps": steps,
    "seconds": median["plain"] / steps,
    "checkpoint_gib": size / 2**30,
    "blocked_seconds": median["blocked"],
    "written_after_seconds": median["written"],
    "cost": median["saving"] / median["plain"] - 1,
  }
