r"""Trains a tokenizer or a diffusion model, from the start or from where it was stopped.

  python -m launch.train --config=configs/quickstart.py:tokenizer --workdir=runs/tokenizer
  python -m launch.train --config=configs/quickstart.py:diffusion --workdir=runs/diffusion \
    --config.optimizer.learning_rate=3e-4

Every key of the configuration can be set with --config.KEY=VALUE; configs/base.py explains them. In
the workdir: config.json, metrics.jsonl, tensorboard/, checkpoints/. The same command again resumes
exactly. Ctrl-C and SIGTERM save a checkpoint first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
from launch import trained
from launch.engine import configuration, console, loop, mesh
from launch.sample import contact_sheet, make_sampler
from vavae_jax.errors import InputError

PICTURE_SAMPLES = 36


def train(config: ConfigDict, workdir: Path) -> Any:
  """Checks a configuration and trains as it says.

  Args:
    config: with all keys of `configs/base.py` for its task.
    workdir: of this configuration.

  Returns:
    The final state.
  """
  task_name = config.get("task")
  if task_name not in trained.TASKS:
    raise InputError(f"config.task is {task_name!r}; choose one of {sorted(trained.TASKS)}.")
  frozen = configuration.resolve(config, getattr(configs.base, task_name)())
  more = {}
  if task_name == "diffusion":
    # Noted in the workdir's configuration, so that sampling finds out about latents made anew.
    noted = config.copy_and_resolve_references()
    noted.latents.sha256 = trained.check_latents(frozen).sha256
    frozen = FrozenConfigDict(noted)
    more = _sample_pictures(frozen)
  return loop.run(
    trained.TASKS[task_name], frozen, workdir, name=f"train {task_name}", more_evaluators=more
  )


def _sample_pictures(config: FrozenConfigDict) -> dict[str, loop.Evaluator]:
  """Samples of the EMA as one picture, each time from the same noise; none without a tokenizer."""
  if not config.evaluate_every_steps:
    return {}
  model = trained.Trained(Path(), config, 0, None)
  try:
    tokenizer = trained.tokenizer_of(model)
  except InputError as error:
    if config.tokenizer:
      raise
    # Latents outlive their tokenizer's workdir, and training needs nothing but latents.
    console.say(f"no samples will be shown while training: {error}")
    return {}
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  sampler = make_sampler(model, tokenizer, config.sample, seed=0, devices=devices)
  index = np.arange(PICTURE_SAMPLES)
  label = index % config.model.num_classes

  def evaluate(state: Any) -> dict[str, Any]:
    params = state.params if state.ema is None else state.ema
    return {"grid": contact_sheet(sampler(index, label, params))}

  return {"samples": (config.evaluate_every_steps, evaluate)}


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  workdir = Path(FLAGS.workdir)
  state = train(FLAGS.config, workdir)
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
  flags.DEFINE_string("workdir", None, "Where everything is written.", required=True)
  flags.mark_flag_as_required("config")
  console.run_command(main)
