r"""The whole pipeline on the embedded emoji: tokenizer, latents, diffusion, samples, report.

  python -m launch.quickstart --workdir=runs/quickstart

Trains a small VA-VAE aligned with EfficientNet-Lite0, encodes the pictures, trains a small
LightningDiT on the latents, samples with guidance, evaluates, and writes report.html. About a
quarter of an hour on two CPU cores. Stopped at any point, the same command goes on where it
was. configs/quickstart.py holds every setting; each can be set with --config.PART.KEY=VALUE.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
import lightningdit_jax.training
import vavae_jax.training
from configs import quickstart
from launch import restore
from launch.encode import encode
from launch.engine import configuration, console, loop
from launch.engine.writers import curve, read_metrics
from launch.evaluation import generation, reconstruction
from launch.evaluation.features import EFFICIENTNET, load_network
from launch.evaluation.output import Output
from launch.evaluation.pictures import Npz, own_pictures, take
from launch.evaluation.sample_files import read_samples
from launch.report.html import Curve, Figure, Report, write_report
from launch.sample import sample_set
from launch.train import train
from lightningdit_jax.store import latents
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json

CONFIG = f"{quickstart.__file__}:pipeline"
SHOWN_RECONSTRUCTIONS = 24
SHOWN_PER_CLASS = 10
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class Stages:
  """Runs the stages one after the other and keeps what each took, over all runs of a workdir."""

  def __init__(self, workdir: Path):
    self._path = workdir / "timings.json"
    self.seconds = json.loads(self._path.read_text()) if self._path.is_file() else {}
    self._number = 0

  def run(self, name: str, work: Callable[[], Any]) -> Any:
    """Runs one stage; its time is noted when it ends, or when it is interrupted."""
    self._number += 1
    console.say(f"\n[{self._number}/6] {name}")
    began = time.monotonic()
    try:
      return work()
    finally:
      self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
      write_json(self._path, self.seconds)


def run(config: ConfigDict, workdir: Path) -> dict[str, float]:
  """All stages, or what is left of them.

  Args:
    config: from `configs/quickstart.py:pipeline`.
    workdir: everything goes there.

  Returns:
    The figures: {"psnr": ..., "ssim": ..., "fd_efficientnet": ..., "precision": ..., ...}.
  """
  _check(configuration.resolve(config, quickstart.get_config("pipeline")))
  config.diffusion.latents.path = str((workdir / "latents").absolute())
  resolved = FrozenConfigDict(config)
  workdir.mkdir(parents=True, exist_ok=True)
  stages = Stages(workdir)
  stages.run("Tokenizer", lambda: train(config.tokenizer, workdir / "tokenizer"))
  tokenizer = restore.load(workdir / "tokenizer", "tokenizer")
  store = stages.run(
    "Latents", lambda: encode(tokenizer, workdir / "latents", **resolved.encode.to_dict())
  )
  stages.run("Diffusion", lambda: train(config.diffusion, workdir / "diffusion"))
  diffusion = restore.load(workdir / "diffusion", "diffusion")
  stages.run(
    "Samples",
    lambda: sample_set(diffusion, tokenizer, workdir / "samples.npz", **resolved.sample.to_dict()),
  )
  pictures, labels = read_samples(workdir / "samples.npz")
  results = stages.run("Evaluation", lambda: _evaluate(tokenizer, workdir))
  stages.run(
    "Report",
    lambda: write_report(
      _report(resolved, workdir, tokenizer, store, pictures, labels, results, stages.seconds),
      workdir / "report.html",
    ),
  )
  return results


def _check(config: FrozenConfigDict) -> None:
  """All that can be checked of the later stages before the first one takes its minutes."""
  first, second = config.tokenizer, config.diffusion
  configuration.resolve(first, configs.base.tokenizer())
  loop.check(first)
  vavae_jax.training.check(vavae_jax.training.resolve(first))
  configuration.resolve(second, configs.base.diffusion())
  loop.check(second)
  lightningdit_jax.training.check_model(second)
  for key in ("path", "sha256"):
    if second.latents[key] != quickstart.diffusion().latents[key]:
      raise InputError(
        f"config.diffusion.latents.{key} is {second.latents[key]!r}, but the quickstart trains on "
        "the latents that it makes in its workdir; leave it out, or run launch.train alone."
      )
  made = vavae_jax.training.latent_shape(first)
  wanted = (second.model.input_size, second.model.input_size, second.model.in_channels)
  if made != wanted:
    raise InputError(
      f"config.tokenizer makes latents of {made}, config.diffusion takes {wanted} (height, width, "
      "channels): change config.diffusion.model.input_size and in_channels, or the tokenizer."
    )
  least = {"encode.batch_size": 1, "encode.shard_size": 1, "sample.num_samples": 2}
  for key, bound in least.items():
    part, name = key.split(".")
    if config[part][name] < bound:
      raise InputError(f"config.{key} is {config[part][name]}; at least {bound} is needed.")


def _evaluate(tokenizer: restore.Trained, workdir: Path) -> dict[str, float]:
  held_out = own_pictures(tokenizer, held_out=True)
  output = Output(workdir / "reconstruction", "reconstruction")
  rebuilt = reconstruction.evaluate(tokenizer, held_out, None, output, posterior="mode")
  network = load_network(EFFICIENTNET)
  training = own_pictures(tokenizer, held_out=False)
  reference = generation.reference_of(training, network, keep=True)
  generated = generation.evaluate(
    Npz(workdir / "samples.npz"),
    reference,
    network,
    Output(workdir / "generation", "generation"),
    options=generation.Options(),
    workdir=workdir / "diffusion",
  )
  real = generation.statistics_of(held_out, network, "held out").moments["pool"]
  return {
    **rebuilt,
    **generated,
    "fd_efficientnet_real": reference.gaussian.distance(real.mean, real.cov).distance,
  }


def _report(
  config: FrozenConfigDict,
  workdir: Path,
  tokenizer: restore.Trained,
  store: latents.LatentStore,
  pictures: np.ndarray,
  labels: np.ndarray,
  results: dict[str, float],
  seconds: dict[str, float],
) -> Report:
  class_names = store.manifest["class_names"]
  rows = [pictures[labels == c][:SHOWN_PER_CLASS] for c in range(len(class_names))]
  columns = min(len(row) for row in rows)
  held_out = own_pictures(tokenizer, held_out=True)
  count = len(held_out)
  # Spread over the set, which is sorted by class.
  spread = np.unique(np.linspace(0, count - 1, SHOWN_RECONSTRUCTIONS).astype(int))
  originals = take(held_out, spread.tolist())
  training = own_pictures(tokenizer, held_out=False)
  return Report(
    title="VA-VAE and LightningDiT in JAX: quickstart",
    summary=(
      f"A tokenizer learnt to write {config.tokenizer.data.image_size} px emoji as "
      f"{store.shape[0]} x {store.shape[1]} latents of {store.shape[2]} numbers, aligned with the "
      "features of a frozen EfficientNet-Lite0; a diffusion transformer learnt to draw such "
      f"latents. {len(store):,} pictures, on {jax.device_count()} {jax.devices()[0].platform} "
      "device(s)."
    ),
    class_names=class_names,
    samples=np.stack([row[:columns] for row in rows]),
    originals=originals,
    reconstructions=restore.reconstruct(tokenizer, originals),
    curves=_curves(workdir),
    latents_2d=_project(store),
    latents_label=store.labels,
    latents_caption=(
      "Each training picture at the place of its latent: the normalised latents of all positions, "
      "brought to the plane by t-SNE (perplexity 30, PCA start)."
    ),
    latents_thumbnails=training.read(0, len(training)),
    figures=figures(results, len(pictures), len(store), count),
    caveats=[
      "FD-EfficientNet is the Frechet distance in features of the very network that the tokenizer "
      "was aligned with: the teacher judges itself. It is not FID and compares with nothing else.",
      f"It is biased upwards for few samples: {len(pictures)} samples, {count} held-out pictures "
      f"and {len(store)} training pictures meet in 1,280 dimensions.",
      "A run of minutes on a laptop shows that the pipeline works, not what the method can do.",
    ],
    timings=seconds,
    config=json.dumps(config.to_dict(), indent=2),
    versions={"python": platform.python_version()}
    | {name: importlib.metadata.version(name) for name in PACKAGES},
  )


def figures(results: dict[str, float], samples: int, training: int, held_out: int) -> list[Figure]:
  """The figures with their units and notes, as the report and the console show them."""
  return [
    Figure("PSNR", results["psnr"], "dB", f"{held_out} held-out pictures", "higher"),
    Figure("SSIM", results["ssim"], "", f"{held_out} held-out pictures", "higher"),
    Figure(
      "FD-EfficientNet",
      results["fd_efficientnet"],
      "",
      f"{samples} samples against {training} training pictures",
      "lower",
    ),
    Figure(
      "FD-EfficientNet of real pictures",
      results["fd_efficientnet_real"],
      "",
      f"{held_out} held-out against {training} training pictures: what perfect samples would get",
      "lower",
    ),
    Figure(
      "Precision",
      results["precision"],
      "",
      "share of samples among the training pictures, in the same features",
      "higher",
    ),
    Figure(
      "Recall",
      results["recall"],
      "",
      "share of training pictures among the samples, in the same features",
      "higher",
    ),
  ]


def _curves(workdir: Path) -> list[Curve]:
  tokenizer, diffusion = read_metrics(workdir / "tokenizer"), read_metrics(workdir / "diffusion")
  alignment = {"cosine": "vf_cos", "distance matrix": "vf_distmat"}
  adversarial = {"generator": "g_loss", "discriminator": "d_loss"}
  charts = [
    ("Tokenizer: reconstruction", "mean absolute error", {"L1": "l1"}, tokenizer, True),
    ("Tokenizer: alignment", "marginal losses", alignment, tokenizer, False),
    ("Tokenizer: adversarial", "hinge losses", adversarial, tokenizer, False),
    ("Diffusion: velocity", "mean squared error", {"MSE": "mse"}, diffusion, False),
    ("Diffusion: direction", "1 - cosine", {"direction loss": "cosine"}, diffusion, False),
  ]
  return [
    Curve(title, y_label, {k: curve(lines, v) for k, v in series.items()}, log_y=log_y)
    for title, y_label, series, lines, log_y in charts
  ]


def _project(store: latents.LatentStore) -> np.ndarray:
  flat = np.stack(
    [
      latents.normalise(store[i]["latent"], store.mean, store.std).ravel()
      for i in range(len(store))
    ]
  )
  from sklearn.manifold import TSNE  # which takes a second to import

  perplexity = min(30.0, (len(flat) - 1) / 3)
  plane = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(flat)
  return np.asarray(plane, np.float64)


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  workdir = Path(FLAGS.workdir)
  results = run(FLAGS.config, workdir)
  seconds = json.loads((workdir / "timings.json").read_text())
  console.table(
    "Quickstart",
    ("what", "value"),
    [
      ("PSNR of held-out pictures", f"{results['psnr']:.2f} dB"),
      ("SSIM of held-out pictures", f"{results['ssim']:.3f}"),
      ("FD-EfficientNet of samples", f"{results['fd_efficientnet']:.1f}"),
      ("FD-EfficientNet of real pictures", f"{results['fd_efficientnet_real']:.1f}"),
      *((f"time: {name.lower()}", console.clock(value)) for name, value in seconds.items()),
      ("report", str(workdir / "report.html")),
    ],
  )


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("The settings; configs/quickstart.py:pipeline if not given.")
  flags.DEFINE_string("workdir", "runs/quickstart", "Where everything is written.")
  console.run_command(main, config=CONFIG)
