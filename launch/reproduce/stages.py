"""The stages that make a published number, each of which goes on where it was stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from ml_collections import FrozenConfigDict

from launch import restore
from launch.encode import encode
from launch.engine import console
from launch.engine.writers import curve, read_metrics
from launch.evaluation import generation, reconstruction
from launch.evaluation.figures import Options
from launch.evaluation.output import Output
from launch.evaluation.pictures import FromSource
from launch.evaluation.reference import open_reference
from launch.evaluation.sample_files import Npz
from launch.reproduce.checked import Checked
from launch.reproduce.given import Given
from launch.reproduce.recipes import config_of
from launch.reproduce.records import Record
from launch.sample import sample_set
from launch.train import train
from vavae_jax.common.files import read_note

# Of a recipe's sampling; the JSON has all.
_TOLD = (
  *("num_samples", "labels", "mode", "method", "num_steps", "timestep_shift", "cfg_scale"),
  *("cfg_interval_start", "cfg_channels", "dtype"),
)
T = TypeVar("T")


def beside(record: Record) -> Callable[[int, dict[str, float]], None]:
  """A function for each line of a training's log that compares with the published one."""

  def told(step: int, values: dict[str, float]) -> None:
    if step in record.log:
      off, allowed = values["mse"] / record.log[step] - 1, record.allowed(step)
      published = f"mse {values['mse']:.4f}, published {record.log[step]:.4f}, {off:+.1%}"
      warning = f"; WARNING: more than {allowed:.0%} apart" if abs(off) > allowed else ""
      console.say(f"step {step:,}: {published}{warning}")

  return told


def kind(record: Record) -> str:
  """The evaluation that gives the figures, which is also the name of its files."""
  return "generation" if record.recipe else "reconstruction"


def settings(record: Record) -> list[tuple[str, str]]:
  """What a number is made with, for people."""
  protocol = (record.protocol, "the posterior's samples, smallest side to 256, centre crop")
  if not record.recipe:
    return [("recipe", record.tokenizer.recipe), ("protocol", ", ".join(protocol))]
  config = config_of(record.recipe, record.changes)
  drawn = {**config.published, **config.sample}
  told = ", ".join(f"{name} {drawn[name]}" for name in _TOLD)
  training = f"{record.recipe}, {config.num_steps:,} steps of {config.batch_size:,}"
  return [("recipe", training), ("sampling", told), ("protocol", record.protocol)]


def run(
  record: Record, given: Given, checked: Checked, workdir: Path
) -> tuple[dict[str, float], dict[str, Any]]:
  """Runs the stages, or what is left of them: (the figures, more for the result).

  Of several processes the first has both.
  """
  seconds: dict[str, float] = {}

  def stage(name: str, work: Callable[[], T]) -> T:
    console.say(f"{len(seconds) + 1}. {name}")
    began = time.monotonic()
    found = work()
    seconds[name] = round(time.monotonic() - began, 1)
    return found

  make = _generate if record.recipe else _rebuild
  figures = make(record, given, checked, workdir, stage)
  if jax.process_index():
    return {}, {}
  mse = dict(curve(read_metrics(workdir / "diffusion"), "mse"))
  log = {step: {"here": mse[step], "published": x} for step, x in record.log.items() if step in mse}
  evaluation = read_note(workdir / f"{kind(record)}.json")
  return figures, {"log": log, "seconds": seconds, "evaluation": evaluation}


def _generate(
  record: Record, given: Given, checked: Checked, workdir: Path, stage: Any
) -> dict[str, float]:
  """Latents and training if asked for, samples, FID."""
  tokenizer, diffusion, config = checked.tokenizer, checked.diffusion, checked.config
  if given.train and not given.latents:
    source = given.pictures or record.pictures.source
    stage("Latents", lambda: encode(tokenizer, workdir / "latents", source=source))
  if given.train:
    stage("Training", lambda: train(config, workdir / "diffusion", told=beside(record)))
    diffusion = restore.load(workdir / "diffusion", "diffusion")
  settings: Any = FrozenConfigDict(config)
  drawn = {"settings": settings.sample, "seed": given.seed, **settings.published.to_dict()}
  path = workdir / "samples.npz"
  stage("Samples", lambda: sample_set(diffusion, tokenizer, path, **drawn))

  def evaluate() -> dict[str, float]:
    samples, output = Npz(path), Output(workdir / "generation", "generation")
    about = {"samples": samples.about, "network": checked.network.about}
    if (done := _done(output.json, about)) is not None:
      return done
    options = Options(precision_recall="precision" in record.figures)
    reference = open_reference(
      *(checked.reference, checked.network),
      size=samples.size,
      keep=options.precision_recall,
      progress=output.progress,
    )
    return generation.evaluate(samples, reference, checked.network, output, options=options)

  return stage("Evaluation", evaluate)


def _rebuild(
  record: Record, given: Given, checked: Checked, workdir: Path, stage: Any
) -> dict[str, float]:
  """Training if asked for, then rFID and the rest, by the reference's protocol."""
  made = checked.tokenizer
  if given.train:
    stage("Training", lambda: train(checked.config, workdir / "tokenizer"))
    made = restore.load(workdir / "tokenizer", "tokenizer")

  def evaluate() -> dict[str, float]:
    spec = given.validation or record.validation.source
    pictures = FromSource(spec, made.config.data.image_size, crop="resize")
    output, lpips = Output(workdir / "reconstruction", "reconstruction"), checked.lpips
    of, network = {"step": made.step, "sha256": made.sha256}, checked.network
    about = {"pictures": pictures.about, "tokenizer": of, "network": network.about}
    done = _done(output.json, about | {"seed": given.seed})
    if done is not None and ("lpips" in done) == (lpips is not None):
      return done
    return reconstruction.evaluate(*(made, pictures, network, output), seed=given.seed, lpips=lpips)

  return stage("Evaluation", evaluate)


def _done(path: Path, about: Mapping[str, Any]) -> dict[str, float] | None:
  """The figures of an evaluation that was made of the same before; None if there is none."""
  note = read_note(path) if path.is_file() else {}
  same = all(note.get(name) == value for name, value in about.items())
  return note["figures"] if note and same else None
