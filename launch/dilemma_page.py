"""The page of the experiment that `launch.dilemma` runs: tables, pictures, how they were made."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image

from configs import dilemma
from launch import plots
from launch.engine.circumstances import processor
from launch.engine.writers import curve, read_metrics
from launch.jobs import Record
from vavae_jax.errors import InputError
from vavae_jax.files import atomic_file

# What stands between these lines of a page is written anew; the rest is somebody's own.
BEGIN, END = "<!-- results: written by launch.dilemma -->", "<!-- end of the results -->"
MAIN = ("plain", "aligned")
COLOURS = {"plain": "#cc6677", "aligned": "#117733"}
SHOWN_ROWS = 2  # of each set's sheet
NOT_RUN = "-"


class Space(NamedTuple):
  """What was measured of one tokenizer and of the diffusion models on its latents.

  Attributes:
    variant: how it was trained.
    width: channels.
    figures: reconstruction's and uniformity's, by name.
    distances: of each seed's samples.
    guided: likewise, with guidance.
    mse: validation losses of the seeds.
    steps: (step, distance) of the first seed.
  """

  variant: str
  width: int
  figures: dict[str, float]
  distances: list[float]
  guided: list[float]
  mse: list[float]
  steps: list[tuple[int, float]]

  @property
  def distance(self) -> float | None:
    """The mean over the seeds."""
    return float(np.mean(self.distances)) if self.distances else None


def write(config: FrozenConfigDict, workdir: Path, page: Path, command: str) -> None:
  """Writes the page of what is there; what has not been run shows as a dash.

  Args:
    config: the experiment's.
    workdir: where it ran.
    page: its results are put in the place of those it has, or make a new one; pictures go beside.
    command: that runs the experiment.

  Raises:
    InputError: the page has no place for results.
  """
  before, after = _around(page)
  name = f"FD-{dilemma.judge(config.size).name}"
  main = [_read(config, workdir, v, w) for w in config.widths for v in MAIN]
  widest = [s for s in main if s.width == max(config.widths)]
  others = [_read(config, workdir, v, max(config.widths)) for v in config.ablations]
  longer = [_read_long(config, workdir, v) for v in MAIN] if config.long else []
  page.parent.mkdir(parents=True, exist_ok=True)
  pictures = {
    "frontier": _draw_frontier(main, others, name, _beside(page, "frontier")),
    "curves": _draw_curves([*main, *longer], name, _beside(page, "curves")),
    "samples": _draw_samples(config, workdir, main, _beside(page, "samples")),
  }
  text = [
    BEGIN,
    "",
    *_judge(config, workdir, name),
    *_picture(pictures["frontier"], f"{name} over PSNR; arrows from plain to aligned"),
    f"Reconstruction (held-out pictures, posterior's mode) and generation ({name} of "
    f"{config.num_samples:,} samples; lower is better; {_told_of_seeds(config)}):",
    "",
    *_table(main, name),
    "",
    *_picture(pictures["curves"], f"{name} of {config.curve_samples:,} samples over steps"),
    *_picture(
      pictures["samples"],
      "Without guidance (left) and with it (right): same labels in each row, and for the two "
      "tokenizers of a width the same noise",
    ),
    f"At {max(config.widths)} channels: with parts of the method or of the budget changed:",
    "",
    *_table([*widest, *others, *longer], name),
    "",
    *_made(config, workdir, command),
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


def _read(config: FrozenConfigDict, workdir: Path, variant: str, width: int) -> Space:
  space = f"{variant}/d{width}"
  seeds = config.seeds if variant in MAIN else config.ablation_seeds
  return _read_runs(config, workdir, space, [f"seed{seed}" for seed in seeds])


def _read_long(config: FrozenConfigDict, workdir: Path, variant: str) -> Space:
  width = max(config.widths)
  steps = dilemma.diffusion(config.size, width, long=True).num_steps
  found = _read_runs(config, workdir, f"{variant}/d{width}", [dilemma.LONG])
  return found._replace(variant=f"{variant}, {steps:,} steps")


def _read_runs(config: FrozenConfigDict, workdir: Path, space: str, names: list[str]) -> Space:
  """What was measured of a tokenizer, and of these of the diffusion models on its latents."""
  key = f"fd_{dilemma.judge(config.size).name.lower()}"
  runs = [f"{space}/{name}" for name in names]

  def distances(kind: str) -> list[float]:
    return [found[key] for run in runs if (found := _figures(workdir / kind / f"{run}.json"))]

  swept = _json(workdir / "curve" / f"{runs[0]}.json")
  losses = [curve(read_metrics(workdir / "diffusion" / run), "validation/mse") for run in runs]
  variant, _, width = space.partition("/d")
  return Space(
    variant,
    int(width),
    _figures(workdir / "reconstruction" / f"{space}.json")
    | _figures(workdir / "uniformity" / f"{space}.json"),
    distances("samples"),
    distances("guided"),
    [points[-1][1] for points in losses if points],
    [(point["step"], point[key]) for point in swept.get("points", [])],
  )


def _json(path: Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.is_file() else {}


def _figures(path: Path) -> dict[str, float]:
  return _json(path).get("figures", {})


def _judge(config: FrozenConfigDict, workdir: Path, name: str) -> list[str]:
  """Who judges, and what perfect samples would get."""
  lines = curve(read_metrics(workdir / "judge"), "held_out/accuracy")
  told = f"{100 * lines[-1][1]:.1f} %" if lines else NOT_RUN
  text = (
    f"{name} is the Frechet distance in the features of a classifier that was trained on the same "
    f"pictures and taught no tokenizer; its accuracy on the held-out tenth is {told}. It is not "
    "FID and compares with nothing outside this page."
  )
  real = _json(workdir / "real.json")
  if real:
    distance = next(iter(real["figures"].values()))
    count = real["samples"]["pictures"]
    text += f" {count:,} real pictures that nobody trained on have {distance:.3f}."
  return [text, ""]


def _table(spaces: Sequence[Space], name: str) -> list[str]:
  """A row for each tokenizer."""
  head = [
    *("tokenizer", "channels", "PSNR (dB)", "SSIM", f"r{name}", name, f"{name}, guided"),
    *("density CV", "Gini", "entropy", "effective dimensions", "validation MSE"),
  ]
  rows = [head, ["---", *["---:"] * (len(head) - 1)]]
  for space in spaces:
    found = space.figures
    distance = next((v for k, v in found.items() if k.startswith("rfd_")), None)
    rows.append(
      [
        space.variant,
        str(space.width),
        _number(found.get("psnr"), 2),
        _number(found.get("ssim"), 3),
        _number(distance, 2),
        _spread(space.distances),
        _spread(space.guided),
        *(_number(found.get(x), 3) for x in ("density_cv", "gini", "normalized_entropy")),
        _number(found.get("effective_dimensions"), 1),
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


def _made(config: FrozenConfigDict, workdir: Path, command: str) -> list[str]:
  """Commands, machine and time."""
  runs = [_json(path).get("run", {}) for path in sorted(workdir.glob("*/*/*/*.json"))]
  told = {
    key: sorted({run[key] for run in runs if key in run}) for key in ("commit", "jax", "device")
  }
  machine = [processor() if "cpu" in device.lower() else device for device in told["device"]]
  record = Record(workdir)
  kinds: dict[str, list[float]] = {}
  for name in record.names():
    kinds.setdefault(name.partition("/")[0], []).append(record.seconds(name))
  total = sum(sum(seconds) for seconds in kinds.values())
  rows = [f"| {kind} | {len(s)} | {sum(s) / 60:.0f} |" for kind, s in kinds.items()]
  return [
    "How this was made:",
    "",
    "```",
    command,
    "```",
    "",
    f"Commit {', '.join(told['commit'])}; jax {', '.join(told['jax'])}; {', '.join(machine)}. "
    f"Seeds of the diffusion models: {', '.join(map(str, config.seeds))}; of everything else 0. "
    f"All jobs together took {total / 3600:.1f} hours of one worker:",
    "",
    "| jobs | how many | minutes |",
    "| --- | ---: | ---: |",
    *rows,
    "",
  ]


def own_command() -> str:
  """The command line that started this process, as a person would type it."""
  words = [word for word in sys.argv[1:] if not word.startswith(("--page", "--nopage"))]
  return shlex.join(["python", "-m", "launch.dilemma", *words])


def _draw_frontier(
  main: Sequence[Space], others: Sequence[Space], name: str, path: Path
) -> Path | None:
  points = {
    (s.variant, s.width): (s.figures["psnr"], s.distance)
    for s in (*main, *others)
    if s.distance is not None and "psnr" in s.figures
  }
  if not points:
    return None
  figure, ((axis,),) = plots.panels(size=(7, 5))
  for variant in MAIN:
    line = [points[key] for key in points if key[0] == variant]
    axis.plot(*zip(*line, strict=True), color=COLOURS[variant], alpha=0.3) if line else None
  for (variant, width), (x, y) in points.items():
    is_main = variant in MAIN
    axis.scatter(x, y, s=60 if is_main else 20, color=COLOURS.get(variant, "grey"), zorder=3)
    label = f"{variant} d{width}" if is_main else variant
    place = {"plain": (6, -12), "aligned": (6, 5)}.get(variant, (-6, 0))
    side = "left" if is_main else "right"
    axis.annotate(
      label, (x, y), xytext=place, textcoords="offset points", fontsize=8, ha=side, va="center"
    )
    if variant == "plain" and ("aligned", width) in points:
      arrow = {"arrowstyle": "->", "color": "black"}
      axis.annotate("", points["aligned", width], (x, y), arrowprops=arrow)
  axis.set(
    xlabel="PSNR of held-out pictures (dB), higher is better", ylabel=f"{name}, lower is better"
  )
  axis.grid(alpha=0.3)
  return plots.save(figure, path, dpi=110)


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
    axis.set(title=f"{width} channels", xlabel="diffusion steps", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
  axes[0, 0].set_ylabel(name)
  return plots.save(figure, path, dpi=110)


def _draw_samples(
  config: FrozenConfigDict, workdir: Path, main: Sequence[Space], path: Path
) -> Path | None:
  side = dilemma.judge(config.size).data.image_size
  rows: list[tuple[str, list[np.ndarray]]] = []
  for space in main:
    run = f"{space.variant}/d{space.width}/seed{config.seeds[0]}.png"
    files = [workdir / kind / run for kind in ("samples", "guided")]
    if all(file.is_file() for file in files):
      sheets = [np.asarray(Image.open(file))[: SHOWN_ROWS * side] for file in files]
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
