"""What the evaluators of both trainings give on a layout of processes and devices.

  python -m tests.evaluators_everywhere PIPELINE OUTPUT LAYOUT,...

A layout is PROCESSES:DATA:FSDP, such as 2:1:2; a process has DATA x FSDP / PROCESSES devices, of
which no two are neighbours in the mesh. The models are those of the tiny pipeline, with weights of
noise. The first process of each layout writes OUTPUT/LAYOUT.npz with all that they return, by
EVALUATOR/NAME, and with the first batch of each training; with that alone where the layout ends in
":batches". The processes are forks of one, which imports all once.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from launch import restore, tasks
from launch.engine import processes
from launch.engine.step import jit_init
from launch.evaluation import training
from launch.evaluation.features import Network
from tests import forked
from vavae_jax.common import mesh
from vavae_jax.common.batches import in_shares
from vavae_jax.common.optimizer import averaged
from vavae_jax.common.sharding import pin_batch, whole

HELD_OUT, SAMPLES = 11, 41  # which no number of devices divides


def configurations(pipeline: Path) -> list[ConfigDict]:
  """Those of both trainings, to evaluate more."""
  found = [tasks.noted(pipeline / name) for name in ("tokenizer", "diffusion")]
  tokenizer, diffusion = (ConfigDict(config.to_dict()) for config in found)
  tokenizer.teacher.name = ""  # which takes most of the time
  diffusion.latents.update(valid_path=diffusion.latents.path, valid_samples=HELD_OUT)
  diffusion.evaluate_samples = SAMPLES
  return [tokenizer, diffusion]


def cells(_: str) -> Network:
  """Features that compile in no time, in place of EfficientNet's: mixed colours of 16 cells."""

  def apply(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    x = image_BHWC.astype(jnp.float32)
    x = x.reshape(len(x), 4, x.shape[1] // 4, 4, x.shape[2] // 4, 3).mean((2, 4))
    return {"pool": x.reshape(len(x), -1) @ params}

  params = np.random.default_rng(0).normal(size=(48, 8)).astype(np.float32)
  return Network("cells", "FD-cells", {"protocol": "cells"}, params, apply)


def state_of(config: FrozenConfigDict, devices: jax.sharding.Mesh) -> Any:
  """A fresh state, with noise on it, since fresh models give zero."""

  def init(key: jax.Array) -> Any:
    state = tasks.of(config).init_state(config, key)
    leaves, treedef = jax.tree.flatten(averaged(config.optimizer, state))
    keys = jax.random.split(key, len(leaves))
    noisy = [x + 0.05 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    params = jax.tree.unflatten(treedef, noisy)
    return dataclasses.replace(state, ema=dict.fromkeys(state.ema, params))

  key = jax.random.key(config.seed)
  places = mesh.parameter_shardings(jax.eval_shape(init, key), devices)
  return jit_init(init, places)(key)


def first_batch(config: FrozenConfigDict, devices: jax.sharding.Mesh) -> dict[str, np.ndarray]:
  """What a training begins with, as all devices together have it."""
  rows = mesh.own_rows(config.batch_size, devices)
  batch = next(iter(tasks.of(config).train_data(config, rows, 0)))
  processes.wait_for_all()  # the first collective operation allows 30 seconds
  found = jax.jit(functools.partial(jax.tree.map, whole))(mesh.to_global(batch, devices))
  return {f"{config.task}/{name}": mesh.to_host(x) for name, x in found.items()}


def evaluate(config: ConfigDict, workdir: Path) -> dict[str, Any]:
  """All that a training's evaluators give, by EVALUATOR/NAME."""
  frozen = tasks.resolve(config)
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  evaluators = tasks.of(frozen).evaluators(frozen)
  if config.task == "diffusion":
    evaluators |= training.samples(frozen, restore.check_latents(frozen), workdir)
  with jax.set_mesh(devices):
    state, results = state_of(frozen, devices), {}
    for name, (_, run) in evaluators.items():
      told = run(state)
      for some in [told] if isinstance(told, dict) else told:
        results |= {f"{name}/{key}": value for key, value in (some or {}).items()}
  return results


def interleave() -> None:
  """Orders the devices of a mesh so that of each process one comes, then of each the next."""
  make = jax.make_mesh

  def made(*arguments: Any, devices: Any = None) -> jax.sharding.Mesh:
    count = jax.local_device_count()
    mixed = [x for i in range(count) for x in jax.devices()[i::count][::-1]]
    return make(*arguments, devices=devices or mixed)

  jax.make_mesh = made


def in_turns(devices: jax.sharding.Mesh) -> np.ndarray:
  """Seven numbers, doubled a few at a time by all devices together."""
  double = jax.jit(lambda x: pin_batch(2 * x))
  found = [
    x for pair in in_shares(double, lambda rows: np.float32(rows), 7, 2, devices) for x in pair
  ]
  own = {"rows": np.concatenate(found[::2]), "twice": np.concatenate(found[1::2])}
  rows, twice = zip(*((x["rows"], x["twice"]) for x in processes.gather(own)), strict=True)
  return np.concatenate(twice)[np.argsort(np.concatenate(rows))]


def one(pipeline: Path, output: Path, data: int, fsdp: int, kind: str, _: int) -> None:
  """What one process does."""
  interleave()
  mesh.MIN_SHARDED_SIZE = 2**11  # so that the arrays of tiny models are sharded too
  training.load_network = cells
  found: dict[str, Any] = {}
  for config in configurations(pipeline):
    config.mesh.update(data=data, fsdp=fsdp)
    resolved, devices = tasks.resolve(config), mesh.make_mesh(data, fsdp)
    with jax.set_mesh(devices):
      found |= first_batch(resolved, devices) | {"twice": in_turns(devices)}
    if kind != "batches":
      found |= evaluate(config, output.with_suffix(""))
  if not jax.process_index():
    np.savez(output, **found)


def main() -> None:
  """The command."""
  pipeline, output, layouts = *map(Path, sys.argv[1:3]), sys.argv[3].split(",")
  for layout in layouts:
    *numbers, kind = [*layout.split(":"), ""][:4]
    count, data, fsdp = map(int, numbers)
    jax.config.update("jax_num_cpu_devices", data * fsdp // count)
    file = output / f"{layout}.npz"
    forked.job(functools.partial(one, pipeline, file, data, fsdp, kind), count)


if __name__ == "__main__":
  main()
