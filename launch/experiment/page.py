"""The page of the experiment that `launch.dilemma` runs: tables, pictures, how they were made."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import FrozenConfigDict

from configs import dilemma
from launch.experiment import pictures
from launch.experiment.jobs import Job
from launch.experiment.results import MAIN, Results, Space
from vavae_jax.errors import InputError
from vavae_jax.files import atomic_file

# What stands between these lines of a page is written anew; the rest is somebody's own.
BEGIN, END = "<!-- results: written by launch.dilemma -->", "<!-- end of the results -->"
NOT_RUN = "-"
NOTES = (
  "Validation MSE is the diffusion model's loss on held-out latents. It is of each latent space's "
  "own scale and compares with no other row. Density CV, Gini and entropy tell how evenly latents "
  "are spread (t-SNE, the mean of several; ± over those runs), effective dimensions over how many "
  "directions. Teacher cosine is that of projected latents with the teacher's features, on "
  "held-out pictures at the end of training."
)


def check(page: Path) -> None:
  """Raises InputError where a page cannot be written, before what it would show is made."""
  if page.is_dir():
    raise InputError(f"--page is {page}, a folder; give the name of a file in it.")
  _around(page)
  page.parent.mkdir(parents=True, exist_ok=True)
  if not os.access(page.parent, os.W_OK):
    raise InputError(f"--page is {page}, in a folder that cannot be written to.")


def write(
  config: FrozenConfigDict, workdir: Path, jobs: Sequence[Job], page: Path, command: str
) -> None:
  """Writes the page of what is there; what has not been run as configured shows as a dash.

  Args:
    config: the experiment's.
    workdir: where it ran.
    jobs: all of it.
    page: its results are put in the place of those it has, or make a new one; pictures go beside.
    command: that runs the experiment.

  Raises:
    InputError: the page has no place for results.
  """
  before, after = _around(page)
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
  if not others and not longer:
    changed = []
  page.parent.mkdir(parents=True, exist_ok=True)
  drawn = {
    "frontier": pictures.draw_frontier(main, others, name, _beside(page, "frontier")),
    "curves": pictures.draw_curves([*main, *longer], name, _beside(page, "curves")),
    "samples": pictures.draw_samples(found, main, _beside(page, "samples")),
  }
  text = [
    BEGIN,
    "",
    *_judge(found),
    *_picture(
      drawn["frontier"],
      f"{name} over PSNR, with arrows from plain to aligned"
      + (f"; on the right what was changed at {found.widest} channels" if others else ""),
    ),
    f"Reconstruction of held-out pictures by the posterior's mode, and generation, {name} of "
    f"{config.num_samples:,} samples, lower is better; {_told_of_seeds(config)}. "
    f"{_told_of_samples(config)}",
    "",
    *_table(main, name),
    "",
    NOTES,
    "",
    *_picture(drawn["curves"], f"{name} of {config.curve_samples:,} samples over steps"),
    *_picture(
      drawn["samples"],
      f"Without guidance (left) and with it ({config.cfg_scale:g}, right): same labels in each "
      "row, and for the two tokenizers of a width the same noise",
    ),
    *changed,
    *_made(found, command),
    END,
  ]
  with atomic_file(page) as file:
    file.write((before + "\n".join(text) + after).encode())


def _around(page: Path) -> tuple[str, str]:
  """What stands before and after the results of a page."""
  if not page.is_file():
    return "# Reconstruction against generation\n\n", "\n"
  text = page.read_text()
  if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
    raise InputError(f"{page} has no place for results: a line {BEGIN} and below it a line {END}.")
  return text.partition(BEGIN)[0], text.partition(END)[2]


def _beside(page: Path, name: str) -> Path:
  return page.with_name(f"{page.stem}_{name}.png")


def _judge(found: Results) -> list[str]:
  """Who judges, and what perfect samples would get."""
  accuracy = found.figure("judge", "held_out/accuracy")
  told = NOT_RUN if accuracy is None else f"{100 * accuracy:.1f} %"
  text = (
    f"{found.name} is the Frechet distance in the features of a classifier that was trained on the "
    f"same pictures and taught no tokenizer; its accuracy on the held-out tenth is {told}. It is "
    "not FID and compares with nothing outside this page."
  )
  if real := found.read("real"):
    distance = next(iter(real["figures"].values()))
    count = real["samples"]["pictures"]
    text += f" {count:,} real pictures that nobody trained on have {distance:.3f}."
  return [text, ""]


def _told_of_samples(config: FrozenConfigDict) -> str:
  """How samples are drawn."""
  sampler = dilemma.diffusion(config.size, 1).sample
  return (
    f"Samples are drawn by {sampler.method} at {sampler.num_steps} times, shifted by "
    f"{sampler.timestep_shift:g}; the guided ones with a scale of {config.cfg_scale:g} where t is "
    f"at least {sampler.cfg_interval_start:g}, in all channels, of the first seed alone."
  )


def _table(spaces: Sequence[Space], name: str) -> list[str]:
  """A row for each tokenizer."""
  head = [
    *("tokenizer", "channels", "PSNR (dB)", "SSIM", f"r{name}", name, f"{name}, guided"),
    *("density CV", "Gini", "entropy", "effective dimensions", "teacher cosine", "validation MSE"),
  ]
  rows = [head, ["---", *["---:"] * (len(head) - 1)]]
  for space in spaces:
    found = space.figures
    distance = next((v for k, v in found.items() if k.startswith("rfd_")), None)
    spread = found.get("density_cv_std")
    rows.append(
      [
        space.variant,
        str(space.width),
        _number(found.get("psnr"), 2),
        _number(found.get("ssim"), 3),
        _number(distance, 2 if distance is None or distance >= 0.1 else 4),
        _spread(space.distances),
        _spread(space.guided),
        _number(found.get("density_cv"), 3) + ("" if spread is None else f" ± {spread:.3f}"),
        _number(found.get("gini"), 3),
        _number(found.get("normalized_entropy"), 3),
        _number(found.get("effective_dimensions"), 1),
        _number(found.get("teacher_cosine"), 2),
        _number(float(np.mean(space.mse)) if space.mse else None, 3),
      ]
    )
  return [f"| {' | '.join(row)} |" for row in rows]


def _number(value: float | None, digits: int) -> str:
  return NOT_RUN if value is None else f"{value:.{digits}f}"


def _spread(values: Sequence[float]) -> str:
  if len(values) < 2:
    return _number(values[0] if values else None, 2)
  return f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}"


def _told_of_seeds(config: FrozenConfigDict) -> str:
  if len(config.seeds) == 1:
    return "one seed of the diffusion model, so no spread"
  return f"± is the standard deviation over {len(config.seeds)} seeds of the diffusion model"


def _picture(path: Path | None, caption: str) -> list[str]:
  return [f"![{caption}]({path.name})", "", f"*{caption}.*", ""] if path else []


def _made(found: Results, command: str) -> list[str]:
  """Commands, machine and time."""
  record = found.record
  kinds: dict[str, list[float]] = {}
  for job in found.jobs:
    if seconds := record.seconds(job.name):
      kinds.setdefault(job.kind, []).append(seconds)
  total = sum(sum(seconds) for seconds in kinds.values())
  commits, machines = (
    ", ".join(sorted({*told} - {""}))
    for told in zip(*(record.where(job.name) for job in found.jobs), strict=True)
  )
  runs = [found.read(job.name).get("run", {}) for job in found.jobs if not job.resumes]
  jaxes = ", ".join(sorted({run["jax"] for run in runs if "jax" in run}))
  devices = sorted(
    {run["device"] for run in runs if "device" in run and "cpu" not in run["device"]}
  )
  seeds = ", ".join(map(str, found.config.seeds))
  rows = [f"| {kind} | {len(s)} | {sum(s) / 60:.0f} |" for kind, s in kinds.items()]
  return [
    "How this was made:",
    "",
    "```",
    command,
    "```",
    "",
    f"Commits {commits}; jax {jaxes}; {', '.join([machines, *devices])}. Seeds of the diffusion "
    f"models: {seeds}; of everything else 0. All jobs together took {total / 3600:.1f} hours of "
    "one worker, with what was stopped and done again:",
    "",
    "| jobs | how many | minutes |",
    "| --- | ---: | ---: |",
    *rows,
    "",
  ]
