"""A task of a few parameters, for tests of the loop; as a command it is slow enough to interrupt.

  python -m tests.toy_task WORKDIR SECONDS_A_STEP STEPS_BETWEEN_CHECKPOINTS [KEY=VALUE,...]

There is a file WORKDIR/evaluating while it evaluates, which takes five times as long as a step, or
with TOY_EVALUATES_FOR_EVER in the environment does not end, outside of Python. Data of the
positions in TOY_STALLS_AT never come, and those of the process in TOY_SLOW=PROCESS:SECONDS so late.
"""

from __future__ import annotations

import functools
import os
import time
import types
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from launch.engine import console, loop
from vavae_jax.common.files import place
from vavae_jax.data import order


@flax.struct.dataclass
class State:
  """A matrix, its average and a momentum."""

  step: jax.Array
  params: Any
  ema: Any
  momentum: Any


def config(**changes: Any) -> FrozenConfigDict:
  """Settings of a run of 12 steps; `bad_steps` from `bad_step` on have gradients not finite, and
  the data of the batch `nan_batch`, counted from 0, are NaN; in the step `bad_update` loss and
  gradients are finite and the new average is not. The matrix has `width` columns.
  """
  settings = {
    "seed": 3,
    "batch_size": 4,
    "num_steps": 12,
    "log_every_steps": 2,
    "log_to": ("tensorboard",),
    "save_every_steps": 4,
    "evaluate_every_steps": 0,
    "keep_checkpoints": 2,
    "keep_every_steps": 0,
    "keep_best": "",
    "non_finite": "stop",
    "max_skipped_steps": 2,
    "bad_step": 1000,
    "bad_steps": 1,
    "nan_batch": 1000,
    "bad_update": 1000,
    "width": 5,
    "workers": 0,
    "report_waits_after": 1.0,
    "mesh": {"data": -1, "fsdp": 1},
  }
  return FrozenConfigDict(ConfigDict(settings | changes))


def check(config: FrozenConfigDict) -> None:
  """Nothing can be wrong."""
  del config


def init_state(config: FrozenConfigDict, key: jax.Array) -> State:
  """A random matrix."""
  params = {"w": jax.random.normal(key, (3, config.width))}
  zeros = jax.tree.map(jnp.zeros_like, params)
  return State(step=jnp.zeros((), jnp.int32), params=params, ema={"0.8": zeros}, momentum=zeros)


def load_frozen(config: FrozenConfigDict) -> Any:
  """Nothing."""
  del config
  return {}


def phase(config: FrozenConfigDict, step: int) -> str:
  """Two halves that are compiled apart."""
  return "late" if step > 6 else "early"


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
  bad = state.step + 1 == config.bad_update
  ema = jax.tree.map(lambda e: jnp.where(bad, jnp.inf, e), ema)
  metrics = {"loss": loss, "grad_norm": jnp.linalg.norm(grads["w"])}
  return State(state.step + 1, params, ema, momentum), metrics


def data_source(config: FrozenConfigDict) -> str:
  """Numbers."""
  del config
  return "random vectors"


def train_data(
  config: FrozenConfigDict,
  rows: np.ndarray | None,
  start: int,
  seconds: float = 0.0,
) -> grain.IterDataset:
  """Random vectors, each batch after a wait."""
  share = order.Share(config.batch_size, rows, start, threads=1, workers=config.workers)
  return order.batches(share, functools.partial(_load, config, seconds))


def _load(config: FrozenConfigDict, seconds: float, positions: np.ndarray) -> dict[str, np.ndarray]:
  time.sleep(seconds)
  if str(positions[0]) in os.environ.get("TOY_STALLS_AT", "").split(","):
    time.sleep(1000)
  places = order.Order(7, config.seed)
  pairs = zip(*places.records(positions), strict=True)
  rows = [places.rng(record, epoch).normal(size=3) + record for record, epoch in pairs]
  if positions[0] // config.batch_size == config.nan_batch:
    rows[0][:] = np.nan
  return {"x": np.stack(rows).astype(np.float32)}


def evaluators(config: FrozenConfigDict) -> dict[str, loop.Evaluator]:
  """The mean of the average."""
  return {
    "toy": (
      config.evaluate_every_steps,
      lambda state: {"mean": float(state.ema["0.8"]["w"].mean())},
    )
  }


@jax.jit
def _never_ends(x: jax.Array) -> jax.Array:
  return jax.lax.while_loop(lambda x: x > 0, lambda x: x * 0.5 + 1.0, x)


def main(*words: str) -> None:
  """The command."""
  workdir, seconds = place(words[0]), float(words[1])
  changes = {"num_steps": 40, "save_every_steps": int(words[2])}
  for word in words[3].split(",") if len(words) > 3 else ():
    key, _, value = word.partition("=")
    changes[key] = int(value) if value.isdigit() else value

  def slow_evaluators(config: FrozenConfigDict) -> dict[str, loop.Evaluator]:
    every, evaluate = evaluators(config)["toy"]

    def slowly(state: State) -> dict[str, float]:
      (workdir / "evaluating").touch()
      if "TOY_EVALUATES_FOR_EVER" in os.environ:
        _never_ends(1.0).block_until_ready()
      time.sleep(5 * seconds)
      (workdir / "evaluating").unlink(missing_ok=True)  # of several processes one is first
      return evaluate(state)

    return {"toy": (every, slowly)}

  process, _, own = os.environ.get("TOY_SLOW", "").partition(":")
  if process == str(jax.process_index()):
    seconds = float(own)
  slow = {
    "train_data": functools.partial(train_data, seconds=seconds),
    "evaluators": slow_evaluators,
  }
  loop.run(types.SimpleNamespace(**(globals() | slow)), config(**changes), workdir)


if __name__ == "__main__":
  console.run_command(main, arguments=4, several=True)
