"""A latent space by itself: its uniformity, its channels, its signal to noise."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from launch.engine import console, processes
from launch.engine.parts import share
from launch.evaluation import figures
from launch.evaluation.cells import Cells
from launch.evaluation.figures import LatentSpace
from launch.evaluation.output import Output
from launch.report import plots
from launch.report.charts import Curve, line_chart, scatter
from launch.report.html import Section
from lightningdit_jax import transport
from vavae_jax.common.files import write_safetensors
from vavae_jax.metrics.energy import energy_distance
from vavae_jax.metrics.uniformity import Uniformity, density, uniformity

PERPLEXITY = 30.0
TIMES = np.linspace(0.02, 0.98, 49)
_SHOWN_POINTS = 2_000


class Run(NamedTuple):
  """One t-SNE of n cells."""

  values: np.ndarray  # the cells, normalised [n,Z]
  labels: np.ndarray  # of their pictures [n]
  plane: np.ndarray  # place of each [n,2]
  density: np.ndarray  # at each place [n]


def evaluate(
  cells: Cells,
  output: Output,
  *,
  runs: int = 10,
  count: int = 10_000,
  seed: int = 0,
  path: str = "Linear",
) -> dict[str, float]:
  """All figures of a latent space, with JSON, picture and page.

  There are `runs` t-SNEs of `count` cells each, the first by `seed`, the next by the seeds that
  follow; `path` is the transport's, for the curve of signal to noise. Several processes share the
  runs, and the first has the figures and writes.
  """
  measured = measure(cells, output.progress, runs=runs, count=count, seed=seed)
  if measured is None:
    return {}
  gathered, first = measured
  found, values = gathered.runs, first.values.astype(np.float64)
  computed = figures.compute("latents", gathered)
  spread = {
    name: float(np.std([getattr(x, name) for x in found], ddof=1)) if runs > 1 else None
    for name in Uniformity._fields
  }
  curves = signal_to_noise(gathered.eigenvalues, path)
  channels = _channels(cells, values)
  _draw(output, first, channels, gathered.correlation, curves)
  output.write(
    {
      "figures": computed,
      "standard_deviation_over_runs": spread,
      "runs": [x._asdict() for x in found],
      "cells": len(values),
      "seed": seed,
      "perplexity": PERPLEXITY,
      "latents": cells.about,
      "channels": channels,
      "eigenvalues": gathered.eigenvalues.tolist(),
      "signal_to_noise": {name: [[t, v] for t, v in points] for name, points in curves.items()},
    },
    title=f"Latents: density CV {computed['density_cv']:.3f}",
    summary=cells.summary,
    figures=figures.shown(
      "latents",
      computed,
      None,
      f"{runs} runs of {len(values)} cells",
      units={name: f"± {x:.3f}" for name, x in spread.items() if x is not None}
      | {"effective_dimensions": f"of {values.shape[1]}"},
    ),
    sections=_sections(cells, first, curves, path),
  )
  return computed


def measure(
  cells: Cells, progress: Path, *, runs: int, count: int, seed: int
) -> tuple[LatentSpace, Run] | None:
  """What the figures of a latent space are computed of, and the first t-SNE; arguments as above.

  None in all processes but the first. Finished runs wait in the folder `progress`.
  """
  seeds = range(seed, seed + runs)
  mine = share(seeds)
  for each in console.tracked(mine, "t-SNE", len(mine)):
    _run(cells, count, each, progress)
  processes.wait_for_all()
  if jax.process_index():
    return None
  processes.check_seen(_file(progress, each) for each in seeds)
  done = [_run(cells, count, each, progress) for each in seeds]
  found, values = [uniformity(run.density) for run in done], done[0].values.astype(np.float64)
  correlation: np.ndarray = np.atleast_2d(np.corrcoef(values.T))
  covariance = np.atleast_2d(np.cov(values.T))
  eigenvalues = np.maximum(np.linalg.eigvalsh(covariance), 0)[::-1]
  normal = np.random.default_rng(seed).standard_normal(values.shape)
  from_normal = energy_distance(values, normal)
  return LatentSpace(found, eigenvalues, correlation, from_normal), done[0]


def _sections(
  cells: Cells, run: Run, curves: dict[str, list[tuple[int, float]]], path: str
) -> list[Section]:
  classes = cells.names or [str(i) for i in range(run.labels.max() + 1)]
  some = slice(None, _SHOWN_POINTS)
  title = f"Signal to noise of the path {path}"
  chart = Curve(title, "log10 of variances", curves, x_label="time x 100")
  return [
    Section(
      "Map",
      f"Cells of the first run in the plane (t-SNE, perplexity {PERPLEXITY:g}), by class.",
      [scatter(run.plane[some], run.labels[some], classes)],
    ),
    Section("Noise", "Along the axes of most, median and least variance.", [line_chart(chart)]),
  ]


def _file(progress: Path, seed: int) -> Path:
  return progress / f"run-{seed}.safetensors"


def _run(cells: Cells, count: int, seed: int, progress: Path) -> Run:
  """One t-SNE, or what a run before found of the same cells."""
  values, labels = cells.draw(count, seed)
  path = _file(progress, seed)
  digest = np.frombuffer(hashlib.sha256(values.tobytes()).digest(), np.uint8)
  found = safetensors.numpy.load(path.read_bytes()) if path.exists() else {}
  plane = found.get("plane")
  if plane is None or not np.array_equal(found.get("cells", 0), digest):
    plane = tsne(values, seed)
    write_safetensors(path, {"plane": plane, "cells": digest})
  return Run(values, labels, plane, density(plane))


def tsne(values: np.ndarray, seed: int, perplexity: float = PERPLEXITY) -> np.ndarray:
  """Vectors [n,F] in the plane, float64 [n,2]."""
  from sklearn.manifold import TSNE  # which takes a second to import

  plane = TSNE(perplexity=perplexity, random_state=seed, init="pca").fit_transform(values)
  return np.asarray(plane, np.float64)


def signal_to_noise(eigenvalues: np.ndarray, path: str) -> dict[str, list[tuple[int, float]]]:
  """Points (100 t, log10 of (alpha / sigma)^2 times the variance) of some principal axes.

  `eigenvalues` are the variances, descending; `path` is the transport's.
  """
  c = transport.coefficients(path, jnp.asarray(TIMES), jnp.zeros((len(TIMES), 1)))
  ratio = np.asarray(c.alpha / c.sigma, np.float64).ravel()
  axes = {"most": eigenvalues[0], "median": np.median(eigenvalues), "least": eigenvalues[-1]}
  tiny = np.finfo(np.float64).tiny
  return {
    name: [
      (round(100 * t), float(np.log10(max(r**2 * variance, tiny))))
      for t, r in zip(TIMES, ratio, strict=True)
    ]
    for name, variance in axes.items()
  }


def _channels(cells: Cells, values: np.ndarray) -> dict[str, list[float]]:
  """The mean and deviation that normalise each channel, and moments of its normalised cells."""
  centred = values - values.mean(0)
  std = values.std(0)
  standard = centred / np.maximum(std, np.finfo(np.float64).tiny)
  columns = {
    "mean": cells.mean,
    "std": cells.std,
    "normalised_mean": values.mean(0),
    "normalised_std": std,
    "skewness": (standard**3).mean(0),
    "excess_kurtosis": (standard**4).mean(0) - 3,
  }
  return {name: np.asarray(x, np.float64).tolist() for name, x in columns.items()}


def _draw(
  output: Output,
  run: Run,
  channels: dict[str, list[float]],
  correlation: np.ndarray,
  curves: dict[str, list[tuple[int, float]]],
) -> None:
  figure, axes = plots.panels(2, 2, size=(12, 10))
  (first, second), (third, fourth) = axes
  first.scatter(*run.plane.T, c=run.density, s=4, cmap="viridis", linewidths=0)
  first.set(title="cells by t-SNE, coloured by density", xticks=[], yticks=[])
  places = np.arange(len(channels["mean"]))
  second.bar(places, channels["std"], color="#44aa99")
  second.errorbar(places, channels["mean"], fmt=".", color="#332288")
  second.set(title="channels: mean (dots), standard deviation (bars)", xlabel="channel")
  shown: Any = third.imshow(correlation, vmin=-1, vmax=1, cmap="RdBu")
  third.set(title="correlation of the channels")
  figure.colorbar(shown, ax=third)
  for name, points in curves.items():
    fourth.plot([t / 100 for t, _ in points], [v for _, v in points], label=f"{name} variance")
  fourth.axhline(0, color="grey", linewidth=0.8)
  fourth.legend()
  fourth.set(title="signal to noise", xlabel="t", ylabel="log10 of variances")
  plots.save(figure, output.png)
