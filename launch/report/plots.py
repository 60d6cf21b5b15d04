"""Pictures by matplotlib, which is imported when one is drawn: --help need not wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.report import fonts
from vavae_jax.common.errors import printable
from vavae_jax.common.files import atomic_file


def panels(
  rows: int = 1, columns: int = 1, *, size: tuple[float, float], sharey: bool = False
) -> tuple[Any, Any]:
  """(matplotlib's figure without a window, its axes as an array [rows, columns]); inches."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def frontier(
  axis: Any,
  points: Mapping[str, tuple[float, float]],
  colours: Mapping[str, str] | None = None,
) -> None:
  """Draws several tokenizers, named VARIANT/SIZE as in plain/d16, by two of their figures.

  A line joins the sizes of a variant, an arrow goes from the first variant of a size to the others;
  a name without a slash stands alone. `colours` are by variant.
  """
  from matplotlib.patheffects import withStroke

  variants: dict[str, list[str]] = {}
  sizes: dict[str, list[str]] = {}
  for name in points:
    variant, slash, size = name.rpartition("/")
    variants.setdefault(variant if slash else name, []).append(name)
    sizes.setdefault(size if slash else name, []).append(name)
  for variant, names in variants.items():
    line = zip(*(points[name] for name in names), strict=True)
    axis.plot(*line, "o-", color=(colours or {}).get(variant), alpha=0.5, ms=7)
  arrow = {"arrowstyle": "->", "color": "grey", "shrinkA": 0, "shrinkB": 0}
  for first, *others in sizes.values():
    for name in (first, *others):
      below = others and name == first
      text = fonts.visible(printable(name.replace("/", " ")))
      if not (font := fonts.font_of(text)):
        text = text.encode("ascii", "backslashreplace").decode()
      axis.annotate(
        text,
        points[name],
        xytext=(0, -9 if below else 9),
        textcoords="offset points",
        ha="center",
        va="top" if below else "bottom",
        font=font or fonts.usual(),
        fontsize=8,
        parse_math=False,  # $ is no formula
        path_effects=[withStroke(linewidth=3, foreground="white")],  # readable across lines
      )
    for name in others:
      axis.annotate("", points[name], points[first], arrowprops=arrow, zorder=5)
  axis.margins(0.15)
  axis.grid(alpha=0.3, which="both")


def save(figure: Any, path: Path, dpi: int = 100) -> Path:
  """Writes a figure as PNG, whole or not at all; returns where."""
  with atomic_file(path) as file:
    figure.savefig(file, format="png", dpi=dpi)
  return path
