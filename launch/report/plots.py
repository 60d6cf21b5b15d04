"""Pictures by matplotlib, which is imported when one is drawn: --help need not wait for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vavae_jax.common.files import atomic_file


def panels(
  rows: int = 1, columns: int = 1, *, size: tuple[float, float], sharey: bool = False
) -> tuple[Any, Any]:
  """A figure without a window.

  Args:
    rows: of panels.
    columns: likewise.
    size: width and height in inches.
    sharey: whether all panels have one scale upwards.

  Returns:
    (matplotlib's figure, its axes as an array [rows, columns]).
  """
  from matplotlib.figure import Figure

  figure = Figure(figsize=size, layout="constrained")
  return figure, figure.subplots(rows, columns, squeeze=False, sharey=sharey)


def save(figure: Any, path: Path, dpi: int = 100) -> Path:
  """Writes a figure as PNG, whole or not at all; returns where."""
  with atomic_file(path) as file:
    figure.savefig(file, format="png", dpi=dpi)
  return path
