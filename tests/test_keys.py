"""Every key of every task with values that make little sense: refused in one line, or trained.

`python -m tests.test_keys LATENTS`, with the latents of a tiny quickstart, takes minutes: it also
traces a training step of whatever is accepted, and prints the counts of docs/reliability.md.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from configs import base, quickstart
from configs.lab import dilemma
from launch import tasks
from launch.engine import loop
from launch.engine.configuration import flat
from launch.train import train
from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import Key
from vavae_jax.data import sources

NUMBERS = (-1, 0, 1, 3, 10**12, -(10**12), 10**40)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-30, 0.5, 7.0, 1e30, 1e300)
TEXTS = ("", "x", "no/such", "\0", "\udcff", "x" * 10**4, "[*]?{", "../..")
OTHERS = (None, True, (), ("x",), (math.nan,), (-1,), (0,), (1,) * 100)
# What the traced step depends on.
TRACED = (
  *("dtype", "batch_size", "train", "accumulate_steps", "model", "discriminator", "loss"),
  *("stages", "teacher", "transport", "optimizer", "sample"),
)


def mutations(key: Key) -> Iterator[Any]:
  """Values of all kinds, and the key's choices; of a list, those as its only item."""
  items = (*NUMBERS, *FLOATS, *TEXTS, *(() if isinstance(key.within, str) else key.within))
  yield from ((item,) for item in items) if key._takes_list else items
  yield from OTHERS


def smallest(task: str, latents: str) -> ConfigDict:
  """The smallest configuration of a task."""
  if task == "classifier":
    return dilemma.judge("tiny")
  config = quickstart.get_config(f"{task},tiny")
  if task == "diffusion":
    config.latents.path = latents
  return config


def changed(config: ConfigDict, name: str, value: Any) -> ConfigDict:
  new = ConfigDict(config.to_dict())
  *sections, last = name.split(".")
  node = functools.reduce(lambda node, section: node[section], sections, new)
  with node.unlocked(), node.ignore_type():
    node[last] = value
  return new


def accepted(config: ConfigDict) -> FrozenConfigDict:
  """The resolved configuration, checked as `launch.train` does it."""
  resolved = tasks.resolve(config)
  loop.check(resolved)
  tasks.of(config).check(resolved)
  return resolved


@pytest.fixture
def latents(pipeline, monkeypatch):
  """The tiny pipeline's latents; pictures are decoded in other tests."""
  monkeypatch.setattr(sources, "check_readable", lambda source: None)
  return str(pipeline / "latents")


def refused(work: Callable[[], Any], named: str = "") -> bool:
  """Whether `work` ends with one line about the input, which names the key; no other error may."""
  try:
    work()
  except InputError as error:
    message = str(error)
  else:
    return False
  assert "\n" not in message
  assert named in message
  return True


def possible(config: ConfigDict) -> Iterator[tuple[str, list[Any], int]]:
  """(key, its possible values, the number of tried ones); the table refuses the others by name."""
  for name, key in flat(base.KEYS[config.task]):
    tried = [(value, changed(config, name, value)) for value in mutations(key)]
    fit = [
      value
      for value, new in tried
      if not refused(functools.partial(tasks.frozen, new), f"config.{name} is ")
    ]
    yield name, fit, len(tried)


@pytest.mark.parametrize("task", base.KEYS)
def test_every_key_is_refused_by_name_or_fits_the_data(task, latents):
  config, count = smallest(task, latents), 0
  for name, values, tried in possible(config):
    count += tried
    refused(functools.partial(accepted, changed(config, name, values[-1])))
  assert count > 1_000


def traced(config: FrozenConfigDict) -> None:
  """Outlines the state and the last training step."""
  task = tasks.of(config)
  state = jax.eval_shape(functools.partial(task.init_state, config), jax.random.key(config.seed))
  size = config.batch_size
  if config.task == "diffusion":
    side, channels = config.model.input_size, config.model.in_channels
    batch = {"latent": jax.ShapeDtypeStruct((size, side, side, channels), jnp.float32)}
  else:
    side = config.data.image_size
    batch = {"image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8)}
  batch["label"] = jax.ShapeDtypeStruct((size,), jnp.int32)
  step = functools.partial(task.train_step, config, task.phase(config, config.num_steps))
  jax.eval_shape(step, state, task.load_frozen(config), batch, jax.random.key(0))


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("optimizer.learning_rate", 100.0),
    ("model.class_dropout_prob", 1),
    ("transport.shifted_mu", -20.0),
  ],
)
def test_extremes_train(name, value, latents, tmp_path):
  config = changed(smallest("diffusion", latents), name, value)
  config.update(num_steps=2, evaluate_every_steps=0)
  assert train(config, tmp_path / "run").step == 2


def test_rate_clipping_dtype_and_batch_may_change_and_the_model_may_not(latents, tmp_path):
  config = smallest("diffusion", latents)
  config.update(num_steps=2, evaluate_every_steps=0, optimizer={"clip_norm": 0.0})
  train(config, tmp_path / "run")
  config.update(num_steps=3, batch_size=8, dtype="bfloat16")
  config.optimizer.update(clip_norm=1.0, learning_rate=1e-5)
  assert train(config, tmp_path / "run", with_changes=True).step == 3
  assert train(config, tmp_path / "run").step == 3
  config.model.num_heads = 1
  with pytest.raises(InputError, match=r"1 now\); .* the configuration it was begun with\.$"):
    train(config, tmp_path / "run")
  with pytest.raises(InputError, match="num_heads: 2 there, 1 now"):
    train(config, tmp_path / "run", with_changes=True)


def main(latents: str) -> None:
  """The command."""
  for task in base.KEYS:
    config = smallest(task, latents)
    counts = dict.fromkeys(("tried", "refused by the table", "refused with the data", "traced"), 0)
    for name, values, tried in possible(config):
      counts["tried"] += tried
      counts["refused by the table"] += tried - len(values)
      for value in values:
        new = changed(config, name, value)
        if refused(functools.partial(accepted, new)):
          counts["refused with the data"] += 1
        elif name.split(".")[0] in TRACED:
          counts["traced"] += 1
          traced(accepted(new))
    print(task, counts, flush=True)


if __name__ == "__main__":
  main(sys.argv[1])


@pytest.mark.parametrize(
  "change",
  [{"stages.epochs": (1.0, -1.0)}, {"stages.vf_weight": (0.5, "a", None)}, {"batch_size": 0}],
)
def test_each_stage_is_held_against_the_table(change):
  config = base.tokenizer()
  config.update_from_flattened_dict(change)
  with pytest.raises(InputError, match=rf"config\.{next(iter(change))} is .*; give a"):
    tasks.frozen(config)
