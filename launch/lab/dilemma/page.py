"""The page of `launch.lab.dilemma`: tables, pictures, how they were made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image

from configs.lab import dilemma
from launch.lab.dilemma import predictors
from launch.lab.dilemma.results import Results, Space, mean
from launch.lab.jobs import Job
from launch.lab.markdown import Region, beside, picture, table
from launch.report import plots

REGION = Region(
  "<!-- results: written by launch.lab.dilemma -->",
  "<!-- end of the results -->",
  "Reconstruction against generation",
)
NOT_RUN = "-"
COLOURS = {"plain": "#cc6677", "aligned": "#117733", "shortcut": "#332288"}
NOTES = (
  "± is the standard deviation over all models of a row. The distance is the sum of its two parts, "
  "of means and of covariances. Class accuracy is the share of samples that the judge finds to be "
  "of their label's class. The Gaussian is one of each class, fitted to the latents and not "
  "trained, decoded by the same tokenizer. Effective dimensions tell how many directions latents "
  "use. Teacher cosine is that of projected latents with the teacher's features, on held-out "
  "pictures at the end of training."
)


def write(
  config: FrozenConfigDict, workdir: Path, jobs: Sequence[Job], page: Path, command: str
) -> None:
  """Writes the results so far; a dash stands for those that have not been run as configured.

  `page` is a new page, or one whose results are replaced (InputError if it has no place for them);
  pictures go beside it. `command` is shown as the one that runs the experiment.
  """
  REGION.check(page)
  found = Results(config, workdir, jobs)
  spaces, name = found.spaces(), found.name
  frontier = _draw_frontier(spaces, found, beside(page, "frontier"))
  curves = _draw_curves(spaces, found, beside(page, "curves"))
  samples = _draw_samples(found, beside(page, "samples"))
  sampler = dilemma.diffusion(config.size, "f8d1", "w64").sample
  text = [
    *best(spaces, found.key, name),
    *_judges(found),
    f"Reconstruction of held-out pictures by the posterior's mode, and generation, {name} of "
    f"{config.num_samples:,} samples after {config.steps[-1]:,} steps, lower is better; of up to "
    f"{len(config.tokenizer_seeds)} tokenizers and {len(config.seeds)} diffusion models of each. "
    f"Samples are drawn by {sampler.method} at {sampler.num_steps} times, without guidance.",
    "",
    *_table(spaces, found),
    "",
    NOTES,
    "",
    *picture(frontier, f"{name} over PSNR, with arrows from plain to aligned"),
    f"{name} after so many steps of one training with a cosine decay:",
    "",
    *_steps(spaces, found),
    "",
    *picture(curves, f"{name} over steps"),
    *picture(samples, "Samples of the first seeds: the same labels and the same noise everywhere"),
    *predictors.section(found),
    *_made(found, command),
  ]
  REGION.write(page, text)


def best(spaces: Sequence[Space], key: str, name: str) -> list[str]:
  """Plain at its best KL weight beside aligned at its best, for latents of each shape and models of
  each width.

  `key` and `name` are the distance's, in files and on the page.
  """
  lines = []
  for kind in dict.fromkeys((space.shape, space.width) for space in spaces):
    shown = []
    for variant in ("plain", "aligned"):
      alike = [s for s in spaces if (s.shape, s.width) == kind and s.variant == variant]
      run = [space for space in alike if space.last(key)]
      if run:
        found = min(run, key=lambda space: np.mean(space.last(key)))
        distances = found.last(key)
        how = f"KL weight {found.kl}, {len(distances)} model{'s' if len(distances) > 1 else ''}"
        shown.append(f"{variant} {_spread(distances, 3)}, {_decibels(found)} dB ({how})")
    if len(shown) == 2:
      lines.append(
        f"- {kind[0]}, width {kind[1]}, {name} at the better KL weight of each: {', '.join(shown)}."
      )
  return [*lines, ""] if lines else []


def _judges(found: Results) -> list[str]:
  """The classifiers, and the distances of real pictures."""
  real = found.read("real")
  text = []
  for judge, name, key in (
    ("judge", found.name, found.key),
    ("second", f"{found.name}2", found.second_key),
  ):
    if (accuracy := found.logged(judge, "held_out/accuracy")) is not None:
      line = f"The classifier of {name} is right about {100 * accuracy:.1f} % of held-out pictures"
      if real:
        line += f"; {real['samples']['pictures']:,} real ones that no training used have a "
        line += f"distance of {real['figures'][key]:.4f}"
      text.append(f"{line}.")
  return [
    f"{found.name} is the Frechet distance in the features of a classifier that was trained on the "
    "same pictures and taught no tokenizer. It is not FID and compares with nothing outside this "
    f"page. {' '.join(text)}",
    "",
  ]


def _table(spaces: Sequence[Space], found: Results) -> list[str]:
  """A row for each space."""
  key, name = found.key, found.name
  head = [
    *("tokenizer", "latents", "KL weight", "width", "models", "PSNR (dB)", f"r{name}"),
    *("effective dimensions", name, "of means", "of covariances", "class accuracy (%)"),
    *(f"{name}2", f"{name}, Gaussian", "accuracy, Gaussian (%)", "teacher cosine"),
  ]
  rows = []
  for space in spaces:
    percent = [100 * x for x in space.last("class_accuracy")]
    by_gaussian = [100 * x for x in space.gaussian.get("class_accuracy", [])]
    row = [space.variant, space.shape, space.kl, str(space.width), str(len(space.last(key)))]
    row += [_decibels(space), _spread(space.figures.get(f"r{key}", []), 4)]
    row += [_spread(space.figures.get("effective_dimensions", []), 1), _spread(space.last(key), 3)]
    row += [_mean(space.last(f"{key}_{part}"), 3) for part in ("means", "covariances")]
    row += [
      _spread(percent, 1),
      _spread(space.last(found.second_key), 3),
      _spread(space.gaussian.get(key, []), 3),
    ]
    row += [_mean(by_gaussian, 1), _mean(space.figures.get("teacher_cosine", []), 2)]
    rows.append(row)
  return table(head, rows)


def _steps(spaces: Sequence[Space], found: Results) -> list[str]:
  steps = found.config.steps
  rows = [
    [
      *(space.variant, space.shape, space.kl, str(space.width)),
      *(_spread(space.steps.get(step, {}).get(found.key, []), 3) for step in steps),
    ]
    for space in spaces
  ]
  head = ["tokenizer", "latents", "KL weight", "width", *(f"{step:,}" for step in steps)]
  return table(head, rows)


def _decibels(space: Space) -> str:
  return _mean(space.figures.get("psnr", []), 2)


def _mean(values: Sequence[float], digits: int) -> str:
  found = mean(values)
  return NOT_RUN if found is None else f"{found:.{digits}f}"


def _spread(values: Sequence[float], digits: int) -> str:
  spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
  return _mean(values, digits) + spread


def _made(found: Results, command: str) -> list[str]:
  """Commands, machine and time."""
  record = found.record
  kinds: dict[str, list[float]] = {}
  for job in found.jobs:
    if seconds := record.seconds(job):
      kinds.setdefault(job.kind, []).append(seconds)
  total = sum(sum(seconds) for seconds in kinds.values())
  rows = [(kind, str(len(s)), f"{sum(s) / 60:.1f}") for kind, s in kinds.items()]
  config = found.config
  return [
    "How this was made:",
    "",
    "```",
    command,
    "```",
    "",
    f"Made by {record.made(found.jobs)}. Tokenizers had "
    f"{config.tokenizer_steps:,} steps, the judges {config.judge_steps:,}. Seeds are "
    f"{', '.join(map(str, config.tokenizer_seeds))} of the tokenizers and "
    f"{', '.join(map(str, config.seeds))} of the diffusion models. All jobs together took "
    f"{total / 3600:.1f} hours of one worker, including work that was stopped and repeated:",
    "",
    *table(("jobs", "how many", "minutes"), rows),
    "",
  ]


def _draw_frontier(spaces: Sequence[Space], found: Results, path: Path) -> Path | None:
  """A panel for each shape of latents and width: plain and aligned, of each KL weight."""
  places: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}
  for space in spaces:
    psnr, distance = mean(space.figures.get("psnr", [])), mean(space.last(found.key))
    if psnr is not None and distance is not None and space.variant != "shortcut":
      panel = places.setdefault((space.shape, space.width), {})
      panel[f"{space.variant}/KL {space.kl}"] = psnr, distance
  if not places:
    return None
  figure, axes = plots.panels(1, len(places), size=(4.5 * len(places) + 1.5, 4.5))
  for axis, ((shape, width), shown) in zip(axes[0], places.items(), strict=True):
    plots.frontier(axis, shown, COLOURS)
    axis.set(
      title=f"{shape}, width {width}", xlabel="PSNR of held-out pictures (dB), higher is better"
    )
  axes[0, 0].set_ylabel(f"{found.name}, lower is better")
  return plots.save(figure, path, dpi=110)


def _draw_curves(spaces: Sequence[Space], found: Results, path: Path) -> Path | None:
  shapes = {space.shape: None for space in spaces if space.steps}
  if not shapes:
    return None
  figure, axes = plots.panels(1, len(shapes), size=(4.2 * len(shapes), 4.2))
  for axis, shape in zip(axes[0], shapes, strict=True):
    styles = itertools.cycle(("o-", "s--", "^:"))
    style: dict[tuple[str, int], str] = {}
    for space in spaces:
      if space.shape != shape or not space.steps:
        continue
      line = style.setdefault((space.kl, space.width), next(styles))
      points = [(step, np.mean(x[found.key])) for step, x in sorted(space.steps.items())]
      label = f"{space.variant}, KL {space.kl}, width {space.width}"
      axis.plot(*zip(*points, strict=True), line, color=COLOURS[space.variant], label=label)
    axis.set(title=shape, xlabel="diffusion steps")
    axis.set_xscale("log")
    _plain_numbers(axis)
    axis.legend(fontsize=7)
    axis.grid(alpha=0.3, which="both")
  axes[0, 0].set_ylabel(found.name)
  return plots.save(figure, path, dpi=110)


def _plain_numbers(axis: Any) -> None:
  """Makes the y axis logarithmic, with plain numbers."""
  axis.set_yscale("log")
  for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
    which("{x:g}")


def _draw_samples(found: Results, path: Path) -> Path | None:
  sheets = {name: file for name in found.config.spaces if (file := found.sheet(name))}
  if not sheets:
    return None
  columns = min(len(sheets), 4)
  rows = -(-len(sheets) // columns)
  figure, axes = plots.panels(rows, columns, size=(3.2 * columns, 4.6 * rows))
  for axis in axes.flat:
    axis.axis("off")
    axis.set(xticks=[], yticks=[])
  for axis, (name, file) in zip(axes.flat, sheets.items(), strict=False):
    axis.imshow(np.asarray(Image.open(file)), interpolation="nearest")
    axis.set_title(name, fontsize=8)
  return plots.save(figure, path, dpi=110)
