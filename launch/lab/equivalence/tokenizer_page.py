"""What `launch.lab.equivalence training` writes of tokenizers: results so far, how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from launch.lab.equivalence import tokenizer_pieces
from launch.lab.equivalence.pieces import Settings
from launch.lab.equivalence.side_page import COLOURS, FED_NAMES, FIGURES, NAMES, compared, made
from launch.lab.equivalence.side_results import SIDES, Results, Series, Tensors, relative
from launch.lab.equivalence.training import LOGGED
from launch.lab.jobs import Job
from launch.lab.markdown import Region, beside, picture, table
from launch.report import plots

REGION = Region(
  "<!-- results of tokenizers: written by launch.lab.equivalence training -->",
  "<!-- end of the results of tokenizers -->",
  "A tokenizer's whole training beside the reference",
)
LAST = 100  # steps whose logged values are averaged
FED = ("ours", "threads")
PARTS = ("autoencoder", "discriminator")
# Softmax ignores what all keys have in common: such gradients are rounding errors, of which Adam
# makes steps as large as of any.
LEFT_OUT = ".k.bias"


def write(
  settings: Settings, jobs: Sequence[Job], page: Path, command: str, dpi: int = 100
) -> None:
  """Writes the results so far into a page, or a new one, and pictures beside it."""
  found = Results(settings, jobs)
  fed = {part: distances(found, part) for part in PARTS}
  lines = _setting(found)
  lines += _fed(found, fed, _draw_fed(fed, beside(page, "tokenizer_fed"), dpi))
  lines += _side_by_side(found, _draw_curves(found, beside(page, "tokenizer_curves"), dpi))
  REGION.write(page, [*lines, *_made(found, command)])


def distances(found: Results, part: str) -> dict[str, Series]:
  """As `side_results.distances`, of the autoencoder with the projection, or the discriminator."""
  if not found.has("fed/theirs"):
    return {}

  def own(tensors: Tensors) -> Tensors:
    return {
      name: x
      for name, x in tensors.items()
      if name.startswith(tokenizer_pieces.JUDGE) == (part == "discriminator")
      and not name.endswith(LEFT_OUT)
    }

  series: dict[str, list[tuple[int, float]]] = {"moved": []}
  first = tokenizer_pieces.first_weights(found.settings)
  for step in found.settings.snapshots:
    right = own(found.parameters("theirs", step))
    series["moved"].append((step, relative(right, first)))
    for name in FED:
      if found.has(f"fed/{name}"):
        there = relative(own(found.parameters(name, step)), right)
        series.setdefault(name, []).append((step, there))
  return dict(series)


def curves(found: Results, side: str) -> dict[str, np.ndarray]:
  """[seeds, spans of `log_every_steps`] of each logged value, by the reference's names."""
  every, folders = found.settings.config.log_every_steps, _folders(found, side)
  each = [tokenizer_pieces.logged_by(folder, every) for folder in folders]
  return {name: np.array([values[name] for values in each]) for name in LOGGED} if each else {}


def ratings(found: Results, side: str) -> dict[int, np.ndarray]:
  """By step, PSNR of the held-out pictures of each seed."""
  each = [tokenizer_pieces.rated(folder) for folder in _folders(found, side)]
  return {step: np.array([values[step] for values in each]) for step in (each or [{}])[0]}


def figures(found: Results) -> dict[str, dict[str, np.ndarray]]:
  """By figure and side, the value of each seed by its own side's code."""
  rows: dict[str, dict[str, np.ndarray]] = {}
  spans = max(1, LAST // found.settings.config.log_every_steps)
  for side in SIDES:
    logged = curves(found, side)
    named = {f"{name}, all steps": values.mean(1) for name, values in logged.items()}
    named |= {
      f"{name}, last {LAST} steps": values[:, -spans:].mean(1) for name, values in logged.items()
    }
    rated = {f"PSNR after {step} steps": values for step, values in ratings(found, side).items()}
    for name, values in (named | rated).items():
      rows.setdefault(name, {})[side] = values
  return rows


def _folders(found: Results, side: str) -> list[Path]:
  return [found.root / f"{side}/seed{seed}" for seed in found.seeds(side)]


def _setting(found: Results) -> list[str]:
  config, model = found.settings.config, found.settings.config.model
  counts = ", ".join(f"{len(found.seeds(side))} of {NAMES[side]}" for side in SIDES)
  stage = {name: column[0] for name, column in config.stages.items() if column}
  optimizer, size = config.optimizer, config.data.image_size
  return [
    f"A tokenizer of width {model.ch} with factors {', '.join(map(str, model.ch_mult))}, "
    f"{model.num_res_blocks} residual blocks a level and {model.embed_dim} channels, on pictures "
    f"of {size} x {size} pixels ({found.settings.experiment.source}), batch {config.batch_size}, "
    f"{config.num_steps:,} steps of Adam at {optimizer.learning_rate:g}, b1 {optimizer.b1:g}, "
    f"b2 {optimizer.b2:g}, float32. From the first step on: L1, LPIPS on a whole VGG16, KL by "
    f"{config.loss.kl_weight:g}, PatchGAN of width {config.discriminator.ndf} by "
    f"{config.loss.disc_weight:g} and an adaptive weight, alignment with an MAE's ViT-S/16 by "
    f"{stage['vf_weight']:g} and an adaptive weight, margins {stage['cos_margin']:g} and "
    f"{stage['distmat_margin']:g}. LPIPS and teacher have random weights. Trainings done: "
    f"{counts}. All begin with the reference's own initial weights; the discriminator's are those "
    "of `launch.train` by the seed, on both sides.",
    "",
  ]


def _fed(found: Results, fed: Mapping[str, Mapping[str, Series]], drawn: Path | None) -> list[str]:
  if not all(fed.values()):
    return []
  columns = {
    (part, name): dict(points) for part, series in fed.items() for name, points in series.items()
  }
  rows = [
    [str(step), *(f"{column[step]:.1e}" for column in columns.values())]
    for step in found.settings.snapshots
  ]
  header = ("step", *(f"{part}: {FED_NAMES.get(name, name)}" for part, name in columns))
  return [
    "## A tokenizer fed with the same batches and noise",
    "",
    f"The reference's first {found.settings.experiment.fed_steps} steps, repeated with what they "
    "drew. Distance of all parameters to the reference's, in units of their norm, of the "
    "autoencoder with the projection, and of the discriminator with its running statistics; "
    '"moved" is how far the reference\'s have come. Left out are the biases of keys, whose '
    "gradients are rounding errors.",
    "",
    *picture(drawn, "Distance of the parameters over steps"),
    *table(header, rows),
    "",
  ]


def _side_by_side(found: Results, drawn: Path | None) -> list[str]:
  shown = {name: x for name, x in figures(found).items() if len(x) == len(SIDES)}
  if not shown:
    return []
  rows, summary = compared(shown)
  return [
    "## Tokenizers' trainings of their own",
    "",
    "Each side draws order and noise by itself. Mean over seeds of what is logged, by the "
    "reference's names, and of the PSNR of the same held-out pictures by each side's own code, "
    "lowest and highest; the difference of the means in units of its standard error; and whether "
    f"this project's mean lies between the reference's lowest and highest{summary}.",
    "",
    *picture(drawn, "What is logged over steps (band: lowest to highest of the seeds), and PSNR"),
    *table(FIGURES, rows),
    "",
  ]


def _draw_fed(fed: Mapping[str, Mapping[str, Series]], path: Path, dpi: int) -> Path | None:
  if not all(len(series) > 1 for series in fed.values()):
    return None
  figure, axes = plots.panels(1, len(fed), size=(12, 4))
  for axis, (part, series) in zip(axes[0], fed.items(), strict=True):
    for name, points in series.items():
      shown = [(step, value) for step, value in points if value > 0]
      style = "k--" if name == "moved" else "o-"
      axis.plot(*np.array(shown).T.reshape(2, -1), style, ms=3, label=FED_NAMES.get(name, name))
    axis.set(xscale="log", yscale="log", xlabel="step", ylabel="relative distance", title=part)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
  return plots.save(figure, path, dpi=dpi)


def _draw_curves(found: Results, path: Path, dpi: int) -> Path | None:
  logged = {side: curves(found, side) for side in SIDES}
  if not all(logged.values()):
    return None
  figure, axes = plots.panels(3, 4, size=(16, 9))
  panels = dict(zip((*LOGGED, "PSNR"), axes.flat, strict=False))
  for side in SIDES:
    every, rated = found.settings.config.log_every_steps, ratings(found, side)
    steps = every * (1 + np.arange(logged[side]["total_loss"].shape[1]))
    found_by = {name: (steps, values) for name, values in logged[side].items()}
    found_by["PSNR"] = (np.array([*rated]), np.array([*rated.values()]).T)
    for name, (at, values) in found_by.items():
      axis = panels[name]
      axis.plot(at, values.mean(0), color=COLOURS[side], label=NAMES[side], lw=1)
      axis.fill_between(at, values.min(0), values.max(0), color=COLOURS[side], alpha=0.25, lw=0)
      axis.set(title=name, xlabel="step", yscale="log" if name.endswith("weight") else "linear")
      axis.grid(alpha=0.3)
  panels["total_loss"].legend(fontsize=8)
  for axis in axes.flat[len(panels) :]:
    axis.axis("off")
  return plots.save(figure, path, dpi=dpi)


def _made(found: Results, command: str) -> list[str]:
  if not found.has("fed/theirs"):
    return made(found, command, [])
  about = found.note("fed/theirs")
  text = (
    f"The reference is `training_step` of its `vavae/` in PyTorch {about['torch']}, with its "
    "networks, losses, adaptive weights and both optimizers. Replaced: "
    f"{'; '.join(about['replaced'])}."
  )
  return made(found, command, [text, ""])
