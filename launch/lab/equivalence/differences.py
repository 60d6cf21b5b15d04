"""How far two sides' arrays are from each other: rows, a summary, a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from launch.report.charts import Curve, line_chart

STYLE = Path(__file__).parents[2] / "report" / "style.css"
# What may differ, in units of the largest number of the reference's array. Rounding in float32
# grows with depth; Adam divides by the root of squares that may be tiny.
TOLERANCES = {
  "layer": 1e-4,
  "output": 1e-4,
  "mean": 1e-4,
  "logvar": 1e-4,
  "loss": 1e-4,
  "gradient": 1e-3,
  "parameter": 1e-3,
  "trajectory": 1e-3,
}
BFLOAT16_TOLERANCE = 0.1
# Of models with kinks: the root mean square of what a max pool's ties and hinges move.
KINKED_TOLERANCE = 5e-3
KINKED_GROUPS = ("gradient", "parameter")


@dataclasses.dataclass(frozen=True)
class Row:
  """How far an array of ours is from the reference's.

  Attributes:
    group: a key of `TOLERANCES`.
    name: the reference's for it.
    dtype: that matrices multiply in.
    max_abs: the largest difference.
    relative: that in units of the reference's largest number.
    rms: the norm of all differences in units of the norm of the reference's array.
    tolerance: what `relative` may be.
    kinked: of gradients and what follows, `rms` is judged; see `equivalence_cases.Case`.
  """

  group: str
  name: str
  dtype: str
  max_abs: float
  relative: float
  rms: float
  tolerance: float
  kinked: bool = False

  @property
  def holds(self) -> bool:
    """Whether it is near enough; a NaN is not."""
    return self.judged <= self.tolerance

  @property
  def judged(self) -> float:
    """`relative`, or what stands for it where there are kinks."""
    return self.rms if self.kinked and self.group in KINKED_GROUPS else self.relative


def summary(rows: list[Row]) -> list[list[str]]:
  """A line for each dtype and group: how many arrays, and of the worst how far it is, its name."""
  lines = []
  for dtype, group in dict.fromkeys((row.dtype, row.group) for row in rows):
    of_group = [row for row in rows if (row.dtype, row.group) == (dtype, group)]
    # A NaN is the worst.
    worst = max(of_group, key=lambda row: np.nan_to_num(row.judged / row.tolerance, nan=np.inf))
    lines.append(
      [
        f"{dtype} {group}",
        str(len(of_group)),
        f"{worst.relative:.1e}",
        f"{worst.rms:.1e}",
        worst.name,
        f"{worst.tolerance:.0e}",
        "yes" if all(row.holds for row in of_group) else "NO",
      ]
    )
  return lines


HEADER = ("what", "n", "relative", "rms", "where", "limit", "holds")


def page(title: str, rows: list[Row], about: Mapping[str, Any]) -> str:
  """The HTML page: a chart of the difference by layer, the summary, every array."""
  layers = {
    dtype: [(i, row.relative) for i, row in enumerate(of_dtype)]
    for dtype in dict.fromkeys(row.dtype for row in rows)
    if (of_dtype := [row for row in rows if row.dtype == dtype and row.group == "layer"])
  }
  curve = Curve("Difference by layer", "largest relative", layers, log_y=True, x_label="layer")
  chart = line_chart(curve)
  every = [
    [row.dtype, row.group, row.name, *(f"{x:.3e}" for x in (row.max_abs, row.relative, row.rms))]
    for row in rows
  ]
  told = "".join(f"<li>{escape(k)}: {escape(str(v))}</li>" for k, v in about.items())
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{escape(title)}</title><style>{STYLE.read_text()}</style></head><body><main>"
    f"<h1>{escape(title)}</h1><ul>{told}</ul><section>{chart}</section>"
    f"<section><h2>Summary</h2>{_table(HEADER, summary(rows))}</section>"
    f"<section><h2>Every array</h2>"
    f"{_table(('dtype', 'what', 'name', 'abs', 'relative', 'rms'), every)}"
    "</section></main></body></html>"
  )


def _table(header: tuple[str, ...], rows: list[list[str]]) -> str:
  head = "".join(f"<th>{escape(x)}</th>" for x in header)
  body = "".join("<tr>" + "".join(f"<td>{escape(x)}</td>" for x in row) + "</tr>" for row in rows)
  return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'
