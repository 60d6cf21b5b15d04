"""Line charts by matplotlib and a map with thumbnails, as inline SVG.

Notable: colours are the style sheet's variables --c0 to --c8 and text is drawn in currentColor, so
the same chart serves light and dark pages.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from launch.report import plots
from launch.report.html import Section, number, part, safe

_NUM_COLOURS = 9  # then they repeat
_MAX_THUMBNAILS = 64
_MAX_DOTTED = 30  # a series of so few points shows them
_MAP_SIZE, _THUMBNAIL_SIZE = (720, 520), 34  # user units, about 1.4 pixels on a desktop
# What matplotlib draws in these colours, which nothing else has, is drawn in the page's.
_TEXT, _GRID, _SERIES = "#010203", "#010204", "#01030"
_PAGE_COLOURS = {_TEXT: "currentColor", _GRID: "var(--line)"} | {
  f"{_SERIES}{i}": f"var(--c{i})" for i in range(_NUM_COLOURS)
}


@dataclasses.dataclass(frozen=True)
class Curve:
  """A chart of values over steps, or another x; each series is a list of (x, value) by x."""

  title: str
  y_label: str
  series: dict[str, list[tuple[int, float]]]
  log_y: bool = False
  x_label: str = "step"


def line_chart(curve: Curve) -> str:
  """A chart under its title and a legend with the last values, or "" where nothing can be drawn.

  Values that are not finite, or not positive on a logarithmic axis, are left out.
  """
  series = {
    name: np.array([p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not curve.log_y)])
    for name, points in curve.series.items()
  }
  series = {name: points for name, points in series.items() if len(points)}
  if not series:
    return ""
  smooth = [_moving_average(points[:, 1]) for points in series.values()]
  legend = [(name, number(values[-1])) for name, values in zip(series, smooth, strict=True)]
  return part("chart", curve, legend, _svg(curve, [*series.values()], smooth))


def training_section(curves: Sequence[Curve]) -> Section:
  """Charts of a training."""
  caption = "Faint: as logged. Strong: moving average, with its last value above the chart."
  return Section("Training", caption, [line_chart(curve) for curve in curves])


def _svg(curve: Curve, series: list[np.ndarray], smooth: list[np.ndarray]) -> str:
  """The lines with grid and ticks; `series` are [points, 2] of x and value, `smooth` averages."""
  from matplotlib import rc_context

  # Ids come from the salt: they must differ between the charts of a page, not between runs. Texts
  # get the room that they take on a phone, where the style sheet has them that large.
  style: Any = {"svg.fonttype": "none", "svg.hashsalt": curve.title, "font.size": 15}
  with rc_context(style), io.StringIO() as file:
    figure, ((axis,),) = plots.panels(size=(6.4, 3.5))
    _draw(axis, curve.log_y, series, smooth)
    figure.patch.set_visible(False)
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=nothing)
    return _for_page(file.getvalue(), curve.title)


def _draw(axis: Any, log_y: bool, series: list[np.ndarray], smooth: list[np.ndarray]) -> None:
  from matplotlib.ticker import Locator, LogLocator, MaxNLocator

  axis.patch.set_visible(False)
  axis.spines[:].set_visible(False)
  axis.tick_params(which="both", length=0, labelcolor=_TEXT)
  axis.tick_params(axis="x", pad=9)  # below the lowest label of the other axis
  axis.grid(axis="y", which="both", color=_GRID)
  if log_y:
    axis.set_yscale("log")
  for i, (points, average) in enumerate(zip(series, smooth, strict=True)):
    dots = "o" if len(points) <= _MAX_DOTTED else ""
    colour = f"{_SERIES}{i % _NUM_COLOURS}"
    axis.plot(points[:, 0], average, marker=dots, color=colour, lw=2, clip_on=False)
    # The strong lines set the frame; a few spikes of the faint ones may leave it.
    axis.update_datalim([(points[0, 0], y) for y in np.percentile(points[:, 1], [1, 99])])
  low, high = axis.get_ylim()
  axis.set_ylim(low, high)
  axis.set_xlim(left=min(0, *(points[0, 0] for points in series)))
  for i, points in enumerate(series):
    if len(points) > _MAX_DOTTED:
      axis.plot(*points.T, color=f"{_SERIES}{i % _NUM_COLOURS}", alpha=0.28, lw=1, zorder=1)
  locator: Locator = MaxNLocator(5, steps=[1, 2, 5, 10])
  if log_y and high > 10 * low:
    locator = LogLocator(subs=[1] if high > 1000 * low else [1, 2, 5])
  axis.yaxis.set_major_locator(locator)
  axis.minorticks_off()
  for each in (axis.xaxis, axis.yaxis):
    each.set_major_formatter(lambda value, _: number(value))


def _for_page(svg: str, name: str) -> str:
  """An SVG file as an element of a page, in the page's colours, fonts and width."""
  _, _, svg = svg.partition("<svg")
  svg = re.sub(r'<style type="text/css">.*?</style>', "", svg, flags=re.DOTALL)  # of the whole page
  svg = re.sub(r' (?:xmlns(?::xlink)?|width|height|version)="[^"]*"', "", svg, count=5)
  svg = re.sub(r"font-(?:size|family): [^;]*; ", "", svg).replace("xlink:href", "href")
  svg = re.sub(r'<g id="[^"]*"', "<g", svg)
  svg = re.sub(r"#010\d{3}", lambda found: _PAGE_COLOURS[found[0]], svg)
  return safe(f'<svg role="img" aria-label="{escape(name)}"{svg}')


def _moving_average(values: np.ndarray) -> np.ndarray:
  """Centred mean over a thirtieth of the series; at its ends, over what there is."""
  window = np.ones(2 * (len(values) // 60) + 1)
  counts = np.convolve(np.ones(len(values)), window, "same")
  return np.convolve(values, window, "same") / counts


def scatter(
  points: np.ndarray,
  labels: np.ndarray,
  names: Sequence[str],
  thumbnails: np.ndarray | None = None,
) -> str:
  """Finite points [p,2] coloured by class, with a legend; "" without points.

  `labels` [p] are integers, `names` one for each class. Of the thumbnails, uint8 [p,H,W,3], those
  are drawn that do not hide one another. ValueError where the arguments do not fit together.
  """
  count = len(points)
  if points.shape != (count, 2) or not np.isfinite(points).all():
    raise ValueError(f"points are {points.shape} or hold NaN or infinity; finite [p,2] is needed.")
  if labels.shape != (count,) or (thumbnails is not None and len(thumbnails) != count):
    raise ValueError(f"{count} points need as many labels and thumbnails; labels: {labels.shape}.")
  if not count:
    return ""
  if labels.dtype.kind not in "iu" or not 0 <= labels.min() <= labels.max() < len(names):
    raise ValueError(f"labels need integers below {len(names)}: give a name for each class.")
  low, high = points.min(axis=0), points.max(axis=0)
  middle, reach = (low + high) / 2, np.where(high > low, high - low, 1) / 2
  half = np.array(_MAP_SIZE) / 2
  places = half + (points - middle) / reach * (half - _THUMBNAIL_SIZE / 2 - 4) * [1, -1]
  circles = [(x, y, label) for (x, y), label in zip(places, labels.tolist(), strict=True)]
  shown = [] if thumbnails is None else apart(places, 1.12 * _THUMBNAIL_SIZE, _MAX_THUMBNAILS)
  drawn = [(*places[i], _THUMBNAIL_SIZE, labels[i], np.asarray(thumbnails)[i]) for i in shown]
  return part("map", _MAP_SIZE, circles, drawn, list(names))


def apart(points: np.ndarray, distance: float, limit: int) -> list[int]:
  """Indices of at most `limit` points, no two closer than `distance` along both axes."""
  chosen: list[int] = []
  for i in np.random.default_rng(0).permutation(len(points)):
    if len(chosen) < limit and all(np.abs(points[i] - points[j]).max() >= distance for j in chosen):
      chosen.append(int(i))
  return chosen
