r"""Evaluates samples, a tokenizer or a latent space, by a protocol that the results name.

  python -m launch.evaluate generation --samples=RUNS/samples.npz --reference=REFERENCE \
    --output=RUNS/generation
  python -m launch.evaluate generation --workdir=RUNS/diffusion --num_samples=50000 \
    --reference=VIRTUAL_imagenet256_labeled.npz --output=RUNS/generation
  python -m launch.evaluate reconstruction --workdir=RUNS/tokenizer --source=folder:VALIDATION \
    --output=RUNS/reconstruction
  python -m launch.evaluate latents --latents=RUNS/latents --output=RUNS/latents_figures
  python -m launch.evaluate sweep --workdir=RUNS/diffusion --grid=cfg_scale=1,1.5,2 \
    --grid=cfg_interval_start=0,0.1 --num_samples=2000 --reference=REFERENCE --output=RUNS/sweep
  python -m launch.evaluate solvers --workdir=RUNS/diffusion --num_steps=250 \
    --grid=method=euler,heun --grid=num_steps=25,50,100 --output=RUNS/solvers
  python -m launch.evaluate frontier --point=plain/d16:A.json:B.json --output=RUNS/frontier
  python -m launch.evaluate statistics --reference=folder:DIR --output=REFERENCE.npz

generation: FID, sFID, inception score, precision and recall of --samples (an npz, a folder, a
latent store, an image source), or of samples that --workdir's model draws, which are never all in
memory; against --reference (an npz of ADM's or pytorch-fid's, a folder, a latent store, an image
source). reconstruction: rFID, PSNR, SSIM, LPIPS. latents: the paper's uniformity figures, channels,
signal to noise. sweep: a distance over a grid of sampling settings, of checkpoints (step) and
averages (ema). solvers: latents by cheaper settings of the solver beside those by the given ones,
from the same noise. frontier: reconstruction against generation of several tokenizers. statistics:
mean and covariance of a reference, once and for all.

--protocol=adm is what the paper's numbers are (TensorFlow 1's resize), pytorch-fid the other one in
use; both need FID's Inception (--weights). efficientnet_lite0, a teacher's name with --weights=its
file, or classifier with --weights=the workdir of one that launch.train trained, is a Frechet
distance under its own name, which compares with no FID.

Results go to OUTPUT.json, OUTPUT.png and OUTPUT.html. What was stopped goes on where it was.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import FrozenConfigDict

import configs.base
from launch import restore
from launch.engine import console
from launch.engine.checkpoint import steps_of
from launch.evaluation import generation, reconstruction, solvers, space, sweep
from launch.evaluation.features import PROTOCOLS, Network, load_network
from launch.evaluation.figures import Options
from launch.evaluation.frontier import frontier
from launch.evaluation.output import Output
from launch.evaluation.pictures import (
  FromSource,
  PictureSet,
  Sampled,
  open_pictures,
  own_pictures,
  stored_statistics,
)
from launch.evaluation.reference import Reference, open_reference, statistics_of
from launch.sample import SETTINGS, define_settings, given_settings
from lightningdit_jax import checks, transport
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, place
from vavae_jax.data import images
from vavae_jax.perceptual import Lpips, load_lpips

COMMON = ("output",)
NETWORK = ("protocol", "weights")
SAMPLER = ("workdir", "step", "ema", "num_samples", "labels", "seed", "tokenizer", *SETTINGS)
FIGURES = ("precision_recall", "bootstrap", "fid_infinity")
SOURCE = ("reference", "image_size")
# Evaluation -> the flags that mean something to it.
ACCEPTED = {
  "generation": (*COMMON, *NETWORK, *SAMPLER, *FIGURES, *SOURCE, "samples"),
  "reconstruction": (
    *COMMON,
    *NETWORK,
    *("workdir", "step", "seed", "source", "crop", "image_size", "limit"),
    *("posterior", "lpips_vgg", "lpips_heads"),
  ),
  "latents": (*COMMON, "latents", "runs", "cells", "seed", "path"),
  "sweep": (*COMMON, *NETWORK, *SAMPLER, "precision_recall", *SOURCE, "grid"),
  "solvers": (*COMMON, *SAMPLER, "grid"),
  "frontier": (*COMMON, "point", "x", "y"),
  "statistics": (*COMMON, *NETWORK, *SOURCE, "tokenizer"),
}


def _check_flags(what: str) -> None:
  if what not in ACCEPTED:
    raise InputError(f"What to evaluate is {what!r}; give one of {', '.join(ACCEPTED)}.")
  own = {name for names in ACCEPTED.values() for name in names}
  for name in sorted(own - set(ACCEPTED[what])):
    if FLAGS[name].present:
      raise InputError(f"--{name} means nothing to {what}; see --help.")


def _needed(*names: str) -> None:
  for name in names:
    if not FLAGS[name].value:
      raise InputError(f"Give --{name}: {FLAGS[name].help}")


def _network() -> Network:
  return load_network(FLAGS.protocol, FLAGS.weights)


def _reference(network: Network, output: Output, size: int) -> Reference:
  return open_reference(
    FLAGS.reference,
    network,
    image_size=FLAGS.image_size or size,
    tokenizer=FLAGS.tokenizer,
    keep=FLAGS.precision_recall,
    progress=output.progress,
  )


def _drawer() -> Callable[[dict[str, Any]], PictureSet]:
  """A function from settings, which may be none, to samples of --workdir's model."""

  @functools.lru_cache(maxsize=1)
  def models(step: int | None, ema: float | None) -> tuple[restore.Trained, restore.Trained]:
    diffusion = restore.load(place(FLAGS.workdir), "diffusion", step, ema)
    override = place(FLAGS.tokenizer) if FLAGS.tokenizer else None
    return diffusion, restore.tokenizer_of(diffusion.config, override)

  def draw(changes: dict[str, Any]) -> PictureSet:
    which = {"step": FLAGS.step, "ema": FLAGS.ema} | changes
    diffusion, tokenizer = models(which.pop("step"), which.pop("ema"))
    settings = given_settings(diffusion, **which)
    checks.check_sampling(settings, diffusion.config.model, has_guide=False)
    return Sampled(
      diffusion, tokenizer, settings, count=FLAGS.num_samples, labels=FLAGS.labels, seed=FLAGS.seed
    )

  return draw


def _generation(output: Output) -> None:
  _needed("reference")
  if bool(FLAGS.samples) == bool(FLAGS.workdir):
    raise InputError("Give either --samples or --workdir: pictures that are there, or a model.")
  if FLAGS.samples:
    for name in sorted({*SAMPLER} - {"tokenizer", "workdir"}):
      if FLAGS[name].present:
        raise InputError(f"--{name} is of samples that are drawn; --samples are there already.")
  network = _network()
  drawn = (
    open_pictures(FLAGS.samples, image_size=FLAGS.image_size, tokenizer=FLAGS.tokenizer)
    if FLAGS.samples
    else _drawer()({})
  )
  options = Options(FLAGS.precision_recall, FLAGS.bootstrap, FLAGS.fid_infinity)
  generation.check(drawn, options)
  generation.evaluate(
    drawn,
    _reference(network, output, drawn.size),
    network,
    output,
    options=options,
    workdir=place(FLAGS.workdir) if FLAGS.workdir else None,
  )


def _reconstruction(output: Output) -> None:
  _needed("workdir")
  tokenizer = restore.load(place(FLAGS.workdir), "tokenizer", FLAGS.step)
  data = tokenizer.config.data
  size = FLAGS.image_size or data.image_size
  source = FLAGS.source or data.valid_source
  if source:
    pictures = FromSource(source, size, crop=FLAGS.crop, limit=FLAGS.limit)
  else:
    pictures = own_pictures(tokenizer, held_out=True, size=size, crop=FLAGS.crop, limit=FLAGS.limit)
  network = None if FLAGS.protocol == "none" else _network()
  lpips = _lpips(tokenizer.config)
  reconstruction.evaluate(
    tokenizer,
    pictures,
    network,
    output,
    posterior=FLAGS.posterior,
    seed=FLAGS.seed,
    lpips=lpips,
  )


def _lpips(config: FrozenConfigDict) -> Lpips | None:
  """As given, or as the tokenizer was trained with if its files are still there."""
  if FLAGS.lpips_vgg:
    return load_lpips(FLAGS.lpips_vgg, FLAGS.lpips_heads)
  files = (config.perceptual.vgg, config.perceptual.heads)
  if config.perceptual.network == "lpips" and all(Path(file).is_file() for file in files if file):
    return load_lpips(*files)
  return None


def _latents(output: Output) -> None:
  _needed("latents")
  store = LatentStore(Path(FLAGS.latents))
  space.evaluate(
    store, output, runs=FLAGS.runs, count=FLAGS.cells, seed=FLAGS.seed, path=FLAGS.path
  )


def _sweep(output: Output) -> None:
  _needed("workdir", "reference")
  defaults = configs.base.sample().to_dict() | {"ema": 0.0, "step": 0}
  grid = sweep.parse_grid(FLAGS.grid, defaults)
  network, draw = _network(), _drawer()
  diffusion = restore.load(place(FLAGS.workdir), "diffusion", FLAGS.step)
  averages = (0.0, *diffusion.config.optimizer.ema_decays)
  steps = steps_of(place(FLAGS.workdir))
  for point in sweep.points_of(grid):  # all of them before the first takes its hours
    if point.pop("ema", 0.0) not in averages:
      raise InputError(f"{FLAGS.workdir} keeps averages of decays {averages}, no others.")
    if point.pop("step", steps[0]) not in steps:
      raise InputError(f"{FLAGS.workdir} has checkpoints of the steps {steps}, no others.")
    settings = given_settings(diffusion, **point)
    checks.check_sampling(settings, diffusion.config.model, has_guide=False)
  first = draw({name: values[0] for name, values in grid.items()})
  sweep.sweep(
    grid,
    draw,
    _reference(network, output, first.size),
    network,
    output,
    options=Options(FLAGS.precision_recall),
  )


def _solvers(output: Output) -> None:
  _needed("workdir")
  diffusion = restore.load(place(FLAGS.workdir), "diffusion", FLAGS.step, FLAGS.ema)
  solvers.evaluate(
    diffusion,
    given_settings(diffusion),
    sweep.parse_grid(FLAGS.grid, configs.base.sample().to_dict()),
    output,
    count=FLAGS.num_samples if FLAGS["num_samples"].present else solvers.DEFAULT_SAMPLES,
    labels=FLAGS.labels,
    seed=FLAGS.seed,
  )


def _frontier(output: Output) -> None:
  frontier(FLAGS.point, output, FLAGS.x, FLAGS.y)


def _statistics() -> None:
  _needed("reference")
  path = Path(FLAGS.output)
  if path.suffix != ".npz":
    raise InputError(f"--output is {path}; give the name of a file that ends in .npz.")
  network = _network()
  pictures = open_pictures(FLAGS.reference, image_size=FLAGS.image_size, tokenizer=FLAGS.tokenizer)
  about = json.dumps({"network": network.about, "pictures": pictures.about})
  if path.exists():
    if str(stored_statistics(FLAGS.output).get("about")) != about:
      raise InputError(f"{path} holds something else; give --output the name of a new file.")
    console.say(f"{path} has these statistics already")
    return
  progress = path.with_suffix(".progress")
  found = statistics_of(pictures, network, "reference", progress=progress)
  arrays: dict[str, Any] = {"about": np.array(about)}
  for name, ending in (("pool", ""), ("spatial", "_s")):
    if name in found.moments:
      arrays[f"mu{ending}"] = found.moments[name].mean
      arrays[f"sigma{ending}"] = found.moments[name].cov
  if jax.process_index() == 0:
    with atomic_file(path) as file:
      np.savez(file, **arrays)
    shutil.rmtree(progress, ignore_errors=True)
  console.table(
    "Statistics",
    ("what", "value"),
    [("pictures", f"{len(pictures):,}"), ("protocol", network.protocol), ("file", str(path))],
  )


EVALUATIONS = {
  "generation": _generation,
  "reconstruction": _reconstruction,
  "latents": _latents,
  "sweep": _sweep,
  "solvers": _solvers,
  "frontier": _frontier,
}


def main(argv: list[str]) -> None:
  """The command."""
  what = argv[1] if len(argv) > 1 else ""
  _check_flags(what)
  if what == "statistics":
    _statistics()
  else:
    EVALUATIONS[what](Output(Path(FLAGS.output), what))


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("output", None, "Path of the results without suffix.", required=True)
  flags.DEFINE_enum(
    "protocol", "adm", ("none", *PROTOCOLS), "Network and preparation; none: PSNR and SSIM alone."
  )
  flags.DEFINE_string("weights", "", "Weights of the protocol's network.")
  flags.DEFINE_string("samples", "", "An npz, a folder, a latent store or an image source.")
  flags.DEFINE_string("reference", "", "Real pictures, or an npz of their mu and sigma.")
  flags.DEFINE_integer(
    "image_size", 0, "ADM's crop of folders and sources; 0: references as samples are."
  )
  flags.DEFINE_boolean("precision_recall", True, "Needs the features of all pictures in memory.")
  flags.DEFINE_integer("bootstrap", 0, "Resamples for a confidence interval; 0: none, 20 will do.")
  flags.DEFINE_boolean("fid_infinity", False, "Extrapolate to infinitely many samples.")
  flags.DEFINE_string("workdir", "", "The tokenizer's, or of the model that draws the samples.")
  flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.")
  flags.DEFINE_float("ema", None, "Decay of the average to use; the first if not given, 0: none.")
  flags.DEFINE_integer("num_samples", 50_000, "To draw.", lower_bound=2)
  flags.DEFINE_string("labels", "balanced", 'Or "uniform", as the paper\'s, or numbers as 3,7,7.')
  flags.DEFINE_integer("seed", 0, "Of noise, labels, choices.")
  flags.DEFINE_string("tokenizer", "", "The tokenizer's workdir, where latents do not say.")
  flags.DEFINE_string("source", "", "Pictures to rebuild; the tokenizer's held-out ones if none.")
  flags.DEFINE_enum("crop", "resize", tuple(images.FIXED_CROPS), "resize: the reference's.")
  flags.DEFINE_integer("limit", 0, "A seeded choice of so many pictures; 0: all.", lower_bound=0)
  flags.DEFINE_enum("posterior", "sample", reconstruction.POSTERIORS, "sample: the reference's.")
  flags.DEFINE_string("lpips_vgg", "", "LPIPS' VGG16; the training's if not given and there.")
  flags.DEFINE_string("lpips_heads", "", "Its heads, where they are in another file.")
  flags.DEFINE_string("latents", "", "A latent store.")
  flags.DEFINE_integer("runs", 10, "t-SNEs, of which figures are the mean.", lower_bound=1)
  flags.DEFINE_integer("cells", 10_000, "Of the latents, in each.", lower_bound=space.LEAST)
  flags.DEFINE_enum("path", "Linear", tuple(transport.PATHS), "Of signal to noise.")
  flags.DEFINE_multi_string("grid", [], "SETTING=VALUE,VALUE; once for each setting.")
  flags.DEFINE_multi_string("point", [], "NAME:RECONSTRUCTION.json:GENERATION.json of a tokenizer.")
  flags.DEFINE_string("x", "psnr", "Figure of reconstruction for the frontier.")
  flags.DEFINE_string("y", "fid", "Figure of generation for the frontier.")
  define_settings()
  console.run_command(main, arguments=1)
