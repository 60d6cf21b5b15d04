"""The pieces of `launch.lab.equivalence training` for tokenizers; folders are as in `pieces`.

Both sides begin with the reference's own random weights. Only the discriminator is ours, since
`launch.train` always begins it afresh: that of the seed, which the reference gets too.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from launch.engine.step import jit_init
from launch.lab import reference
from launch.lab.equivalence import training as by_name
from launch.lab.equivalence.pieces import Settings, ask
from vavae_jax import convert, frozen, stages, training, update
from vavae_jax.common import functional
from vavae_jax.common.files import atomic_file, write_json
from vavae_jax.data import images, selection
from vavae_jax.weights.state_dicts import read_content
from vavae_jax.weights.torch_weights import StateDict

SCRIPT = "whole_tokenizer.py"
SEED = 0  # of the initial weights, and of fed trainings
JUDGE = "loss.discriminator."


def pictures(settings: Settings, output: Path) -> None:
  """What both sides train on, and the held-out pictures that both are rated by."""
  config = settings.config
  chosen = {
    "train": selection.training_pictures(config),
    "held_out": selection.evaluation_pictures(config),
  }
  size = config.data.image_size
  made: Any = {name: images.load_crops(*pair, size) for name, pair in chosen.items()}
  np.savez(output, **made)


def tokenizer_initial(settings: Settings, output: Path) -> None:
  """The weights of all networks under the reference's names, and those of the teacher alone."""
  ask(SCRIPT, settings, _job(settings, output) | {"work": "initial", "seed": SEED, "threads": 1})


def tokenizer_theirs(
  settings: Settings, output: Path, *, seed: int, threads: int = 1, fed: bool = False
) -> None:
  """A training by the reference's `training_step`; `fed`: only the first steps, recorded."""
  config, root = settings.config, settings.root
  judge = root / f"discriminator{seed}.npz"
  with atomic_file(judge) as file:
    np.savez(file, **fresh_discriminator(config, seed))
  job = _job(settings, root / "initial.pt") | {
    "work": "train",
    "seed": seed,
    "threads": threads,
    "discriminator": str(judge),
    "pictures": str(root / "pictures.npz"),
    "batch_size": config.batch_size,
    "steps": settings.experiment.fed_steps if fed else config.num_steps,
    "folder": str(output.parent),
    "record": fed,
    "snapshots": settings.snapshots if fed else [],
    "rate_every": 0 if fed else config.evaluate_every_steps,
  }
  write_json(output, ask(SCRIPT, settings, job))


def tokenizer_fed(settings: Settings, output: Path, *, record: str) -> None:
  """Our update on what a training of the reference drew; parameters are kept as its are."""
  config = settings.config
  with np.load(record) as file:
    drawn = {name: file[name] for name in ("image", "noise")}
  state = by_name.training_state(config, first_weights(settings))
  weights, phase = frozen.load(config), stages.phase_of(config, 1)

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state: update.State, weights: Any, image: jax.Array, noise: jax.Array) -> Any:
    networks = frozen.merge(config, weights)
    return update.update(config, phase, state, networks, {"image": image}, noise)

  output.parent.mkdir(parents=True, exist_ok=True)
  logged: dict[str, list[float]] = {name: [] for name in by_name.LOGGED}
  for i in range(settings.experiment.fed_steps):
    pair = (jnp.asarray(np.moveaxis(drawn[name][i], 1, -1)) for name in drawn)
    state, metrics = step(state, weights, *pair)
    for theirs, ours in by_name.LOGGED.items():
      logged[theirs].append(float(metrics[ours]))
    if i + 1 in settings.snapshots:
      parts = state.params, state.discriminator, state.discriminator_statistics
      named: Any = by_name.training_names(config, *jax.device_get(parts))
      np.savez(output.parent / f"{i + 1}.npz", **named)
  write_json(output, {"logged": logged})


def first_weights(settings: Settings) -> StateDict:
  """All weights that fed trainings begin with, under the reference's names."""
  return read_content(settings.root / "initial.pt") | fresh_discriminator(settings.config, SEED)


def fresh_discriminator(config: FrozenConfigDict, seed: int) -> dict[str, Any]:
  """The discriminator that `launch.train` begins with, under the reference's names."""

  def judge(key: jax.Array) -> tuple[Any, Any]:
    state = training.init_state(config, key)
    return state.discriminator, state.discriminator_statistics

  key, _ = jax.random.split(jax.random.key(seed))  # as `launch.engine.loop` has it
  graph = functional.graph_of(update.build_discriminator(config))
  made = nnx.merge(graph, *jax.device_get(jit_init(judge)(key)))
  named = convert.discriminator_to_torch(made).items()
  return {JUDGE + name: x for name, x in named if not name.endswith(convert.COUNTER)}


def logged_by(folder: Path, every: int) -> dict[str, np.ndarray]:
  """By the reference's names, the means of `every` steps of what either side has logged."""
  if (folder / "losses.json").is_file():
    logged = json.loads((folder / "losses.json").read_text())["logged"]
    return {name: np.reshape(logged[name], (-1, every)).mean(1) for name in by_name.LOGGED}
  lines = [line for line in _lines(folder) if "loss" in line]
  return {
    theirs: np.array([line[ours] for line in lines]) for theirs, ours in by_name.LOGGED.items()
  }


def rated(folder: Path) -> dict[int, float]:
  """PSNR of the held-out pictures after steps of a training by either side, by its own code."""
  if (folder / "losses.json").is_file():
    found = json.loads((folder / "losses.json").read_text())["psnr"]
    return {int(step): value for step, value in found.items()}
  name = "reconstruction/psnr"
  return {line["step"]: line[name] for line in _lines(folder) if name in line}


def _lines(folder: Path) -> list[dict[str, Any]]:
  return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _job(settings: Settings, weights: Path) -> dict[str, Any]:
  checkouts = settings.checkouts
  return {
    "checkout": str(checkouts.lightningdit.absolute()),
    "weights": str(weights),
    "teacher_weights": settings.config.teacher.weights,
    **reference.training_job(settings.config, checkouts),
  }
