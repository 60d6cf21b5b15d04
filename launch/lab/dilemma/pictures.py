"""The pictures of the page of `launch.lab.dilemma`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs.lab import dilemma
from configs.lab.dilemma import MAIN
from launch.lab.dilemma.results import Results, Space
from launch.report import plots

COLOURS = {"plain": "#cc6677", "aligned": "#117733"}
SHOWN_ROWS = 2  # of each set's sheet


def draw_frontier(
  main: Sequence[Space], others: Sequence[Space], name: str, path: Path
) -> Path | None:
  """All widths on the left; on the right the widest, with the variants that were tried there."""
  shown = _places(main)
  changed = sorted(_places(others).items(), key=lambda x: x[1][1])
  if not shown:
    return None
  figure, axes = plots.panels(1, 2 if changed else 1, size=(13 if changed else 7, 5))
  plots.frontier(axes[0, 0], shown, COLOURS)
  _by_factors(axes[0, 0])
  axes[0, 0].set(ylabel=f"{name}, lower is better")
  if changed:
    right = axes[0, 1]
    widest = f"/d{max(space.width for space in main)}"
    plots.frontier(right, {k: x for k, x in shown.items() if k.endswith(widest)}, COLOURS)
    for number, (key, point) in enumerate(changed, 1):
      right.scatter(*point, s=25, color="grey", label=f"{number} {key.partition('/')[0]}")
      # On alternate sides, since points may coincide.
      side = (-10, 0) if number % 2 else (10, 0)
      right.annotate(
        str(number), point, xytext=side, textcoords="offset points", ha="center", va="center"
      )
    right.legend(fontsize=8)
  for axis in axes[0]:
    axis.set(xlabel="PSNR of held-out pictures (dB), higher is better")
  return plots.save(figure, path, dpi=110)


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


def draw_curves(main: Sequence[Space], name: str, path: Path) -> Path | None:
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


def draw_samples(found: Results, main: Sequence[Space], path: Path) -> Path | None:
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
