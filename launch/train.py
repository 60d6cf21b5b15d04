r"""Trains a tokenizer or a diffusion model, from the start or from where it was stopped.

  python -m launch.train --config=configs/quickstart.py:tokenizer --workdir=runs/tokenizer
  python -m launch.train --config=configs/quickstart.py:diffusion --workdir=runs/diffusion \
    --config.optimizer.learning_rate=3e-4

Every key of the configuration can be set with --config.KEY=VALUE; docs/configuration.md lists them.
In the workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/. The same command again
resumes exactly. Ctrl-C and SIGTERM save a checkpoint first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

import vavae_jax.training
from launch import restore, tasks
from launch.attention import choose
from launch.engine import configuration, console, loop, mesh
from launch.engine.checkpoint import read_config
from launch.engine.log import NotFinite
from launch.engine.ownership import owned
from launch.evaluation.features import EFFICIENTNET, load_network
from launch.evaluation.pictures import Array, own_pictures
from launch.evaluation.reference import gaussian_of, statistics_of
from launch.evaluation.sample_files import contact_sheet
from launch.sample import make_sampler
from lightningdit_jax.model import ONLY_OURS
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place, remove_partial
from vavae_jax.common.optimizer import averaged
from vavae_jax.data import changes, feature_cache, selection
from vavae_jax.frozen import uses_teacher
from vavae_jax.metrics.distribution import Gaussian

PICTURE_SAMPLES = 36
REFERENCE_PICTURES = 10_000


def train(config: ConfigDict, workdir: Path, *, with_changes: bool = False) -> Any:
  """Checks a configuration, with all keys of its task, and trains; returns the final state.

  `with_changes`: goes on in a workdir with another configuration, as `loop.run` allows it.
  """
  config = _with_split(config, workdir)
  frozen, notes, more = tasks.frozen(config), {}, {}
  if "data" in frozen:
    notes[changes.NOTE] = changes.check(workdir, frozen.data)
    frozen = tasks.resolve(config, notes[changes.NOTE]["source"]["epoch"])
  if config.task == "tokenizer" and uses_teacher(frozen):
    if (scale := frozen.teacher.scale) > 1:
      console.say(f"the teacher sees pictures {scale} times as large: config.teacher.scale")
    if frozen.teacher.cache:
      _cache_features(frozen)
  elif config.task == "diffusion":
    # Noted in the workdir's configuration, so that sampling finds out about latents made anew.
    noted = config.copy_and_resolve_references()
    noted.latents.sha256 = restore.check_latents(frozen).sha256
    noted.model.attention = choose(frozen, workdir)
    frozen = FrozenConfigDict(noted)
    more = _sample_pictures(frozen)
  return loop.run(
    tasks.of(config),
    frozen,
    workdir,
    name=f"train {config.task}",
    more_evaluators=more,
    initial_weights=functools.partial(restore.initial_weights, frozen),
    may_change=[f"model.{name}" for name in ONLY_OURS],
    notes=notes,
    with_changes=with_changes,
  )


def _with_split(config: ConfigDict, workdir: Path) -> ConfigDict:
  """The configuration with the split that its workdir notes, where it names none."""
  if "data" not in config or config.data.get("split") != "":
    return config
  begun = read_config(workdir) if (workdir / "config.json").exists() else {}
  config = config.copy_and_resolve_references()
  config.data.split = begun.get("data", {}).get("split", "name")
  return config


def _cache_features(config: FrozenConfigDict) -> None:
  """Runs the teacher over all pictures, once and for all."""
  if jax.process_count() > 1:
    return  # they open a cache that another run made, and report where there is none
  vavae_jax.training.check(config)
  pictures = selection.training_pictures(config)
  path = feature_cache.place_of(config, *pictures)
  if not path.is_file():
    with owned(path, beside=True), console.Bar("teacher's features", len(pictures[1]), 0) as bar:
      remove_partial(path.parent, path.name)  # left by a run that was killed
      feature_cache.build(config, *pictures, bar.update)
  console.say(f"the teacher's features are in {path}")


def _sample_pictures(config: FrozenConfigDict) -> dict[str, loop.Evaluator]:
  """Samples of the EMA as one picture and, if asked, their Frechet distance to training pictures.

  Always from the same noise; none where the tokenizer is gone.
  """
  if not config.evaluate_every_steps:
    return {}
  if jax.process_count() > 1:
    console.say("training shows no samples: with several processes it cannot sample yet")
    return {}
  try:
    tokenizer = restore.tokenizer_of(config)
  except InputError as error:
    if config.tokenizer or config.evaluate_samples:
      raise
    # Latents outlive their tokenizer's workdir, and training needs nothing but latents.
    console.say(f"training shows no samples: {error}")
    return {}
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  sampler = make_sampler(config, tokenizer, config.sample, seed=0, devices=devices)
  distance = _distance(config, tokenizer) if config.evaluate_samples else None
  index = np.arange(max(PICTURE_SAMPLES, config.evaluate_samples))
  label = index % config.model.num_classes

  def show(state: Any) -> dict[str, Any]:
    try:
      pictures = sampler(averaged(config.optimizer, state), index, label)
    except NotFinite as error:  # training goes on: its own numbers are watched by the loop
      console.say(f"warning: {error}")
      return {}
    result = {"grid": contact_sheet(pictures[:PICTURE_SAMPLES])}
    return result | (distance(pictures) if distance else {})

  return {"samples": (config.evaluate_every_steps, show)}


def _distance(
  config: FrozenConfigDict, tokenizer: restore.Trained
) -> Callable[[np.ndarray], dict[str, float]]:
  """FD-EfficientNet of few samples to pictures that the tokenizer saw, to compare steps by.

  Few samples bias it upwards, so it compares only with sets of the same size.
  """
  # What is not there is missed now, not at the first evaluation.
  network = load_network(EFFICIENTNET)
  real = own_pictures(tokenizer, held_out=False, limit=REFERENCE_PICTURES)

  @functools.cache
  def reference() -> Gaussian:
    return gaussian_of(statistics_of(real, network, "reference"))

  def distance(pictures: np.ndarray) -> dict[str, float]:
    drawn = Array(pictures[: config.evaluate_samples])
    moments = statistics_of(drawn, network, "samples").moments["pool"]
    return {network.key: reference().distance(moments.mean, moments.cov).distance}

  return distance


def main() -> None:
  workdir = place(FLAGS.workdir)
  state = train(FLAGS.config, workdir, with_changes=FLAGS.resume_with_changes)
  console.table(
    "Trained",
    ("what", "where"),
    [
      ("steps", str(int(state.step))),
      ("checkpoints", str(workdir / "checkpoints")),
      ("losses", str(workdir / "metrics.jsonl")),
      ("TensorBoard", f"tensorboard --logdir {workdir}"),
    ],
  )


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("configs/NAME.py or configs/NAME.py:ARGUMENT")
  flags.DEFINE_string("workdir", None, "Folder for everything it writes.", required=True)
  flags.DEFINE_boolean(
    "resume_with_changes",
    False,
    "Goes on in a workdir with another configuration, if the model and the state's arrays stay as "
    "they are; changes.jsonl notes step, key, old and new value.",
  )
  flags.mark_flag_as_required("config")
  console.run_command(main)
