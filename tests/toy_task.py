"""A task of a few parameters, for tests of the loop; as a command it is slow enough to interrupt.

python -m tests.toy_task WORKDIR SECONDS_A_STEP STEPS_BETWEEN_CHECKPOINTS
"""

from __future__ import annotations

import functools
import time
import types
from pathlib import Path
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from launch.engine import console, loop
from vavae_jax import order


@flax.struct.dataclass
class State:
  """A matrix, its average and a momentum."""

  step: jax.Array
  params: Any
  ema: Any
  momentum: Any


def config(**changes: Any) -> FrozenConfigDict:
  """Settings of a run of 12 steps; `bad_steps` from `bad_step` on have gradients not finite."""
  settings = {
    "seed": 3,
    "batch_size": 4,
    "num_steps": 12,
    "log_every_steps": 2,
    "save_every_steps": 4,
    "evaluate_every_steps": 0,
    "keep_checkpoints": 2,
    "non_finite": "stop",
    "max_skipped_steps": 2,
    "bad_step": 1000,
    "bad_steps": 1,
    "mesh": {"data": -1, "fsdp": 1},
  }
  return FrozenConfigDict(ConfigDict(settings | changes))


def check(config: FrozenConfigDict) -> None:
  """Nothing can be wrong."""
  del config


def init_state(config: FrozenConfigDict, key: jax.Array) -> State:
  """A random matrix."""
  del config
  params = {"w": jax.random.normal(key, (3, 5))}
  zeros = jax.tree.map(jnp.zeros_like, params)
  return State(step=jnp.zeros((), jnp.int32), params=params, ema={"0.8": zeros}, momentum=zeros)


def load_frozen(config: FrozenConfigDict) -> Any:
  """Nothing."""
  del config
  return {}


def phase(config: FrozenConfigDict, step: int) -> str:
  """Two halves that are compiled apart."""
  return "late" if step > 6 else "early"


def flops_per_step(config: FrozenConfigDict) -> float:
  """A multiply-add for each number of the matrix and record, thrice."""
  return 6.0 * 15 * config.batch_size


def train_step(
  config: FrozenConfigDict, phase: str, state: State, frozen: Any, batch: Any, key: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
  """Momentum towards noisy targets; depends on batch, key, phase and all of the state."""
  del frozen

  def loss_fn(params: Any) -> jax.Array:
    noise = jax.random.normal(key, params["w"].shape)
    return jnp.mean((batch["x"] @ params["w"] - batch["x"].sum(-1, keepdims=True)) ** 2) + (
      jnp.mean((params["w"] - noise) ** 2) * (2.0 if phase == "late" else 1.0)
    )

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  bad = (config.bad_step <= state.step + 1) & (state.step + 1 < config.bad_step + config.bad_steps)
  grads = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)
  momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state.momentum, grads)
  params = jax.tree.map(lambda p, m: p - 0.05 * m, state.params, momentum)
  ema = jax.tree.map(lambda e, p: 0.8 * e + 0.2 * p, state.ema, {"0.8": params})
  metrics = {"loss": loss, "grad_norm": jnp.linalg.norm(grads["w"])}
  return State(state.step + 1, params, ema, momentum), metrics


def train_data(
  config: FrozenConfigDict,
  process_index: int,
  process_count: int,
  start: int,
  seconds: float = 0.0,
) -> grain.IterDataset:
  """Random vectors, each batch after a wait."""
  places = order.Order(7, config.seed)

  def load(positions: np.ndarray) -> dict[str, np.ndarray]:
    time.sleep(seconds)
    pairs = zip(*places.records(positions), strict=True)
    rows = [places.rng(record, epoch).normal(size=3) + record for record, epoch in pairs]
    return {"x": np.stack(rows).astype(np.float32)}

  share = order.Share(config.batch_size, process_index, process_count, start, threads=1)
  return order.batches(share, load)


def evaluators(config: FrozenConfigDict) -> dict[str, loop.Evaluator]:
  """The mean of the average."""
  return {
    "toy": (
      config.evaluate_every_steps,
      lambda state: {"mean": float(state.ema["0.8"]["w"].mean())},
    )
  }


def main(argv: list[str]) -> None:
  """The command."""
  _, workdir, seconds, save_every_steps = argv
  slow_data = functools.partial(train_data, seconds=float(seconds))
  slow_task = types.SimpleNamespace(**(globals() | {"train_data": slow_data}))
  loop.run(slow_task, config(num_steps=40, save_every_steps=int(save_every_steps)), Path(workdir))


if __name__ == "__main__":
  console.run_command(main, arguments=3)
