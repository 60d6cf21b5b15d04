r"""The whole pipeline on your pictures, or on the package's: from pictures to samples and a page.

  python -m launch.quickstart --pictures=DIR --workdir=runs/mine
  python -m launch.quickstart --workdir=runs/quickstart

Trains a small VA-VAE aligned with EfficientNet-Lite0, encodes the pictures, trains a small
LightningDiT on the latents, samples with guidance, evaluates, and writes report.html and a model
folder. Stopped at any point, the same command goes on
where it was.

--pictures is a folder of class folders, a .zip or .tar of such, or any source of docs/data.md.
Number and names of the classes come from it; configs/pictures.py chooses sizes and steps for the
machine and the number of pictures: five minutes to an hour on two CPU cores, told before the
start. Without it the pictures are 1,852 emoji that the package carries, and configs/quickstart.py
holds the settings: a quarter of an hour. Each can be set with --config.PART.KEY=VALUE.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

import lightningdit_jax.checks
import vavae_jax.training
from configs import pictures, quickstart
from launch import export, restore, tasks
from launch.encode import encode
from launch.engine import configuration, console, hardware, loop
from launch.engine.checkpoint import read_config
from launch.engine.ownership import owned
from launch.evaluation import generation, overview, reconstruction
from launch.evaluation.features import EFFICIENTNET, Network, load_network
from launch.evaluation.figures import Options
from launch.evaluation.output import Output
from launch.evaluation.pictures import own_pictures
from launch.evaluation.reference import reference_of, statistics_of
from launch.evaluation.sample_files import Npz
from launch.sample import sample_set
from launch.train import train
from vavae_jax import folder
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import at_home, check_outputs, local_place, read_note, write_json
from vavae_jax.data import selection, sources

CONFIG = f"{quickstart.__file__}:pipeline"
OWN = f"{pictures.__file__}:"

EMOJI_RUN, OWN_RUN = "runs/quickstart", "runs/pictures"
TIMINGS = "timings.json"  # seconds of each stage, over all runs in a workdir


def run(config: ConfigDict, workdir: Path, *, with_changes: bool = False) -> dict[str, float]:
  """Runs all stages, or the remaining ones, of `configs/quickstart.py:pipeline` in a workdir.

  `with_changes` is of both trainings; see `launch.train`.

  Returns:
    The figures: {"psnr": ..., "ssim": ..., "fd_efficientnet": ..., "precision": ..., ...}.
  """
  _check(configuration.resolve(config, quickstart.KEYS), workdir)
  config.diffusion.latents.path = str((workdir / "latents").absolute())
  resolved = FrozenConfigDict(config)
  workdir.mkdir(parents=True, exist_ok=True)
  timings, numbers = workdir / TIMINGS, itertools.count(1)
  seconds = _seconds(timings) if timings.is_file() else {}

  def stage(name: str, work: Callable[[], Any]) -> Any:
    """Runs a stage and writes down its time, also when it is interrupted."""
    console.say("")
    console.say(f"[{next(numbers)}/6] {name}")
    began = time.monotonic()
    try:
      return work()
    finally:
      seconds[name] = seconds.get(name, 0.0) + time.monotonic() - began
      write_json(timings, seconds)

  def trained(task: str) -> restore.Trained:
    with _names_of(task):
      train(config[task], workdir / task, with_changes=with_changes)
    return restore.load(workdir / task, task)

  tokenizer = stage("Tokenizer", lambda: trained("tokenizer"))
  encoding = resolved.encode.to_dict() | {"max_corrupt": resolved.tokenizer.data.max_corrupt}
  with _names_of("tokenizer", {"--max_corrupt": "config.tokenizer.data.max_corrupt"}):
    store = stage("Latents", lambda: encode(tokenizer, workdir / "latents", **encoding))
  diffusion = stage("Diffusion", lambda: trained("diffusion"))
  drawing = resolved.sample.to_dict()
  with _names_of("diffusion", {f"--{name}": f"config.sample.{name}" for name in drawing}):
    stage("Samples", lambda: sample_set(diffusion, tokenizer, workdir / "samples.npz", **drawing))
  network = load_network(EFFICIENTNET)
  with _names_of("tokenizer"):
    results = stage("Evaluation", lambda: _evaluate(tokenizer, network, workdir))

  def report() -> None:
    overview.write(resolved, workdir, tokenizer, store, results, network, seconds)
    model = workdir / "diffusion" / "model"
    if folder.is_model(model):  # of its training, which could not know these figures
      export.export(
        restore.for_use(diffusion, tokenizer),
        model,
        workdir=workdir / "diffusion",
        evaluations=[workdir / f"{name}.json" for name in ("generation", "reconstruction")],
        picture=(model / folder.PICTURE).read_bytes(),
      )

  stage("Report", report)
  return results


def _names_of(task: str, more: Mapping[str, str] | None = None) -> AbstractContextManager[None]:
  """In messages of a stage: the keys of a training, and flags, as the whole configuration has them.

  Folders inside of the workdir are the pipeline's own to choose.
  """
  own = {"config.": f"config.{task}.", "--tokenizer": f"--config.{task}.tokenizer"}
  return console.naming({**own, "--output": "--workdir", **(more or {})})


def _seconds(timings: Path) -> dict[str, float]:
  """Those of each stage that ran before."""
  numbers: dict[str, Any] = dict.fromkeys(read_note(timings), int | float)
  return read_note(timings, **numbers)


def fit(config: ConfigDict, spec: str, workdir: Path) -> None:
  """Fits a configuration of `configs.pictures` to somebody's pictures and says what it will do.

  What was begun in the workdir goes on with its own numbers, whatever was added to the pictures.
  """
  spec = _source_of(spec)
  source = selection.opened(spec)
  count, names = len(source), source.class_names
  if count < pictures.LEAST:
    raise InputError(f"{spec} has {count} pictures; the pipeline needs {pictures.LEAST} or more.")
  first, second = config.tokenizer, config.diffusion
  for part in (first, second):
    if (workdir / part.task / configuration.NAME).exists():
      pictures.go_on(part, read_config(workdir / part.task))
  first.data.source = spec
  train, held_out = _split(source, first.data)
  seconds = pictures.fit(
    config,
    classes=len(names),
    train=len(train),
    machine="cpu" if jax.default_backend() == "cpu" else "accelerator",
    rate=hardware.product_rate(),
    memory=hardware.limit(),
  )
  shown = ", ".join(names[: pictures.CLASSES_SHOWN])
  more = ", ..." if len(names) > pictures.CLASSES_SHOWN else ""
  rows = [
    ("pictures", f"{count:,} from {spec}, {len(held_out):,} of them held out"),
    ("classes", f"{len(names)}: {shown}{more}"),
    ("tokenizer", f"{first.num_steps:,} steps of {first.batch_size}, {first.data.image_size} px"),
    ("diffusion model", f"{second.num_steps:,} steps of {second.batch_size}"),
    ("samples", f"{config.sample.num_samples:,}"),
    ("time", f"{_about(seconds)}, an estimate"),
    ("to change it", "--config.tokenizer.num_steps=N --config.diffusion.num_steps=N"),
  ]
  console.table("Your pictures", ("what", "how"), rows)


def _split(source: sources.Source, data: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
  """Indices for training and held out; sets the share, where nobody did, to hold out two."""
  shares = pictures.SHARES if data.held_out is None else (data.held_out,)
  for share in shares:
    data.held_out = min(share, pictures.MOST_HELD_OUT / len(source)) if shares[1:] else share
    try:
      train, held_out = selection.split(source, FrozenConfigDict(data))
    except InputError:  # none is held out
      if share == shares[-1]:
        raise
      continue
    if len(held_out) >= 2:
      break
  return train, held_out


def _source_of(given: str) -> str:
  """The source that --pictures names: a folder, an archive, or any of docs/data.md."""
  path = Path(at_home(given))
  if path.is_dir():
    return f"folder:{path.absolute()}"
  if path.exists() and (kind := path.suffix.lower()) in (".zip", ".tar"):
    return f"{kind[1:]}:{path.absolute()}"
  if path.exists() or ":" not in given:
    wrong = "is no folder, .zip or .tar" if path.exists() else "does not exist"
    raise InputError(
      f"--pictures is {given}, which {wrong}; give a folder of class folders, a .zip or a .tar of "
      "such, or a source such as hf:NAME."
    )
  return given


def _about(seconds: float) -> str:
  """A time as people say it."""
  minutes = max(1, round(seconds / 60))
  return f"about {seconds / 3600:.1f} hours" if minutes > 99 else f"about {minutes} minutes"


def _check(config: FrozenConfigDict, workdir: Path) -> None:
  """Checks the later stages as far as possible before the first one takes its minutes."""
  for kind in ("reconstruction", "generation"):
    Output(workdir / kind, kind)
  files = ("samples.npz", "samples.json", "samples.png", "report.html")
  folders = ("tokenizer", "latents", "diffusion", "samples.parts")
  check_outputs(*([workdir / name for name in names] for names in (files, folders)))
  with _names_of("tokenizer"):
    first = tasks.resolve(config.tokenizer)
    loop.check(first)
    vavae_jax.training.check(first)
  with _names_of("diffusion"):
    second = tasks.frozen(config.diffusion)
    loop.check(second)
    lightningdit_jax.checks.check_model(second)
  _check_pictures(first, second)
  if second.latents.valid_path:
    with _names_of("diffusion"):
      lightningdit_jax.checks.check_store(second, restore.open_latents(second.latents.valid_path))
  for key in ("latents.path", "latents.sha256", "tokenizer"):
    value, usual = map(operator.attrgetter(key), (second, quickstart.diffusion()))
    if value != usual:
      raise InputError(
        f"config.diffusion.{key} is {value!r}, but the quickstart trains on the latents of the "
        "tokenizer in its workdir; leave it out, or run launch.train alone."
      )
  for part in (first, second):
    if not (workdir / part.task / configuration.NAME).exists():  # what was begun goes on as it is
      with _names_of(part.task):
        _check_initial_weights(part)
  shape = vavae_jax.training.latent_shape(first)
  wanted = (second.model.input_size, second.model.input_size, second.model.in_channels)
  if shape != wanted:
    raise InputError(
      f"config.tokenizer makes latents of {shape}, config.diffusion takes {wanted} (height, width, "
      "channels): change config.diffusion.model.input_size and in_channels, or the tokenizer."
    )


def _check_initial_weights(config: FrozenConfigDict) -> None:
  """Raises InputError where a training could not begin with the weights of `config.init_from`."""
  if adopt := restore.initial_weights(config):
    init = functools.partial(tasks.TASKS[config.task].init_state, config)
    jax.eval_shape(adopt, jax.eval_shape(init, jax.random.key(0)))


def _check_pictures(first: FrozenConfigDict, second: FrozenConfigDict) -> None:
  """Checks the pictures, of which everything is made, against what the later stages need."""
  source, trained = selection.training_pictures(first)
  _, held_out = selection.split(selection.opened(first.data.source), first.data)
  what, classes = first.data.source, len(source.class_names)
  if classes != second.model.num_classes:
    raise InputError(
      f"{what} has {classes} classes, but config.diffusion.model.num_classes is "
      f"{second.model.num_classes}; set it to {classes}."
    )
  if len(trained) < second.batch_size:
    raise InputError(
      f"{what} has {len(trained)} pictures for training, fewer than one batch of "
      f"config.diffusion.batch_size = {second.batch_size}; lower that."
    )
  if len(held_out) < 2:
    raise InputError(
      f"{what} has {len(held_out)} held-out picture{'s' * (not len(held_out))}, but the evaluation "
      "needs at least 2; raise "
      "config.tokenizer.data.held_out."
    )


def _evaluate(tokenizer: restore.Trained, network: Network, workdir: Path) -> dict[str, float]:
  held_out = own_pictures(tokenizer, held_out=True)
  output = Output(workdir / "reconstruction", "reconstruction")
  rebuilt = reconstruction.evaluate(tokenizer, held_out, None, output, posterior="mode")
  training = own_pictures(tokenizer, held_out=False, limit=pictures.MOST_JUDGED)
  reference = reference_of(training, network, keep=True)
  generated = generation.evaluate(
    Npz(workdir / "samples.npz"),
    reference,
    network,
    Output(workdir / "generation", "generation"),
    options=Options(),
    workdir=workdir / "diffusion",
  )
  real = statistics_of(held_out, network, "held out").moments["pool"]
  return {
    **rebuilt,
    **generated,
    f"{network.key}_real": reference.gaussian.distance(real.mean, real.cov).distance,
  }


def main() -> None:
  workdir = local_place(FLAGS.workdir or (OWN_RUN if FLAGS.pictures else EMOJI_RUN))
  if FLAGS.pictures:
    fit(FLAGS.config, FLAGS.pictures, workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(owned(workdir))
    # What later stages write too; each of the trainings asks for its own folder.
    stack.enter_context(owned(workdir / "latents"))
    for name in ("samples", "reconstruction", "generation"):
      stack.enter_context(owned(workdir / name, beside=True))
    results = run(FLAGS.config, workdir, with_changes=FLAGS.resume_with_changes)
  seconds, model = _seconds(workdir / TIMINGS), workdir / "diffusion" / "model"
  console.table(
    f"Done in {workdir}",
    ("what", "value"),
    [
      ("PSNR of held-out pictures", f"{results['psnr']:.2f} dB"),
      ("SSIM of held-out pictures", f"{results['ssim']:.3f}"),
      ("FD-EfficientNet of samples", f"{results['fd_efficientnet']:.1f}"),
      ("FD-EfficientNet of real pictures", f"{results['fd_efficientnet_real']:.1f}"),
      *((f"time: {name.lower()}", console.clock(value)) for name, value in seconds.items()),
      ("report", str(workdir / "report.html")),
      *([("model folder", str(model))] if model.is_dir() else []),
    ],
  )
  where = (f"--workdir={workdir / 'diffusion'}", f"--output={workdir / 'more.npz'}")
  console.say_next("sample", *where, "--num_samples=90")
  console.say_studio(workdir / "diffusion")


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("The settings; configs/quickstart.py:pipeline if not given.")
  text = f"Where everything is written; {EMOJI_RUN}, or with --pictures {OWN_RUN}, if not given."
  flags.DEFINE_string("workdir", None, text)
  text = "Your pictures: a folder of class folders, a .zip, a .tar, or a source such as hf:NAME."
  flags.DEFINE_string("pictures", "", text)
  text = "Goes on in a workdir with another configuration, as launch.train does."
  flags.DEFINE_boolean("resume_with_changes", False, text)
  given = any(word.split("=")[0].lstrip("-") == "pictures" for word in sys.argv)
  console.run_command(main, config=f"{OWN}{hardware.expected()}" if given else CONFIG)
