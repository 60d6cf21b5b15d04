"""Pictures by matplotlib, which is imported when one is drawn: --help need not wait for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
      place = (8, -12) if others and name == first else (8, 8)
      text = printable(name.replace("/", " "))
      shown = {"xytext": place, "textcoords": "offset points", "fontsize": 8}
      axis.annotate(text, points[name], parse_math=False, **shown)  # $ is no formula
    for name in others:
      axis.annotate("", points[name], points[first], arrowprops=arrow, zorder=5)
  axis.margins(x=0.15)
  axis.grid(alpha=0.3, which="both")


def save(figure: Any, path: Path, dpi: int = 100) -> Path:
  """Writes a figure as PNG, whole or not at all; returns where."""
  with atomic_file(path) as file:
    figure.savefig(file, format="png", dpi=dpi)
  return path
