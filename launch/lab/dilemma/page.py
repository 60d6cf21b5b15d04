"""The page of `launch.lab.dilemma`: tables, pictures, how they were made."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image

from configs.lab import dilemma
from configs.lab.dilemma import MAIN
from launch.lab.dilemma.results import Results, Space
from launch.lab.jobs import Job
from launch.lab.markdown import Region, beside, picture, table
from launch.report import plots

REGION = Region(
  "<!-- results: written by launch.lab.dilemma -->",
  "<!-- end of the results -->",
  "Reconstruction against generation",
)
NOT_RUN = "-"
COLOURS = {"plain": "#cc6677", "aligned": "#117733"}
SHOWN_ROWS = 2  # of each set's sheet
NOTES = (
  "Validation MSE is the diffusion model's loss on held-out latents; its scale differs between "
  "latent spaces, so rows do not compare. Density CV, Gini and entropy measure how evenly latents "
  "are spread (mean ± standard deviation of several t-SNEs), effective dimensions how many "
  "directions they use. Teacher cosine is the cosine between projected latents and the teacher's "
  "features, on held-out pictures at the end of training."
)


def write(
  config: FrozenConfigDict, workdir: Path, jobs: Sequence[Job], page: Path, command: str
) -> None:
  """Writes the results so far; a dash stands for those that have not been run as configured.

  `page` is a new page, or one whose results are replaced (InputError if it has no place for them);
  pictures go beside it. `command` is shown as the one that runs the experiment.
  """
  found = Results(config, workdir, jobs)
  name = found.name
  main = [found.space(v, w) for w in config.widths for v in MAIN]
  widest = [s for s in main if s.width == found.widest]
  others = [found.space(v, found.widest) for v in config.ablations]
  longer = [found.longer(v) for v in MAIN] if config.long else []
  changed = [
    f"At {found.widest} channels, with parts of the method or of the budget changed:",
    "",
    *_table([*widest, *others, *longer], name),
    "",
  ]
  seeds = f"± is the standard deviation over {len(config.seeds)} seeds of the diffusion model"
  if len(config.seeds) == 1:
    seeds = "the diffusion model has one seed, so there is no spread"
  REGION.check(page)
  frontier = _draw_frontier(main, others, name, beside(page, "frontier"))
  curves = _draw_curves([*main, *longer], name, beside(page, "curves"))
  samples = _draw_samples(found, main, beside(page, "samples"))
  text = [
    *_judge(found),
    *picture(
      frontier,
      f"{name} over PSNR, with arrows from plain to aligned"
      + (f"; right: changes at {found.widest} channels" if others else ""),
    ),
    f"Reconstruction of held-out pictures by the posterior's mode, and generation, {name} of "
    f"{config.num_samples:,} samples, lower is better; {seeds}. {_sampler(config)}",
    "",
    *_table(main, name),
    "",
    NOTES,
    "",
    *picture(curves, f"{name} of {config.curve_samples:,} samples over steps"),
    *picture(
      samples,
      f"Without guidance (left) and with it ({config.cfg_scale:g}, right): the labels are the same "
      "in each row, and the noise for the two tokenizers of a width",
    ),
    *(changed if others or longer else []),
    *_made(found, command),
  ]
  REGION.write(page, text)


def _judge(found: Results) -> list[str]:
  """The classifier, and the distance of real pictures."""
  accuracy = found.figure("judge", "held_out/accuracy")
  percent = NOT_RUN if accuracy is None else f"{100 * accuracy:.1f} %"
  text = (
    f"{found.name} is the Frechet distance in the features of a classifier that was trained on the "
    f"same pictures and taught no tokenizer; its accuracy on the held-out tenth is {percent}. It "
    "is not FID and compares with nothing outside this page."
  )
  if real := found.read("real"):
    distance = next(iter(real["figures"].values()))
    count = real["samples"]["pictures"]
    text += f" {count:,} real pictures that no training used have {distance:.3f}."
  return [text, ""]


def _sampler(config: FrozenConfigDict) -> str:
  sampler = dilemma.diffusion(config.size, 1).sample
  return (
    f"Samples are drawn by {sampler.method} at {sampler.num_steps} times, shifted by "
    f"{sampler.timestep_shift:g}; those of the first seed also with a guidance scale of "
    f"{config.cfg_scale:g} in all channels where t is at least {sampler.cfg_interval_start:g}."
  )


def _table(spaces: Sequence[Space], name: str) -> list[str]:
  """A row for each tokenizer."""
  head = [
    *("tokenizer", "channels", "PSNR (dB)", "SSIM", f"r{name}", name, f"{name}, guided"),
    *("density CV", "Gini", "entropy", "effective dimensions", "teacher cosine", "validation MSE"),
  ]
  rows = []
  for space in spaces:
    found = space.figures
    shown = functools.partial(_shown, found)
    distance = next((key for key in found if key.startswith("rfd_")), "")
    spread = f" ± {found['density_cv_std']:.3f}" if "density_cv_std" in found else ""
    row = [space.variant, str(space.width), shown("psnr", 2), shown("ssim", 3)]
    row += [shown(distance, 2 if found.get(distance, 1) >= 0.1 else 4)]
    row += [_spread(space.distances), _spread(space.guided)]
    row += [shown("density_cv", 3) + spread, shown("gini", 3), shown("normalized_entropy", 3)]
    row += [shown("effective_dimensions", 1), shown("teacher_cosine", 2)]
    rows.append([*row, f"{np.mean(space.mse):.3f}" if space.mse else NOT_RUN])
  return table(head, rows)


def _shown(figures: Mapping[str, float], name: str, digits: int) -> str:
  return f"{figures[name]:.{digits}f}" if name in figures else NOT_RUN


def _spread(values: Sequence[float]) -> str:
  if len(values) < 2:
    return f"{values[0]:.2f}" if values else NOT_RUN
  return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def _made(found: Results, command: str) -> list[str]:
  """Commands, machine and time."""
  record = found.record
  kinds: dict[str, list[float]] = {}
  for job in found.jobs:
    if seconds := record.seconds(job.name):
      kinds.setdefault(job.kind, []).append(seconds)
  total = sum(sum(seconds) for seconds in kinds.values())
  commits, machines = (
    ", ".join(sorted({*each} - {""}))
    for each in zip(*(record.where(job.name) for job in found.jobs), strict=True)
  )
  runs = [found.read(job.name).get("run", {}) for job in found.jobs if not job.resumes]
  jaxes = ", ".join(sorted({run["jax"] for run in runs if "jax" in run}))
  devices = sorted({x for run in runs if "cpu" not in (x := run.get("device", "cpu"))})
  seeds = ", ".join(map(str, found.config.seeds))
  rows = [(kind, str(len(s)), f"{sum(s) / 60:.0f}") for kind, s in kinds.items()]
  return [
    "How this was made:",
    "",
    "```",
    command,
    "```",
    "",
    f"Commits {commits}; jax {jaxes}; {', '.join([machines, *devices])}. Seeds of the diffusion "
    f"models: {seeds}; of everything else 0. All jobs together took {total / 3600:.1f} hours of "
    "one worker, including work that was stopped and repeated:",
    "",
    *table(("jobs", "how many", "minutes"), rows),
    "",
  ]


def _draw_frontier(
  main: Sequence[Space], others: Sequence[Space], name: str, path: Path
) -> Path | None:
  """All widths on the left; on the right the widest, with the variants that were tried there."""
  shown = _places(main)
  changed = _places(others)
  if not shown:
    return None
  figure, axes = plots.panels(1, 2 if changed else 1, size=(13 if changed else 7, 5))
  plots.frontier(axes[0, 0], shown, COLOURS)
  _by_factors(axes[0, 0])
  axes[0, 0].set(ylabel=f"{name}, lower is better")
  axes[0, 0].set_xlabel("PSNR of held-out pictures (dB), higher is better")
  if changed:
    _draw_changes(axes[0, 1], shown | _places(others), max(space.width for space in main), name)
  return plots.save(figure, path, dpi=110)


def _draw_changes(
  axis: Any, places: Mapping[str, tuple[float, float]], width: int, name: str
) -> None:
  """A row for each variant of one width by distance, with its PSNR: points may coincide."""
  rows = [(key, *place) for key, place in places.items() if key.endswith(f"/d{width}")]
  rows.sort(key=lambda row: row[2])
  variants = [key.partition("/")[0] for key, _, _ in rows]
  distances = [distance for _, _, distance in rows]
  labels = [f"{v}, {psnr:.1f} dB" for v, (_, psnr, _) in zip(variants, rows, strict=True)]
  axis.barh(labels, distances, height=0.6, color=[COLOURS.get(v, "#bbbbbb") for v in variants])
  axis.bar_label(axis.containers[0], fmt="%.2f", padding=4, fontsize=8)
  axis.margins(x=0.12)
  axis.invert_yaxis()
  axis.grid(axis="x", alpha=0.3)
  axis.set(xlabel=f"{name} at {width} channels, lower is better")


def _places(spaces: Sequence[Space]) -> dict[str, tuple[float, float]]:
  """(PSNR, distance) of "VARIANT/dWIDTH", of those that have both."""
  return {
    f"{space.variant}/d{space.width}": (space.figures["psnr"], space.distance)
    for space in spaces
    if space.distance is not None and "psnr" in space.figures
  }


def _by_factors(axis: Any) -> None:
  """Makes the y axis logarithmic, with plain numbers."""
  axis.set_yscale("log")
  for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
    which("{x:g}")


def _draw_curves(main: Sequence[Space], name: str, path: Path) -> Path | None:
  drawn = [space for space in main if space.steps]
  if not drawn:
    return None
  widths = sorted({space.width for space in drawn})
  figure, axes = plots.panels(1, len(widths), size=(4 * len(widths), 3.6), sharey=True)
  for axis, width in zip(axes[0], widths, strict=True):
    for space in drawn:
      if space.width == width:
        colour = COLOURS[space.variant.partition(",")[0]]
        style = "o-" if space.variant in MAIN else "o--"
        axis.plot(*zip(*space.steps, strict=True), style, color=colour, label=space.variant)
    axis.set(title=f"{width} channels", xlabel="diffusion steps")
    _by_factors(axis)
    axis.grid(alpha=0.3, which="both")
    axis.legend()
  axes[0, 0].set_ylabel(name)
  return plots.save(figure, path, dpi=110)


def _draw_samples(found: Results, main: Sequence[Space], path: Path) -> Path | None:
  side = dilemma.judge(found.config.size).data.image_size
  rows: list[tuple[str, list[np.ndarray]]] = []
  for space in main:
    files = [found.sheet(kind, space) for kind in ("samples", "guided")]
    sheets = [np.asarray(Image.open(file))[: SHOWN_ROWS * side] for file in files if file]
    if len(sheets) == len(files):
      rows.append((f"{space.variant} d{space.width}", sheets))
  if not rows:
    return None
  figure, axes = plots.panels(len(rows), 2, size=(12, 1.45 * len(rows)))
  for (label, sheets), pair in zip(rows, axes, strict=True):
    for sheet, axis in zip(sheets, pair, strict=True):
      axis.imshow(sheet, interpolation="nearest")
      axis.set(xticks=[], yticks=[])
    pair[0].set_ylabel(label, fontsize=9)
  return plots.save(figure, path, dpi=110)
