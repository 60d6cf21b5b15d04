"""The page of a whole pipeline, report.html of `launch.quickstart`: samples, training, figures."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path

import jax
import numpy as np
from ml_collections import FrozenConfigDict

from configs.pictures import MOST_JUDGED
from launch import restore
from launch.engine.writers import curve, read_metrics
from launch.evaluation import figures, reconstruction
from launch.evaluation.features import Network
from launch.evaluation.pictures import FromSource, own_pictures, take
from launch.evaluation.sample_files import read_samples
from launch.evaluation.space import PERPLEXITY, tsne
from launch.report import html
from launch.report.charts import Curve, scatter, training_section
from launch.report.html import Figure, Section
from lightningdit_jax.store import latents
from vavae_jax.data.order import spread

SHOWN_RECONSTRUCTIONS, SHOWN_CLASSES, SHOWN_PER_CLASS, SHOWN_AT_HEAD = 24, 12, 10, 40
MAPPED = 2_000  # latents at most: the time of t-SNE and the page grow with them
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write(
  config: FrozenConfigDict,
  workdir: Path,
  tokenizer: restore.Trained,
  store: latents.LatentStore,
  results: dict[str, float],
  network: Network,
  seconds: dict[str, float],
) -> None:
  """Writes WORKDIR/report.html of a quickstart whose stages have all run.

  `store` has the latents of the training pictures, `results` figures by name, those of samples in
  the features of `network`, and `seconds` the time of each stage.
  """
  pictures, labels = read_samples(workdir / "samples.npz")
  classes = store.manifest["class_names"]
  there = np.unique(labels)[:SHOWN_CLASSES]
  names = [classes[label] for label in there]
  rows = [pictures[labels == label][:SHOWN_PER_CLASS] for label in there]
  columns = min(len(row) for row in rows)
  samples = np.stack([row[:columns] for row in rows])
  held_out, training = (own_pictures(tokenizer, held_out=which) for which in (True, False))
  originals = take(held_out, spread(len(held_out), SHOWN_RECONSTRUCTIONS).tolist())
  rebuilt = reconstruction.reconstruct(tokenizer, originals)
  mapped = np.sort(np.random.default_rng(0).permutation(len(store))[:MAPPED])
  each = (store[i]["latent"] for i in mapped.tolist())
  flat = np.stack([latents.normalise(x, store.mean, store.std).ravel() for x in each])
  perplexity = min(PERPLEXITY, (len(flat) - 1) / 3)
  plane = tsne(flat, seed=0, perplexity=perplexity)
  counts = (len(pictures), min(len(training), MOST_JUDGED), len(held_out))
  shown = _figures(results, network, *counts)
  versions = {"python": platform.python_version()}
  versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
  sections = [
    Section(
      "Samples",
      "New pictures: drawn from noise by the diffusion transformer under guidance, which knows "
      "nothing but the class, and decoded by the tokenizer.",
      [html.picture_rows(dict(zip(names, samples, strict=True)), columns)],
    ),
    Section(
      "Reconstructions",
      "Held-out pictures, seen by no training. Left the original, right what the tokenizer "
      "rebuilds from its latent.",
      [html.picture_pairs(originals, rebuilt, ("original", "reconstruction"))],
    ),
    training_section(_curves(workdir)),
    Section(
      "Latents",
      f"{len(mapped):,} training pictures at the places of their latents: the normalised latents "
      f"of all positions, brought to the plane by t-SNE (perplexity {perplexity:.3g}, PCA start).",
      [scatter(plane, store.labels[mapped], classes, pictures_of(store, training, mapped))],
    ),
    Section("Figures", "", [html.figures_table(shown, _caveats(*counts))]),
    Section(
      "Run",
      f"{html.duration(sum(seconds.values()))} in all.",
      [
        html.bars(seconds),
        html.details("Configuration", json.dumps(config.to_dict(), indent=2)),
        html.details("Versions", json.dumps(versions, indent=2)),
      ],
    ),
  ]
  html.write_page(
    workdir / "report.html",
    f"VA-VAE and LightningDiT in JAX: {_what(config.tokenizer.data.source)}",
    sections,
    summary=(
      f"A tokenizer learnt to write {config.tokenizer.data.image_size} px pictures of "
      f"{len(classes)} classes as {store.shape[0]} x {store.shape[1]} latents of "
      f"{store.shape[2]} numbers, aligned with the features of a frozen EfficientNet-Lite0; a "
      "diffusion transformer learnt to draw such "
      f"latents. {len(store):,} pictures, on {jax.device_count()} {jax.devices()[0].platform} "
      "device(s)."
    ),
    figures=shown,
    hero=html.strip(
      # Neighbours are of different classes.
      samples.swapaxes(0, 1).reshape(-1, *samples.shape[2:])[:SHOWN_AT_HEAD],
      "Samples of all classes",
    ),
  )


def pictures_of(store: latents.LatentStore, training: FromSource, places: np.ndarray) -> np.ndarray:
  """The pictures whose latents have these places in the store, which left out the unreadable."""
  skipped, name = {*store.manifest.get("skipped", ())}, training.source.name
  there = [at for at, index in enumerate(training.indices.tolist()) if name(index) not in skipped]
  return take(training, [there[place] for place in places])


def _what(source: str) -> str:
  return "quickstart" if source.startswith("embedded:") else f"pictures of {source}"


def _figures(
  results: dict[str, float], network: Network, samples: int, training: int, held_out: int
) -> list[Figure]:
  """The figures with their units and notes."""
  real = Figure(
    f"{network.distance} of real pictures",
    results[f"{network.key}_real"],
    "",
    f"{held_out} held-out against {training} training pictures: what perfect samples would get",
    "lower",
  )
  rebuilt = figures.shown("reconstruction", results, None, f"{held_out} held-out pictures")
  notes = {
    "precision": "share of samples among the training pictures",
    "recall": "share of training pictures among the samples",
  }
  against = f"{samples} samples against {training} training pictures"
  distance, *drawn = figures.shown("generation", results, network, against, notes)
  return [*rebuilt, distance, real, *drawn]


def _caveats(samples: int, training: int, held_out: int) -> list[str]:
  return [
    "FD-EfficientNet is the Frechet distance in features of the very network that the tokenizer "
    "was aligned with: the teacher judges itself. It is not FID and compares with nothing else.",
    f"It is biased upwards for few samples: {samples} samples, {held_out} held-out pictures "
    f"and {training} training pictures meet in 1,280 dimensions.",
    "Models so small, trained so briefly, show that the pipeline works, not what the method does.",
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
