"""Evaluates samples, a tokenizer or a latent space, by a protocol that the results name.

Results go to OUTPUT.json, .png and .html, of statistics to OUTPUT; what was stopped resumes.
--protocol=adm gives the paper's numbers (TensorFlow 1's resize), pytorch-fid the other protocol in
use; both need FID's Inception (--weights). efficientnet_lite0, a teacher's name with --weights=its
file, or classifier with --weights=the workdir of one that launch.train trained, give a Frechet
distance under its own name, which compares with no FID.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import FrozenConfigDict

import configs.base
import launch.sample
from launch import restore
from launch.encode import say_training
from launch.engine import console, subcommands
from launch.engine.ownership import owned
from launch.engine.subcommands import Subcommand
from launch.evaluation import flag_groups, generation, probe, reconstruction, solvers, space, sweep
from launch.evaluation.cells import open_cells
from launch.evaluation.features import CLASSIFIER, Network, load_network
from launch.evaluation.figures import Options, Second
from launch.evaluation.frontier import frontier
from launch.evaluation.gaussians import Gaussians
from launch.evaluation.output import Output
from launch.evaluation.pictures import (
  FromSource,
  PictureSet,
  Sampled,
  open_pictures,
  own_pictures,
  sampler_of,
)
from launch.evaluation.reference import Reference, open_reference, store
from launch.sample import Sampler, given_settings, program_of
from lightningdit_jax import checks
from vavae_jax import folder
from vavae_jax.common import mesh
from vavae_jax.common.addresses import local_file
from vavae_jax.common.checkpoints import steps_of
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import check_outputs, is_url, place
from vavae_jax.perceptual import Lpips, load_lpips

FLAGS = flags.FLAGS
# Of settings in messages: the flags of the same meaning.
_NAMES = {
  **launch.sample.SETTINGS,
  "config.teacher.weights": "--weights",
  "config.perceptual.vgg": "--lpips_vgg",
  "config.perceptual.heads": "--lpips_heads",
}


def _network() -> Network:
  return load_network(FLAGS.protocol, FLAGS.weights)


def _reference(network: Network, output: Output, size: int) -> Reference:
  return open_reference(
    FLAGS.reference,
    network,
    size=size,
    image_size=FLAGS.image_size,
    tokenizer=FLAGS.tokenizer,
    keep=FLAGS.precision_recall,
    progress=output.progress,
  )


def _second_network() -> Network | None:
  if FLAGS.second_reference and not FLAGS.second_weights:
    raise InputError("--second_reference needs --second_weights, the second judge.")
  return load_network(CLASSIFIER, FLAGS.second_weights) if FLAGS.second_weights else None


def _second(network: Network | None, output: Output, size: int) -> Second | None:
  if not network:
    return None
  reference = open_reference(
    FLAGS.second_reference or FLAGS.reference,
    network,
    size=size,
    image_size=FLAGS.image_size,
    tokenizer=FLAGS.tokenizer,
    progress=output.progress / "second",
  )
  return Second(network, reference)


def _drawer(guide: str = "") -> Callable[[dict[str, Any]], PictureSet]:
  """A function from changed settings to samples of --workdir's model, which may have a guide."""

  @functools.lru_cache(maxsize=2)
  def model(step: int | None, ema: float | None, source: str = "") -> restore.Trained:
    return restore.load(folder.find(source or FLAGS.workdir), "diffusion", step, ema)

  # What all checkpoints share: the tokenizer, and a program for all numbers of guidance.
  tokenizers: list[restore.Trained] = []
  programs: dict[tuple[FrozenConfigDict, str], Sampler] = {}

  def draw(changes: dict[str, Any]) -> PictureSet:
    which = {"step": FLAGS.step, "ema": FLAGS.ema} | changes
    diffusion = model(which.pop("step"), which.pop("ema"))
    step, ema = which.pop("guide_step", None), which.pop("guide_ema", None)
    away = model(step, ema, guide) if guide else None
    settings = given_settings(diffusion, **which)
    checks.check_sampling(settings, diffusion.config, away and away.config)
    if not tokenizers:
      found = restore.tokenizer_of(diffusion, FLAGS.tokenizer)
      tokenizers.append(found.on(mesh.local_mesh()))
    program = program_of(settings), away.sha256 if away else ""
    if program not in programs:
      if away:
        programs.clear()  # each has its guide's parameters on the devices
      programs[program] = sampler_of(diffusion, tokenizers[0], settings, FLAGS.seed, away)
    how = {"count": FLAGS.num_samples, "labels": FLAGS.labels, "seed": FLAGS.seed}
    return Sampled(diffusion, tokenizers[0], settings, **how, sampler=programs[program], guide=away)

  return draw


def _generation() -> None:
  r"""FID, sFID, inception score, precision and recall of samples against real pictures.

    python -m launch.evaluate generation --samples=RUNS/samples.npz --reference=REFERENCE \
      --output=RUNS/generation
    python -m launch.evaluate generation --workdir=RUNS/diffusion --num_samples=50000 \
      --reference=VIRTUAL_imagenet256_labeled.npz --output=RUNS/generation

  Samples are --samples, or drawn by the model of --workdir, never all in memory, or, as a control,
  by one Gaussian for each class, fitted to the latents of --gaussians. The reference is an npz of
  ADM's, of pytorch-fid's or of `launch.evaluate statistics`, or pictures of any kind.
  """
  given = [name for name in ("samples", "workdir", "gaussians") if FLAGS[name].value]
  if len(given) != 1:
    raise InputError(
      "Give one of --samples, --workdir and --gaussians: existing samples, a model, or latents."
    )
  idle = {"step", "ema", *checks.SAMPLE} if given != ["workdir"] else set()
  idle |= {"num_samples", "labels", "seed"} if FLAGS.samples else set()
  for name in sorted(idle):
    if FLAGS[name].present:
      raise InputError(f"--{name} does not apply to --{given[0]}.")
  output, network = Output(place(FLAGS.output), "generation"), _network()
  other = _second_network()
  if FLAGS.samples:
    drawn = open_pictures(FLAGS.samples, image_size=FLAGS.image_size, tokenizer=FLAGS.tokenizer)
  elif FLAGS.gaussians:
    latents = restore.open_latents(FLAGS.gaussians)
    tokenizer = restore.tokenizer_of_latents(latents, FLAGS.tokenizer)
    how = {"count": FLAGS.num_samples, "labels": FLAGS.labels, "seed": FLAGS.seed}
    drawn = Gaussians(latents, tokenizer, **how)
  else:
    drawn = _drawer()({})
  options = Options(FLAGS.precision_recall, FLAGS.bootstrap, FLAGS.fid_infinity)
  generation.check(drawn, options)
  generation.evaluate(
    drawn,
    _reference(network, output, drawn.size),
    network,
    output,
    options=options,
    workdir=folder.find(FLAGS.workdir) if FLAGS.workdir else None,
    second=_second(other, output, drawn.size),
  )


def _reconstruction() -> None:
  r"""rFID, PSNR, SSIM and LPIPS of a tokenizer.

    python -m launch.evaluate reconstruction --workdir=RUNS/tokenizer --source=folder:VALIDATION \
      --output=RUNS/reconstruction
  """
  output = Output(place(FLAGS.output), "reconstruction")
  tokenizer = restore.load(folder.find(FLAGS.workdir), "tokenizer", FLAGS.step)
  data = tokenizer.config.data
  size = FLAGS.image_size or data.image_size
  source = FLAGS.source or data.valid_source
  if source:
    pictures = FromSource(source, size, crop=FLAGS.crop, limit=FLAGS.limit)
  else:
    pictures = own_pictures(tokenizer, held_out=True, size=size, crop=FLAGS.crop, limit=FLAGS.limit)
  reconstruction.evaluate(
    tokenizer,
    pictures,
    None if FLAGS.protocol == "none" else _network(),
    output,
    posterior=FLAGS.posterior,
    seed=FLAGS.seed,
    lpips=_lpips(tokenizer.config),
  )


def _lpips(config: FrozenConfigDict) -> Lpips | None:
  """As given, or as the tokenizer was trained with if its files are still there."""
  if FLAGS.lpips_vgg:
    return load_lpips(FLAGS.lpips_vgg, FLAGS.lpips_heads)
  files = (config.perceptual.vgg, config.perceptual.heads)
  there = files[0] and all(local_file(file).is_file() for file in files if file)
  if config.perceptual.network == "lpips" and there:
    return load_lpips(*files)
  return None


def _latents() -> None:
  """Uniformity of a latent space, its channels, and signal to noise.

    python -m launch.evaluate latents --latents=RUNS/latents --output=RUNS/latents_figures

  Figures are those of the paper's table 6, by t-SNE. A .pt, .npz or .safetensors file of normalised
  cells [N,Z] is taken, too, such as the reference's tools/latent_demos/latents_cache_f16d32.pt.
  """
  output, cells = Output(place(FLAGS.output), "latents"), open_cells(FLAGS.latents)
  space.evaluate(
    cells, output, runs=FLAGS.runs, count=FLAGS.cells, seed=FLAGS.seed, path=FLAGS.path
  )


def _probe() -> None:
  r"""How well a tokenizer's latents will generate, in minutes: a small diffusion model and more.

    python -m launch.evaluate probe --workdir=RUNS/tokenizer --output=RUNS/probe

  With a --protocol the samples are judged as those of generation are, against --reference.
  """
  output = Output(place(FLAGS.output), probe.KIND)
  if (FLAGS.protocol == "none") == bool(FLAGS.reference):
    raise InputError("--protocol and --reference need each other: a judge, and real pictures.")
  network = None if FLAGS.protocol == "none" else _network()
  others = probe.read_others(FLAGS.among)
  tokenizer = restore.load(folder.find(FLAGS.workdir), "tokenizer", FLAGS.step)
  judge = None
  if network:
    size = tokenizer.config.data.image_size
    reference = open_reference(
      FLAGS.reference, network, size=size, progress=output.progress / "reference"
    )
    judge = probe.Judge(network, reference)
  how = {"count": FLAGS.num_pictures, "source": FLAGS.source}
  probe.evaluate(tokenizer, output, judge, others=others, **how)


def _sweep() -> None:
  r"""Figures over a grid of sampling settings, checkpoints (step) and averages (ema).

    python -m launch.evaluate sweep --workdir=RUNS/diffusion --grid=cfg_scale=1,1.5,2 \
      --grid=cfg_interval_start=0,0.1 --num_samples=2000 --reference=REFERENCE --output=RUNS/sweep

  Finished points are kept, also for a larger grid. With --guide=WORKDIR, for autoguidance, the
  grid may have guide_step and guide_ema too.
  """
  guided = {"guide_ema": 0.0, "guide_step": 0} if FLAGS.guide else {}
  defaults = configs.base.sample().to_dict() | {"ema": 0.0, "step": 0} | guided
  grid = sweep.parse_grid(FLAGS.grid, defaults)
  output, network, draw = Output(place(FLAGS.output), "sweep"), _network(), _drawer(FLAGS.guide)
  other = _second_network()
  diffusion = restore.load(folder.find(FLAGS.workdir), "diffusion", FLAGS.step)
  guide = restore.load(folder.find(FLAGS.guide), "diffusion") if FLAGS.guide else None
  if guide:
    checks.check_guide(diffusion.config, guide.config)
  for point in sweep.points_of(grid):  # all of them before the first takes its hours
    _check_kept(FLAGS.workdir, diffusion, point.pop("step", None), point.pop("ema", None))
    if guide:
      _check_kept(FLAGS.guide, guide, point.pop("guide_step", None), point.pop("guide_ema", None))
    settings = given_settings(diffusion, **point)
    checks.check_sampling(settings, diffusion.config, guide and guide.config)
  first = draw({name: values[0] for name, values in grid.items()})
  options = Options(FLAGS.precision_recall)
  generation.check(first, options)
  reference = _reference(network, output, first.size)
  second = _second(other, output, first.size)
  sweep.sweep(grid, draw, reference, network, output, options=options, second=second)


def _check_kept(source: str, trained: restore.Trained, step: int | None, ema: float | None) -> None:
  """Raises InputError where a training keeps no checkpoint of a step, or no such average."""
  path = folder.find(source)
  averages, steps = (0.0, *trained.config.optimizer.ema_decays), steps_of(path)
  if folder.is_model(path):
    averages, steps = (trained.ema,), [trained.step]
  if ema is not None and ema not in averages:
    raise InputError(f"{source} keeps averages of decays {averages}, no others.")
  if step is not None and step not in steps:
    raise InputError(f"{source} has checkpoints of the steps {steps}, no others.")


def _solvers() -> None:
  r"""Distance and cost of cheaper solver settings, from the same noise.

    python -m launch.evaluate solvers --workdir=RUNS/diffusion --num_steps=250 \
      --grid=method=euler,heun --grid=num_steps=25,50,100 --output=RUNS/solvers

  The latents of each point of the grid are compared with those of the settings given by flags.
  """
  diffusion = restore.load(folder.find(FLAGS.workdir), "diffusion", FLAGS.step, FLAGS.ema)
  solvers.evaluate(
    diffusion,
    given_settings(diffusion),
    sweep.parse_grid(FLAGS.grid, configs.base.sample().to_dict()),
    Output(place(FLAGS.output), "solvers"),
    count=FLAGS.num_samples,
    labels=FLAGS.labels,
    seed=FLAGS.seed,
  )


def _frontier() -> None:
  """Reconstruction against generation of several tokenizers, as figure 2 of the paper.

  python -m launch.evaluate frontier --point=plain/d16:A.json:B.json --output=RUNS/frontier
  """
  frontier(FLAGS.point, Output(place(FLAGS.output), "frontier"), FLAGS.x, FLAGS.y)


def _statistics() -> None:
  """Mean and covariance of a reference, to be computed once and used often.

  python -m launch.evaluate statistics --reference=folder:DIR --output=REFERENCE.npz
  """
  path = place(FLAGS.output)
  if path.suffix != ".npz":
    raise InputError(f"--output is {path}; give the name of a file that ends in .npz.")
  check_outputs([path], [path.with_suffix(".progress")])
  network = _network()
  pictures = open_pictures(FLAGS.reference, image_size=FLAGS.image_size, tokenizer=FLAGS.tokenizer)
  if not store(pictures, network, path):
    console.say(f"{path} has these statistics already")
    return
  console.table(
    "Statistics",
    ("what", "value"),
    [("pictures", f"{len(pictures):,}"), ("protocol", network.protocol), ("file", str(path))],
  )


_few_samples = functools.partial(launch.sample.define_flags, solvers.DEFAULT_SAMPLES, least=2)
_drawn = (flag_groups.reference, flag_groups.drawn)
# Evaluation -> its function and, beside --output, its groups of flags.
COMMANDS: dict[str, tuple[Callable[[], None], tuple[Callable[[], None], ...]]] = {
  "generation": (_generation, (*_drawn, flag_groups.generation)),
  "reconstruction": (_reconstruction, (flag_groups.reconstruction,)),
  "latents": (_latents, (flag_groups.latents,)),
  "probe": (_probe, (flag_groups.probe,)),
  "sweep": (_sweep, (*_drawn, flag_groups.grid, launch.sample.define_guide)),
  "solvers": (_solvers, (_few_samples, flag_groups.grid)),
  "frontier": (_frontier, (flag_groups.frontier,)),
  "statistics": (_statistics, (flag_groups.reference,)),
}


def _given(*names: str) -> list[str]:
  """The flags of these names that were given."""
  there = (FLAGS[name] for name in names if name in FLAGS)
  return [f"--{flag.name}={flag.value}" for flag in there if flag.present]


def _say_next(evaluation: str) -> None:
  """Prints the command that usually follows an evaluation."""
  output = place(FLAGS.output)
  weights = _given("step", "ema", "tokenizer") if "workdir" in FLAGS and FLAGS.workdir else []
  if evaluation == "generation" and FLAGS.gaussians:
    words = ("--workdir=DIFFUSION", f"--reference={FLAGS.reference}", f"--output={output}_trained")
    same = _given("protocol", "weights", "image_size", "tokenizer", "num_samples", "labels", "seed")
    console.say_next("evaluate", "generation", *words, *same)
  elif evaluation in ("generation", "reconstruction"):
    to = output.name if is_url(output) else output  # models are not written to buckets
    where = (f"--workdir={FLAGS.workdir or 'WORKDIR'}", f"--output={to}_model")
    console.say_next("export", *where, *weights, f"--evaluations={output}.json")
  elif evaluation in ("sweep", "solvers"):
    to = f"--output={output}_samples.npz"
    console.say_next("sample", f"--workdir={FLAGS.workdir}", to, *weights)
  elif evaluation == "statistics":
    words = ("--samples=SAMPLES.npz", f"--reference={output}", f"--protocol={FLAGS.protocol}")
    to = f"--output={output.with_suffix('')}_generation"
    console.say_next("evaluate", "generation", *words, to, *_given("weights"))
  elif evaluation == "latents" and not Path(FLAGS.latents).is_file():
    say_training(restore.open_latents(FLAGS.latents))
  elif evaluation == "probe":
    more = [*weights, *_given("source")]
    console.say_next("encode", f"--workdir={FLAGS.workdir}", "--output=LATENTS", *more)
  else:
    console.say_next("encode", "--workdir=TOKENIZER", "--output=LATENTS")


def _subcommand(
  name: str, run: Callable[[], None], groups: tuple[Callable[[], None], ...]
) -> Subcommand:
  def define_flags() -> None:
    text = "Path of the results without suffix; of statistics, the npz."
    flags.DEFINE_string("output", None, text, required=True)
    for define in groups:
      define()

  def owning() -> None:
    with owned(place(FLAGS.output), beside=True), console.naming(_NAMES):
      run()
    _say_next(name)

  return Subcommand(inspect.getdoc(run) or "", owning, define_flags, several=True)


if __name__ == "__main__":
  subcommands.run(__doc__, {name: _subcommand(name, *both) for name, both in COMMANDS.items()})
