r"""Whole trainings of the PyTorch reference and of this project, side by side.

  python -m launch.lab.equivalence training --reference=LIGHTNINGDIT --torch_python=PYTHON \
    --config.source=zip:cifar10_train.zip --workdir=runs/training

Trains a tokenizer, writes its latents as published, and trains LightningDiT on them by the
reference's own `train.py` and by launch.train, from the same weights, several seeds each. Compares
curves, losses, averages and samples, exchanges weights between the samplers and states between the
trainings, and repeats the reference's first steps here with the same batches, times and noise.

  python -m launch.lab.equivalence training --reference=LIGHTNINGDIT --taming=TAMING \
    --torch_python=PYTHON --config=configs/lab/training.py:vavae \
    --config.source=zip:cifar10_train.zip --workdir=runs/training_vavae

trains a tokenizer by the reference's own `training_step` and by launch.train, likewise. All of it
runs on the CPU, --jobs at a time; `taskset -c 0` before it gives it one core. If it is stopped, the
same command continues; --page_only writes the page of the results so far.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import FrozenConfigDict

from configs.lab import training
from launch.engine import command_line, configuration, console
from launch.engine.circumstances import whole_command
from launch.engine.subcommands import Subcommand
from launch.lab import reference
from launch.lab.equivalence import judging, pieces, side_page, tokenizer_page, tokenizer_pieces
from launch.lab.equivalence.pieces import RECORD, Settings
from launch.lab.jobs import Job, run
from vavae_jax.common.errors import InputError

CONFIG = f"{training.__file__}:cifar"
# The jobs that no released command does.
PIECES = {
  function.__name__: function
  for function in (
    *(pieces.initial, pieces.theirs, pieces.ours_fed, pieces.to_ours, pieces.to_theirs),
    *(judging.inputs, judging.real, judging.judged_by_ours, judging.judged_by_theirs),
    *(tokenizer_pieces.pictures, tokenizer_pieces.tokenizer_initial),
    *(tokenizer_pieces.tokenizer_theirs, tokenizer_pieces.tokenizer_fed),
  )
}
SEED = 100  # added to the seeds of trainings that go on with the other side's state


def settings_of(experiment: FrozenConfigDict, root: Path, given: reference.Checkouts) -> Settings:
  """What all pieces share; models learn from latents, and begin with weights, of the workdir."""
  if training.of_tokenizers(experiment.size):
    config = training.vavae(experiment.size)
    config.data.source = experiment.source
    config.teacher.weights = str(root / "teacher.pt")
    config.perceptual.vgg = config.init_from = str(root / "initial.pt")
  else:
    config = training.diffusion(experiment.size)
    config.latents.update(path=str(root / "latents"), valid_path=str(root / "held_out"))
  return Settings(root, experiment, FrozenConfigDict(config), given)


class Jobs:
  """Makes jobs: pieces, and trainings by `launch.train`."""

  CHANGES = ("source", "fed_steps", "num_samples")  # keys of an experiment that jobs get

  def __init__(self, settings: Settings):
    self.settings, self.root = settings, settings.root
    experiment = settings.experiment
    self.config = [f"--config={os.path.relpath(training.__file__)}:{experiment.size}"]
    changes = {name: experiment[name] for name in self.CHANGES if name in experiment}
    self.config += [f"--config.{name}={value}" for name, value in changes.items()]
    contents = (experiment.to_dict(), settings.config.to_dict())
    # What only some jobs take is among their words.
    others = ("seeds", "crossed_samples", "continued_steps")
    self.content = json.dumps([{k: x for k, x in c.items() if k not in others} for c in contents])
    self.content = self.content.replace(str(self.root), ".")

  def _piece(
    self,
    name: str,
    output: str,
    given: dict[str, Any],
    needs: tuple[str, ...],
    piece: str = "",
    weight: float = 0.5,
  ) -> Job:
    """One of `PIECES`; a training's output is the note in its folder."""
    path = self.root / (output or f"{name}/about.json")
    checkouts = self.settings.checkouts
    words = ["launch.lab.equivalence", "piece", *self.config, f"--workdir={self.root}"]
    words += [f"--reference={checkouts.lightningdit}", f"--torch_python={checkouts.python}"]
    words += [f"--taming={checkouts.taming}"] * bool(checkouts.taming)
    words += [f"--piece={piece or name.rpartition('/')[2]}", f"--output={path}"]
    words += [f"--given={json.dumps(given)}"]
    return Job(name, tuple(words), path, content=self.content, needs=needs, weight=weight)

  def _train(
    self,
    name: str,
    part: str,
    changes: tuple[str, ...],
    needs: tuple[str, ...],
    *,
    weight: float,
    output: Path | None = None,
  ) -> Job:
    size = self.settings.experiment.size
    words = ["launch.train", f"--config={os.path.relpath(training.__file__)}:{size},{part}"]
    words += [f"--workdir={output.parent.parent if output else self.root / name}"]
    words += [f"--config.{change}" for change in changes]
    resumes, content = output is None, training.get_config(f"{size},{part}").to_json()
    return Job(name, tuple(words), output or self.root / name, resumes, content, needs, weight)


class Graph(Jobs):
  """The jobs that compare diffusion trainings, those that answer soonest first."""

  def jobs(self) -> Iterator[Job]:
    """All of them."""
    yield from self._latents()
    yield self._piece("initial", "initial.pt", {}, ("latents",))
    yield from self._fed()
    yield self._piece("inputs", "inputs.npz", {}, ("held_out", "latents"))
    yield self._piece("real", "real.json", {}, ("held_out", "latents"))
    first, *others = self.settings.experiment.seeds
    yield from self._trained(first)
    yield from self._crossed(first)
    yield from self._continued(first)
    for seed in others:
      yield from self._trained(seed)

  def _latents(self) -> Iterator[Job]:
    source = self.settings.experiment.source
    yield self._train("tokenizer", "tokenizer", (f"data.source={source}",), (), weight=1)
    for name, more in (("latents", ()), ("held_out", ("--held_out",))):
      output = self.root / name
      words = ("launch.encode", f"--workdir={self.root / 'tokenizer'}", f"--output={output}", *more)
      yield Job(name, (*words, "--batch_size=128"), output, resumes=True, needs=("tokenizer",))

  def _fed(self) -> Iterator[Job]:
    """Both sides with the same random numbers."""
    needs, record = ("initial", "latents"), str(self.root / "fed" / "theirs" / RECORD)
    half = self.settings.half
    checkpoint = self.root / "fed" / "theirs" / "run" / "checkpoints" / f"{half:07d}.pt"
    handed = {"record": record, "checkpoint": str(checkpoint)}
    state = {"seed": 0, "fed": True, "replay": record}
    state["state"] = str(self.root / "fed" / "ours" / "state.npz")
    yield self._piece("fed/theirs", "", {"seed": 0, "fed": True}, needs)
    yield self._piece("fed/ours", "", {"record": record}, ("fed/theirs",), "ours_fed")
    threads = {"seed": 0, "fed": True, "threads": 2}
    yield self._piece("fed/threads", "", threads, needs, "theirs")
    yield self._piece("fed/to_ours", "", handed, ("fed/theirs",), "ours_fed")
    yield self._piece("fed/to_theirs", "", state, ("fed/ours",), "theirs")

  def _trained(self, seed: int) -> Iterator[Job]:
    """A training of each side, and its figures by its own side."""
    yield self._piece(f"theirs/seed{seed}", "", {"seed": seed}, ("initial",), "theirs", 5)
    initial = f"init_from={self.root / 'initial.pt'}"
    paths = [f"latents.{k}={self.settings.config.latents[k]}" for k in ("path", "valid_path")]
    changes = (initial, *paths, f"seed={seed}")
    name = f"ours/seed{seed}"
    yield self._train(name, "diffusion", changes, ("initial", "held_out"), weight=5)
    for side in ("theirs", "ours"):
      yield self._judged(side, f"{side}/seed{seed}")

  def _crossed(self, seed: int) -> Iterator[Job]:
    count = self.settings.experiment.crossed_samples
    yield self._judged("ours", f"theirs/seed{seed}", {"count": count}, weight=0.5)
    yield self._judged("theirs", f"ours/seed{seed}", {"count": count}, weight=0.5)

  def _continued(self, seed: int) -> Iterator[Job]:
    """Each side's training, continued on the other side from its middle on."""
    half = self.settings.config.num_steps // 2
    steps = half + self.settings.experiment.continued_steps
    folder = self.root / "continued" / "theirs_by_ours"
    given = {"checkpoint": str(self._checkpoint(f"theirs/seed{seed}", half)), "step": half}
    given["workdir"] = str(folder)
    needs = (f"theirs/seed{seed}", "held_out")
    yield self._piece("to_ours", "continued/to_ours.json", given, needs)
    paths = [f"latents.{k}={self.settings.config.latents[k]}" for k in ("path", "valid_path")]
    last = folder / "checkpoints" / str(steps)
    changes = (*paths, f"seed={SEED + seed}", f"num_steps={steps}")
    name = "continued/theirs_by_ours"
    yield self._train(name, "diffusion", changes, ("to_ours",), weight=1, output=last)
    state = self.root / "continued" / "to_theirs.npz"
    given = {"workdir": str(self.root / f"ours/seed{seed}"), "step": half}
    trained = f"ours/seed{seed}"
    yield self._piece("to_theirs", "continued/to_theirs.npz", given, (trained,))
    given = {"seed": SEED + seed, "state": str(state), "steps": steps}
    name = "continued/ours_by_theirs"
    yield self._piece(name, "", given, ("to_theirs",), "theirs")

  def _judged(
    self, side: str, training: str, more: dict[str, int] | None = None, weight: float = 2
  ) -> Job:
    name = f"judged/{training.replace('/', '_')}_by_{side}"
    last = self.settings.config.num_steps
    is_ours = training.startswith("ours")
    weights = self.root / training if is_ours else self._checkpoint(training, last)
    needs = (training, "inputs")
    given = {"weights": str(weights), **(more or {})}
    return self._piece(name, f"{name}.json", given, needs, f"judged_by_{side}", weight)

  def _checkpoint(self, training: str, step: int) -> Path:
    return self.root / training / "run" / "checkpoints" / f"{step:07d}.pt"


class TokenizerGraph(Jobs):
  """The jobs that compare trainings of tokenizers, those that answer soonest first."""

  def jobs(self) -> Iterator[Job]:
    """All of them."""
    needs, config = ("pictures", "initial"), self.settings.config
    yield self._piece("pictures", "pictures.npz", {}, ())
    yield self._piece("initial", "initial.pt", {}, (), "tokenizer_initial")
    fed = {"seed": tokenizer_pieces.SEED, "fed": True}
    record = {"record": str(self.root / "fed" / "theirs" / RECORD)}
    yield self._piece("fed/theirs", "", fed, needs, "tokenizer_theirs", 2)
    yield self._piece("fed/ours", "", record, ("fed/theirs",), "tokenizer_fed", 2)
    yield self._piece("fed/threads", "", fed | {"threads": 2}, needs, "tokenizer_theirs", 2)
    paths = {"data.source": config.data.source, "init_from": config.init_from}
    paths |= {"teacher.weights": config.teacher.weights, "perceptual.vgg": config.perceptual.vgg}
    for seed in self.settings.experiment.seeds:
      name = f"theirs/seed{seed}"
      yield self._piece(name, "", {"seed": seed}, needs, "tokenizer_theirs", 10)
      changes = (*(f"{key}={value}" for key, value in paths.items()), f"seed={seed}")
      yield self._train(f"ours/seed{seed}", "tokenizer", changes, ("initial",), weight=8)


def graph_of(settings: Settings) -> list[Job]:
  """All jobs of a comparison."""
  graph = TokenizerGraph if training.of_tokenizers(settings.experiment.size) else Graph
  return list(graph(settings).jobs())


def _settings() -> Settings:
  of_tokenizers = training.of_tokenizers(str(FLAGS.config.get("size", "")))
  known = training.tokenizer_experiment() if of_tokenizers else training.experiment()
  experiment = configuration.resolve(FLAGS.config, known.to_dict())
  if not experiment.seeds or experiment.fed_steps < 2 or experiment.fed_steps % 2:
    raise InputError("config.seeds must name some, and config.fed_steps be even and 2 or more.")
  given = reference.checkouts(compiled=False)
  if given is None:
    raise InputError("--reference is missing; give a checkout of hustvl/LightningDiT.")
  given.check()
  if of_tokenizers:
    given.check_taming()
  return settings_of(experiment, FLAGS.workdir.absolute(), given)


def main() -> None:
  os.environ["JAX_PLATFORMS"] = "cpu"  # of the jobs, where the reference is
  settings = _settings()
  jobs = graph_of(settings)
  file = FLAGS.page or settings.root / "training.md"
  page: Any = tokenizer_page if training.of_tokenizers(settings.experiment.size) else side_page
  page.REGION.check(file)
  command = whole_command(("page", "page_only", "jobs"))
  write_page = functools.partial(page.write, settings, jobs, file, command)
  if FLAGS.page_only:
    write_page()
  else:
    settings.checkouts.check_python("scipy", "safetensors")
    console.say(f"{len(jobs)} jobs, {FLAGS.jobs} at a time; logs in {settings.root / 'logs'}")
    run(jobs, settings.root, FLAGS.jobs, write=write_page)
  rows = [("page", str(file)), ("workdir", str(settings.root))]
  console.table("Trainings side by side", ("what", "where"), rows)


def piece() -> None:
  FLAGS.output.parent.mkdir(parents=True, exist_ok=True)
  PIECES[FLAGS.piece](_settings(), FLAGS.output, **json.loads(FLAGS.given))


FLAGS = flags.FLAGS


def _define_flags() -> None:
  reference.define_flags()
  configuration.define_flag("The settings; by default configs/lab/training.py:cifar.")
  command_line.define_output("workdir", "runs/training", "The folder for all results.")


def _define_training_flags() -> None:
  _define_flags()
  flags.DEFINE_integer("jobs", 1, "Jobs at a time.", lower_bound=1)
  command_line.define_output("page", None, "The page; by default training.md in the workdir.")
  flags.DEFINE_boolean("page_only", False, "Run no job, write the page of the results so far.")


def _define_piece_flags() -> None:
  _define_flags()
  flags.DEFINE_enum("piece", None, [*PIECES], "Which piece.", required=True)
  command_line.define_output("output", None, "What it writes.", required=True)
  flags.DEFINE_string("given", "{}", "Its arguments in JSON.")


SUBCOMMANDS = {
  "training": Subcommand(__doc__ or "", main, _define_training_flags, CONFIG),
  "piece": Subcommand(
    "One of the jobs that `training` starts.", piece, _define_piece_flags, CONFIG
  ),
}
