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
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from launch import cached_features, restore, tasks
from launch.attention import choose
from launch.engine import configuration, console, elastic, loop, processes
from launch.engine.checkpoint import batch_sizes, read_config
from launch.engine.evaluators import Evaluator
from launch.engine.log import Told
from launch.evaluation.training import exports, probes, samples
from lightningdit_jax.checks import check_model
from lightningdit_jax.options import ONLY_OURS, Options
from lightningdit_jax.store import space
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common.files import is_url, place
from vavae_jax.data import changes
from vavae_jax.frozen import uses_teacher

# Keys that latents set where they are left at these values.
_OF_LATENTS = {"latents.sha256": "", "model.num_classes": Options.num_classes}


def train(
  config: ConfigDict, workdir: Path, *, with_changes: bool = False, told: Told | None = None
) -> Any:
  """Checks a configuration, with all keys of its task, and trains; returns the final state.

  `with_changes`: goes on in a workdir with another configuration, as `loop.run` allows it. `told`
  is called with each line of the log.
  """
  config = _with_split(config, workdir)
  tasks.frozen(config)  # checks its keys
  config, note = elastic.adapted(config, workdir)
  notes: dict[str, Any] = {elastic.NOTE: note}
  frozen = tasks.frozen(config)
  if "data" in frozen:
    notes[changes.NOTE] = changes.check(workdir, frozen.data, with_changes=with_changes)
    sizes = processes.first_does(lambda: batch_sizes(workdir, config.batch_size))
    frozen = tasks.resolve(config, notes[changes.NOTE]["source"]["epoch"], sizes)
    if "stages" in frozen and len(sizes) > 1:
      ends = ", ".join(map(str, (*frozen.stages.begins[1:], frozen.num_steps)))
      console.say(f"batches had {len(sizes)} sizes: the stages end after {ends} steps")
  if config.task == "diffusion":
    check_model(frozen)
  if not (workdir / configuration.NAME).exists():  # what was begun needs them no more
    restore.initial_file(frozen)
  _say_unreached(frozen)
  given = dict(configuration.flat(frozen.to_dict()))
  return loop.run(
    tasks.of(config),
    frozen,
    workdir,
    name=f"train {config.task}",
    prepare=functools.partial(_prepared, frozen, workdir, notes),
    unset=[key for key, default in _OF_LATENTS.items() if given.get(key) == default],
    initial_weights=functools.partial(restore.initial_weights, frozen),
    may_change=[f"model.{name}" for name in ONLY_OURS],
    with_changes=with_changes,
    told=told,
  )


def _say_unreached(config: FrozenConfigDict) -> None:
  """Says which steps of a schedule the training ends before, as where a recipe is cut short."""
  last = {"optimizer.decay_steps": config.optimizer.decay_steps - 1}
  if config.task == "diffusion":
    last["transport.lognorm_until"] = config.transport.lognorm_until
    last["route.until"] = config.route.until if config.route.share else 0
  if config.task == "tokenizer":
    begins, starts = config.stages.begins, config.stages.disc_start
    last["stages.epochs"] = begins[-1]
    last["stages.disc_start"] = min(map(sum, zip(begins, starts, strict=True)))
    if not config.loss.disc_weight:
      del last["stages.disc_start"]
  late = [key for key, step in last.items() if step >= config.num_steps]
  late = [f"config.{key}={operator.attrgetter(key)(config)}" for key in late]
  if late:
    console.say(f"config.num_steps is {config.num_steps}: training ends short of {', '.join(late)}")


def _prepared(
  config: FrozenConfigDict, workdir: Path, notes: Mapping[str, Mapping[str, Any]]
) -> loop.Prepared:
  """Copies latents, or makes a teacher's features, where there are none."""
  more: dict[str, Evaluator] = {}
  if config.task == "diffusion":
    store = restore.check_latents(config)
    config = _on_latents(config, store, workdir)
    notes = {**notes, space.NOTE: space.Space.of(store).note()}
    more = samples(config, store, workdir)
  more |= probes(config, workdir) | exports(config, workdir)
  if config.task == "tokenizer" and uses_teacher(config):
    if (scale := config.teacher.scale) > 1:
      console.say(f"the teacher sees pictures {scale} times as large: config.teacher.scale")
    if config.teacher.cache:
      cached_features.make(config)
  return loop.Prepared(config, more, notes)


def _on_latents(config: FrozenConfigDict, store: LatentStore, workdir: Path) -> FrozenConfigDict:
  """The configuration with what its latents and the machine say.

  Their hash is noted so that sampling finds out about latents made anew.
  """
  noted = ConfigDict(config.to_dict())
  noted.latents.sha256 = store.sha256
  count = len(store.manifest.get("class_names", []))
  if count and config.model.num_classes == Options.num_classes != count:
    console.say(f"config.model.num_classes is {count}, as many as {store.path} has")
    noted.model.num_classes = count
  noted.model.attention = choose(config, workdir)
  return FrozenConfigDict(noted)


def _with_split(config: ConfigDict, workdir: Path) -> ConfigDict:
  """The configuration with the split that its workdir notes, where it names none."""
  if "data" not in config or config.data.get("split") != "":
    return config
  begun = read_config(workdir) if (workdir / "config.json").exists() else {}
  config = config.copy_and_resolve_references()
  config.data.split = begun.get("data", {}).get("split", "name")
  return config


def main() -> None:
  workdir = place(FLAGS.workdir)
  with console.naming({"--tokenizer": "--config.tokenizer"}):
    state = train(FLAGS.config, workdir, with_changes=FLAGS.resume_with_changes)
  rows = [
    ("steps", str(int(state.step))),
    ("checkpoints", str(workdir / "checkpoints")),
    ("losses", str(workdir / "metrics.jsonl")),
  ]
  if "tensorboard" in FLAGS.config.log_to:
    rows.append(("TensorBoard", f"tensorboard --logdir {workdir}"))
  console.table("Trained", ("what", "where"), rows)
  beside = workdir.name if is_url(workdir) else workdir
  if FLAGS.config.task == "tokenizer":
    console.say_next("encode", f"--workdir={workdir}", f"--output={beside}_latents")
  elif FLAGS.config.task == "diffusion":
    output = f"--output={beside}_samples.npz"
    noted = space.Space.read(workdir / space.NOTE).tokenizer
    lacks = restore.lacking(noted, workdir, FLAGS.config.tokenizer)
    console.say_next("sample", f"--workdir={workdir}", output, "--num_samples=64", *lacks)
  else:
    words = (f"--weights={workdir}", f"--output={beside}_statistics.npz", "--reference=PICTURES")
    console.say_next("evaluate", "statistics", "--protocol=classifier", *words)


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
  console.run_command(main, several=True)
