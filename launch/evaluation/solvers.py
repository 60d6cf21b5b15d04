"""Cost and error of cheaper solvers: samples by several settings beside those of the best one.

They start from the same noise and labels, so that each sample has a counterpart and the distance
needs no pictures: |x - y| / |y| of normalised latents.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from launch import restore
from launch.engine import console, processes
from launch.engine.parts import share
from launch.evaluation.output import Output, Point
from launch.evaluation.sweep import points_of
from launch.report import plots
from launch.report.html import Section, picture_file
from lightningdit_jax import checks
from lightningdit_jax.sampling import sample_latents
from lightningdit_jax.solvers import TABLEAUX
from lightningdit_jax.store.space import labels_for
from vavae_jax.common import mesh
from vavae_jax.common.batches import Batches

DEFAULT_SAMPLES = 64


def evaluate(
  diffusion: restore.Trained,
  settings: FrozenConfigDict,
  grid: dict[str, list[Any]],
  output: Output,
  *,
  count: int = DEFAULT_SAMPLES,
  labels: str = "balanced",
  seed: int = 0,
) -> list[Point]:
  """Compares the points of a grid with the best `settings`; writes JSON, picture and page.

  A result has the point's settings, "evaluations" (of the velocity for one sample; None where the
  solver chooses), "seconds" per sample, "distance" (the mean over samples), "distance_95" (of the
  sample that 95 % are nearer than). InputError for settings that cannot be.
  """
  all_settings = [FrozenConfigDict(ConfigDict(settings.to_dict() | p)) for p in points_of(grid)]
  for each in (settings, *all_settings):  # before the first takes its time
    checks.check_sampling(each, diffusion.config)
  classes, names = diffusion.config.model.num_classes, restore.space_of(diffusion).class_names
  label_N = labels_for(labels, count, classes, seed, names)
  console.say(f"reference settings: {_described(settings)}")
  best, _ = _samples(diffusion, settings, label_N, seed)
  scale_N = np.linalg.norm(best, axis=1)
  points: list[Point] = []
  for point, each in zip(points_of(grid), all_settings, strict=True):
    found, seconds = _samples(diffusion, each, label_N, seed)
    distance_N = np.linalg.norm(found - best, axis=1) / scale_N
    measured = {
      "evaluations": _evaluations(each),
      "seconds": seconds,
      "distance": float(distance_N.mean()),
      "distance_95": float(np.quantile(distance_N, 0.95)),
    }
    points.append(point | measured)
    console.say(f"[{len(points)}/{len(all_settings)}] {points[-1]}")
  if jax.process_index():
    return points
  _draw(points, list(grid), output.png)
  summary = f"{count} samples each, beside {_described(settings)}."
  output.write(
    {
      "grid": grid,
      "points": points,
      "compared_with": settings.to_dict(),
      "diffusion": {"step": diffusion.step, "sha256": diffusion.sha256, "ema": diffusion.ema},
      "samples": count,
      "labels": labels,
      "seed": seed,
    },
    title="Solvers",
    summary=summary,
    sections=[Section("Cost and distance", summary, [picture_file(output.png)])],
    points=points,
  )
  return points


def _samples(
  diffusion: restore.Trained, settings: FrozenConfigDict, label_N: np.ndarray, seed: int
) -> tuple[np.ndarray, float]:
  """Normalised latents [N, h w Z], and seconds for one of them without compiling.

  Each process draws some; the slowest one's time counts.
  """
  devices = mesh.local_mesh()
  params = diffusion.on(devices).params

  @jax.jit
  def run(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    index, label = batch["index"], batch["label"]
    return sample_latents(diffusion.config, params, index, label, seed=seed, sample=settings)

  size, model = settings.batch_size, diffusion.config.model
  width = model.input_size**2 * model.in_channels
  starts = share(range(0, len(label_N), size))
  index = np.array([i for x in starts for i in range(len(label_N))[x : x + size]], np.int32)
  batch = {"index": index, "label": label_N[index]}
  batches = Batches(run, size, devices)
  next(batches(batch, params), None)  # compiles
  began = time.perf_counter()
  latents = [x.reshape(-1, width) for x in batches(batch, params)]
  seconds = np.array([time.perf_counter() - began])
  mine = {"latents": np.concatenate([np.empty((0, width), np.float32), *latents])}
  gathered = processes.gather(mine | {"seconds": seconds})
  slowest = max(float(each["seconds"][0]) for each in gathered)
  return np.concatenate([each["latents"] for each in gathered]), slowest / len(label_N)


def _evaluations(settings: FrozenConfigDict) -> int | None:
  """Evaluations of the velocity: one for each stage of each step; None where the solver chooses."""
  if settings.mode == "SDE" or settings.method not in TABLEAUX:
    return None
  stages, _ = TABLEAUX[settings.method]
  return (settings.num_steps - 1) * (len(stages) + 1)


def _described(settings: FrozenConfigDict) -> str:
  names = ("mode", "method", "num_steps", "timestep_shift", "cfg_scale", "cfg_interval_start")
  return ", ".join(f"{name}={settings[name]}" for name in names)


def _draw(points: list[Point], names: list[str], path: Path) -> None:
  """Distance over seconds; points that differ in the last setting alone are joined.

  A distance of 0, as the settings have to themselves, has no place on the axis: it is drawn below.
  """
  figure, ((axis,),) = plots.panels(size=(7, 5))
  below = min((point["distance"] for point in points if point["distance"]), default=1.0) / 3
  lines: dict[tuple[Any, ...], list[Point]] = {}
  for point in points:
    lines.setdefault(tuple(point[name] for name in names[:-1]), []).append(point)
  for key, line in lines.items():
    label = ", ".join(f"{k}={v}" for k, v in zip(names[:-1], key, strict=True))
    x, y = [p["seconds"] for p in line], [p["distance"] or below for p in line]
    axis.plot(x, y, "o-", label=label or names[-1])
    for point, place in zip(line, zip(x, y, strict=True), strict=True):
      text = str(point[names[-1]]) + ("" if point["distance"] else ", distance 0")
      axis.annotate(text, place, xytext=(4, 4), textcoords="offset points")
  seconds = [point["seconds"] for point in points]
  axis.set(xscale="log", xlabel="seconds per sample", yscale="log", ylabel="distance of latents")
  # Whole decades, the only numbers at the axis: others overlap where seconds are near.
  low, high = math.log10(min(seconds) / 1.1), math.log10(max(seconds) * 1.1)
  axis.set_xlim(10 ** math.floor(low), 10 ** math.ceil(high))
  axis.xaxis.set_minor_formatter("")
  axis.grid(alpha=0.3, which="both")
  axis.legend()
  plots.save(figure, path, dpi=120)
