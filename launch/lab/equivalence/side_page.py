"""The page of `launch.lab.equivalence training`: what was found so far and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from launch.lab.equivalence.judging import distance
from launch.lab.equivalence.pieces import Settings, losses_of
from launch.lab.equivalence.side_results import (
  FED,
  LAST,
  SIDES,
  Results,
  Series,
  distances,
  figures,
)
from launch.lab.jobs import Job
from launch.lab.markdown import Region, beside, picture, table
from launch.report import plots

REGION = Region(
  "<!-- results: written by launch.lab.equivalence training -->",
  "<!-- end of the results -->",
  "Whole trainings beside the reference",
)
COLOURS = {"theirs": "#4477aa", "ours": "#cc6677"}
NAMES = {"theirs": "reference", "ours": "this project"}
FED_NAMES = {
  "ours": "this project",
  "threads": "reference, two threads",
  "to_ours": "reference, then this project",
  "to_theirs": "this project, then reference",
}
# The header of `compared`.
FIGURES = ("figure", *NAMES.values(), "standard errors apart", "mean within")
CONTINUED = {"theirs_by_ours": "theirs", "ours_by_theirs": "ours"}  # whose first half


def write(
  settings: Settings, jobs: Sequence[Job], page: Path, command: str, dpi: int = 100
) -> None:
  """Writes the results so far into a page, or a new one, and pictures beside it."""
  found = Results(settings, jobs)
  fed = distances(found)
  lines = [*_setting(found)]
  lines += _fed(found, fed, _draw_fed(fed, beside(page, "fed"), dpi))
  lines += _side_by_side(found, _draw_losses(found, beside(page, "losses"), dpi))
  lines += _crossed(found)
  lines += _continued(found, _draw_continued(found, beside(page, "continued"), dpi))
  REGION.write(page, [*lines, *_made(found, command)])


def _setting(found: Results) -> list[str]:
  config, model = found.settings.config, found.settings.config.model
  counts = ", ".join(f"{len(found.seeds(side))} of {NAMES[side]}" for side in SIDES)
  optimizer, sample = config.optimizer, config.sample
  return [
    f"LightningDiT of width {model.hidden_size} and depth {model.depth} on latents of "
    f"{model.input_size} x {model.input_size} cells and {model.in_channels} channels of pictures "
    f"({found.settings.experiment.source}), batch {config.batch_size}, {config.num_steps:,} steps "
    f"of AdamW at {optimizer.learning_rate:g}, b2 {optimizer.b2:g}, average by "
    f"{optimizer.ema_decays[0]:g}, logit-normal times, mean squared error and cosine, float32. "
    f"Trainings done: {counts}. All begin with the same weights. "
    f"{found.settings.experiment.num_samples:,} samples of the averages are drawn from the same "
    f"noise and labels, by {sample.method} at "
    f"{sample.num_steps} times shifted by {sample.timestep_shift:g}; guided ones by "
    f"{sample.cfg_scale:g} in the first {sample.cfg_channels} channels from t = "
    f"{sample.cfg_interval_start:g}. FD is the Frechet distance of normalised latents, all cells "
    "of a picture together, to those that were trained on.",
    "",
  ]


def _fed(found: Results, series: Mapping[str, Series], drawn: Path | None) -> list[str]:
  """A2 and the exact half of A4."""
  if not series:
    return []
  half, steps = found.settings.half, found.settings.experiment.fed_steps
  names = [name for name in FED if name in series]
  columns = {name: dict(series[name]) for name in ("moved", *names)}
  rows = [
    [str(step), *(f"{c[step]:.1e}" if step in c else "-" for c in columns.values())]
    for step in found.settings.snapshots
  ]
  return [
    "## The same batches, times and noise",
    "",
    f"The reference's first {steps} steps, repeated with what they drew. Distance of all "
    "parameters to the reference's, in units of their norm; \"moved\" is how far the reference's "
    f"have come from the initial ones. Two of the trainings change sides after step {half}, with "
    "weights, average and AdamW's moments converted.",
    "",
    *picture(drawn, "Distance of the parameters over steps"),
    *table(("step", "moved", *(FED_NAMES[name] for name in names)), rows),
    "",
  ]


def _side_by_side(found: Results, drawn: Path | None) -> list[str]:
  """A1."""
  shown = {name: x for name, x in figures(found).items() if len(x) == len(SIDES)}
  if not shown:
    return []
  rows, summary = compared(shown)
  floor = ""
  if found.has("real"):
    real = found.note("real")
    floor = f" {real['count']:,} held-out latents have FD {real['distance']:.4g}."
  theirs, ours = (found.losses(side).mean(0) for side in SIDES)
  gap = ours - theirs
  error = gap.std(ddof=1) / np.sqrt(len(gap))
  return [
    "## Trainings of their own",
    "",
    "Each side draws order, flips, times, noise and dropped labels by itself, and judges its own "
    "weights by its own code. Mean over seeds, lowest and highest; the difference of the means in "
    "units of its standard error; and whether this project's mean lies between the reference's "
    f"lowest and highest{summary}.{floor}",
    "",
    *picture(drawn, "Training loss (band: lowest to highest of the seeds), and validation loss"),
    *table(FIGURES, rows),
    "",
    "This project's training loss minus the reference's, mean over seeds and over "
    f"{len(gap)} spans of {found.settings.config.log_every_steps} steps: {gap.mean():+.5f}, with a "
    f"standard error of {error:.5f} from the scatter of the spans.",
    "",
  ]


def compared(figures: Mapping[str, Mapping[str, np.ndarray]]) -> tuple[list[list[str]], str]:
  """Rows under `FIGURES` of the values of each side's seeds, and what their last column tells."""
  rows, inside, several = [], 0, False
  for name, sides in figures.items():
    theirs, ours = sides["theirs"], sides["ours"]
    within = bool(theirs.min() <= ours.mean() <= theirs.max())
    inside, several = inside + within, several or len(theirs) > 1
    verdict = "-" if len(theirs) < 2 else "yes" if within else "no"
    rows.append([name, _spread(theirs), _spread(ours), _errors(theirs, ours), verdict])
  return rows, f": {inside} of {len(rows)} do" if several else ", which one seed does not tell"


def _spread(values: np.ndarray) -> str:
  if len(values) < 2:
    return f"{values[0]:.5g}"
  return f"{values.mean():.5g} ({values.min():.5g} to {values.max():.5g})"


def _errors(left: np.ndarray, right: np.ndarray) -> str:
  """The difference of two means in units of its standard error."""
  if min(len(left), len(right)) < 2:
    return "-"
  error = np.sqrt(left.var(ddof=1) / len(left) + right.var(ddof=1) / len(right))
  return f"{(right.mean() - left.mean()) / error:+.1f}"


def _crossed(found: Results) -> list[str]:
  """Each side's weights judged by both."""
  rows = []
  seed = found.settings.experiment.seeds[0]
  for side, other in (("theirs", "ours"), ("ours", "theirs")):
    training = f"{side}/seed{seed}"
    own, crossed = (found.judged(training, by) for by in (side, other))
    if not (own and crossed):
      continue
    losses = np.array([each["mse"] + each["cosine"] for each in (own, crossed)])
    kinds, count = ("plain", "guided"), found.settings.experiment.crossed_samples
    samples = [found.samples(training, by) for by in (side, other)]
    largest = [np.abs(samples[0][k][:count] - samples[1][k]).max() for k in kinds]
    ours = [distance(found.settings, samples[0][k][:count]) for k in kinds]
    pairs = [f"{x:.6g} / {crossed[k]:.6g}" for x, k in zip(ours, kinds, strict=True)]
    worst = (np.abs(losses[0] - losses[1]) / losses[0]).max()
    rows.append([NAMES[side], f"{worst:.1e}", *(f"{x:.1e}" for x in largest), *pairs])
  if not rows:
    return []
  header = ("weights of", "losses", "samples", "guided samples", "FD", "FD, guided")
  return [
    "## Weights exchanged",
    "",
    "Weights of one training of each side, by their own side's code and by the other's: the worst "
    "relative difference of the losses at all times, the largest of any number of the first "
    f"{found.settings.experiment.crossed_samples:,} samples, whose deviation is about 1, and FD of "
    "these by both.",
    "",
    *table(header, rows),
    "",
  ]


def _continued(found: Results, drawn: Path | None) -> list[str]:
  """The curves of A4."""
  half, seed = found.settings.config.num_steps // 2, found.settings.experiment.seeds[0]
  first = 2 * found.settings.config.log_every_steps
  rows = []
  for name, begun in CONTINUED.items():
    if not found.has(f"continued/{name}"):
      continue
    on = losses_of(found.root / "continued" / name)
    whole = dict(losses_of(found.root / f"{begun}/seed{seed}"))
    columns = []
    for end in (half + first, 2 * half):
      steps = [step for step, _ in on if step <= end]
      means = [np.mean([series[step] for step in steps]) for series in (dict(on), whole)]
      columns.append(f"{means[0]:.4f} / {means[1]:.4f}")
    before = np.mean([x for step, x in whole.items() if half - LAST < step <= half])
    other = next(side for side in SIDES if side != begun)
    rows.append([f"{NAMES[begun]}, then {NAMES[other]}", f"{before:.4f}", *columns])
  if not rows:
    return []
  after = (f"first {first} steps after", f"{found.settings.experiment.continued_steps} steps after")
  header = ("training", f"{LAST} steps before", *after)
  return [
    "## States exchanged",
    "",
    f"Weights, average and AdamW's moments after {half:,} steps, converted, and the other side's "
    "training from there with random numbers of its own. Mean training loss, of the training that "
    "went on / of the one that was not interrupted in the same steps.",
    "",
    *picture(drawn, "Training loss where the other side goes on"),
    *table(header, rows),
    "",
  ]


def _draw_fed(series: Mapping[str, Series], path: Path, dpi: int) -> Path | None:
  if len(series) < 2:
    return None
  figure, axes = plots.panels(size=(7, 4))
  for name, points in series.items():
    shown = [(step, value) for step, value in points if value > 0]
    style = "k--" if name == "moved" else "o-"
    axes[0, 0].plot(*zip(*shown, strict=True), style, ms=3, label=FED_NAMES.get(name, "moved"))
  axes[0, 0].set(xscale="log", yscale="log", xlabel="step", ylabel="relative distance")
  axes[0, 0].grid(alpha=0.3)
  axes[0, 0].legend(fontsize=8)
  return plots.save(figure, path, dpi=dpi)


def _draw_losses(found: Results, path: Path, dpi: int) -> Path | None:
  """Training losses, their difference to the reference's mean, validation losses."""
  losses = {side: found.losses(side) for side in SIDES}
  if not all(len(x) for x in losses.values()):
    return None
  every = found.settings.config.log_every_steps
  steps = every * (1 + np.arange(losses["theirs"].shape[1]))
  figure, axes = plots.panels(1, 3, size=(14, 4))
  centre = losses["theirs"].mean(0)
  for side, values in losses.items():
    for axis, x in ((axes[0, 0], values), (axes[0, 1], values - centre)):
      axis.plot(steps, x.mean(0), color=COLOURS[side], label=NAMES[side], lw=1)
      axis.fill_between(steps, x.min(0), x.max(0), color=COLOURS[side], alpha=0.25, lw=0)
  axes[0, 0].set(xscale="log", yscale="log", ylabel="training loss")
  axes[0, 1].set(ylabel="training loss minus the reference's mean")
  shown = [(k.partition("= ")[2], x) for k, x in figures(found).items() if "t = " in k]
  for side in SIDES:
    points = [(float(t), x[side]) for t, x in shown if side in x]
    for i in range(min((len(x) for _, x in points), default=0)):
      line = [(t, x[i]) for t, x in points]
      label = NAMES[side] if i == 0 else None
      axes[0, 2].plot(*zip(*line, strict=True), "o-", ms=3, color=COLOURS[side], label=label)
  axes[0, 2].set(xlabel="t", ylabel="validation loss of the average")
  for axis in axes[0]:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
  for axis in axes[0, :2]:
    axis.set_xlabel("step")
  return plots.save(figure, path, dpi=dpi)


def _draw_continued(found: Results, path: Path, dpi: int) -> Path | None:
  names = [name for name in CONTINUED if found.has(f"continued/{name}")]
  if not names:
    return None
  seed = found.settings.experiment.seeds[0]
  figure, axes = plots.panels(1, len(names), size=(6 * len(names), 4), sharey=True)
  for axis, name in zip(axes[0], names, strict=True):
    begun = CONTINUED[name]
    other = next(side for side in SIDES if side != begun)
    whole = losses_of(found.root / f"{begun}/seed{seed}")
    on = losses_of(found.root / "continued" / name)
    label = f"{NAMES[begun]}, not interrupted"
    axis.plot(*zip(*whole, strict=True), color=COLOURS[begun], label=label)
    axis.plot(*zip(*on, strict=True), color=COLOURS[other], label=f"{NAMES[other]} goes on")
    axis.set(xlabel="step", ylabel="training loss", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
  return plots.save(figure, path, dpi=dpi)


def _made(found: Results, command: str) -> list[str]:
  """What was replaced, and `made`."""
  if not found.has("fed/theirs"):
    return made(found, command, [])
  about = found.note("fed/theirs")
  text = (
    f"The reference is `do_train` of its `train.py` in PyTorch {about['torch']}, with its data "
    f"set, transport, AdamW and update_ema. Replaced: {'; '.join(about['replaced'])}. Its folder "
    "of latents has our shards and, as published, `latents_stats.pt`."
  )
  return made(found, command, [text, ""])


def made(found: Results, command: str, lines: Sequence[str]) -> list[str]:
  """`lines` on the reference's side, command, commit, machine and time."""
  kinds: dict[str, float] = {}
  for job in found.jobs:
    if seconds := found.record.seconds(job):
      kinds[job.kind] = kinds.get(job.kind, 0.0) + seconds
  minutes = ", ".join(f"{kind} {seconds / 60:.0f}" for kind, seconds in kinds.items())
  return [
    "## How this was made",
    "",
    *lines,
    "```",
    command,
    "```",
    "",
    f"Made by {found.record.made(found.jobs)}. Minutes: {minutes}; "
    f"{sum(kinds.values()) / 60:.0f} together.",
    "",
  ]
