"""Charts and pictures as pieces of HTML: inline SVG, data URIs, nothing to load.

Notable: colours are the style sheet's variables --c0 to --c8 and text is drawn in currentColor, so
the same chart serves light and dark pages. No element has an id, so charts can share a page.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np
from PIL import Image

_NUM_COLOURS = 9  # further series and classes begin anew
_MAX_THUMBNAILS = 64
_MAX_DOTTED = 30  # a series of so few points shows them
# In user units, about 1 and 1.4 pixels on a desktop.
_CHART_WIDTH, _CHART_HEIGHT = 480, 264
_MAP_WIDTH, _MAP_HEIGHT, _THUMBNAIL_SIZE = 720, 520, 34


@dataclasses.dataclass(frozen=True)
class Curve:
  """A chart of values over steps, or whatever x is; each series is a list of (x, value) by x."""

  title: str
  y_label: str
  series: dict[str, list[tuple[int, float]]]
  log_y: bool = False
  x_label: str = "step"


def line_chart(curve: Curve) -> str:
  """Draws a chart under its title and a legend with the last values.

  Args:
    curve: what to draw; values that are not finite, or not positive on a logarithmic axis, are
      left out.

  Returns:
    A figure element, or "" where there is nothing to draw.
  """
  series = {
    name: np.array([p for p in points if math.isfinite(p[1]) and (p[1] > 0 or not curve.log_y)])
    for name, points in curve.series.items()
  }
  series = {name: points for name, points in series.items() if len(points)}
  if not series:
    return ""
  smooth = [_moving_average(points[:, 1]) for points in series.values()]
  legend = _legend(
    f"{escape(n)} <b>{number(s[-1])}</b>" for n, s in zip(series, smooth, strict=True)
  )
  return (
    f"<figure><figcaption><h3>{escape(curve.title)}</h3>"
    f"<p>{escape(curve.y_label)} by {escape(curve.x_label)}</p>"
    f'</figcaption><ul class="legend">{legend}</ul>'
    f'<svg viewBox="0 0 {_CHART_WIDTH} {_CHART_HEIGHT}" role="img" '
    f'aria-label="{escape(curve.title)}">{_plot([*series.values()], smooth, curve.log_y)}</svg>'
    "</figure>"
  )


def _plot(series: list[np.ndarray], smooth: list[np.ndarray], log_y: bool) -> str:
  """Grid, ticks and lines; each series is [points, 2] of step and value, `smooth` its values."""
  left, right, top, bottom = 46, _CHART_WIDTH - 6, 6, _CHART_HEIGHT - 26
  steps = np.concatenate([points[:, 0] for points in series])
  # The strong lines set the frame; of the faint ones a few spikes may leave it.
  values = [np.percentile(points[:, 1], [1, 99]) for points in series] + smooth
  low, high = np.concatenate(values).min(), np.concatenate(values).max()
  x_axis = _Axis(min(0, steps.min()), steps.max(), left, right - 4)
  y_axis = _Axis(low, high, bottom - 6, top + 6, log_y)
  plot = "".join(
    f'<path class="grid" d="M{left} {y:.1f}H{right}"/>'
    f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
    for value, y in y_axis.ticks()
  )
  plot += "".join(
    f'<text x="{x:.1f}" y="{_CHART_HEIGHT - 5}" text-anchor="middle">{number(value)}</text>'
    for value, x in x_axis.ticks()
  )
  lines = ""
  for i, (points, average) in enumerate(zip(series, smooth, strict=True)):
    places = zip(x_axis(points[:, 0]), y_axis(points[:, 1]), y_axis(average), strict=True)
    x, raw, strong = np.round(list(places), 1).T.tolist()
    marks = f'<path class="line" d="{_path(x, strong)}"/>'
    if len(points) <= _MAX_DOTTED:
      marks += "".join(f'<circle cx="{a}" cy="{b}" r="3"/>' for a, b in zip(x, raw, strict=True))
    elif raw != strong:
      marks = f'<path class="raw" d="{_path(x, raw)}"/>{marks}'
    lines += f"<g {_colour(i)}>{marks}</g>"
  # An inner svg clips to the frame without an id, which would have to be unique on the page.
  return f'{plot}<svg width="{_CHART_WIDTH}" height="{bottom}">{lines}</svg>'


def scatter(
  points: np.ndarray, labels: np.ndarray, names: Sequence[str], thumbnails: np.ndarray | None
) -> str:
  """Draws points coloured by class, with thumbnails where they do not hide one another.

  Args:
    points: places [p,2], finite.
    labels: class of each [p], integers.
    names: name per class.
    thumbnails: picture at each place [p,H,W,3], uint8; some of them are drawn.

  Returns:
    A legend and a drawing that scrolls sideways where the page is narrow.
  """
  size, margin = _THUMBNAIL_SIZE, _THUMBNAIL_SIZE / 2 + 4
  low, high = points.min(axis=0), points.max(axis=0)
  x = _Axis(low[0], high[0], margin, _MAP_WIDTH - margin)(points[:, 0])
  y = _Axis(low[1], high[1], _MAP_HEIGHT - margin, margin)(points[:, 1])
  marks = "".join(
    f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" {_colour(label)}/>'
    for a, b, label in zip(x, y, labels, strict=True)
  )
  if thumbnails is not None:
    for i in _apart(np.stack([x, y], axis=1), 1.12 * size, _MAX_THUMBNAILS):
      place = f'x="{x[i] - size / 2:.1f}" y="{y[i] - size / 2:.1f}" width="{size}" height="{size}"'
      label = labels[i]
      marks += (
        f"<g {_colour(label)}><title>{escape(names[label])}</title>"
        f'<image {place} href="{data_uri(thumbnails[i])}"/><rect {place} rx="7"/>'
        "</g>"
      )
  return (
    f'<ul class="legend dots">{_legend(map(escape, names))}</ul>'
    f'<div class="scroll"><svg class="map" viewBox="0 0 {_MAP_WIDTH} {_MAP_HEIGHT}" role="img" '
    f'aria-label="Map of latents">{marks}</svg></div>'
  )


def data_uri(image_HWC: np.ndarray) -> str:
  """Encodes a picture losslessly, so that the page adds no blur to what it shows.

  Args:
    image_HWC: picture [H,W,3], uint8.

  Returns:
    A WebP file as a data URI.
  """
  buffer = io.BytesIO()
  Image.fromarray(image_HWC).save(buffer, "WEBP", lossless=True)
  return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def number(value: float) -> str:
  """Writes a number in at most four significant digits, from ten thousand on as 12k or 3M."""
  if not math.isfinite(value):
    return "not finite"
  if abs(value) >= 999_950:  # 1000k after rounding
    return f"{value / 1e6:.4g}M"
  if abs(value) >= 9_999.5:  # 1e+04 after rounding
    return f"{value / 1e3:.4g}k"
  return f"{value:.4g}"


@dataclasses.dataclass(frozen=True)
class _Axis:
  """Map from data in [low, high] to user units in [start, end], linear or logarithmic."""

  low: float
  high: float
  start: float
  end: float
  log: bool = False

  def __call__(self, values: np.ndarray) -> np.ndarray:
    low, high = self.low, self.high
    if self.log:
      low, high, values = math.log(low), math.log(high), np.log(values)
    if high == low:  # a flat line lies in the middle
      low, high = low - 1, high + 1
    return self.start + (values - low) * ((self.end - self.start) / (high - low))

  def ticks(self) -> Iterable[tuple[float, float]]:
    """Some five round values inside the range, with their places."""
    from matplotlib.ticker import Locator, LogLocator, MaxNLocator  # only when one is drawn

    locator: Locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    if self.log and self.high > 10 * self.low:
      locator = LogLocator(subs=[1] if self.high > 1000 * self.low else [1, 2, 5])
    values = np.asarray(locator.tick_values(self.low, self.high))
    inside = values[(values >= self.low) & (values <= self.high)]
    return zip(inside, self(inside), strict=True)


def _moving_average(values: np.ndarray) -> np.ndarray:
  """Centred mean over a thirtieth of the series; at its ends, over what there is."""
  window = np.ones(2 * (len(values) // 60) + 1)
  counts = np.convolve(np.ones(len(values)), window, "same")
  return np.convolve(values, window, "same") / counts


def _apart(points: np.ndarray, distance: float, limit: int) -> list[int]:
  """Indices of at most `limit` points, no two closer than `distance` along both axes."""
  chosen: list[int] = []
  for i in np.random.default_rng(0).permutation(len(points)):
    if len(chosen) < limit and all(np.abs(points[i] - points[j]).max() >= distance for j in chosen):
      chosen.append(int(i))
  return chosen


def _legend(entries: Iterable[str]) -> str:
  return "".join(f"<li {_colour(i)}>{entry}</li>" for i, entry in enumerate(entries))


def _colour(index: int) -> str:
  return f'style="--c:var(--c{index % _NUM_COLOURS})"'


def _path(x: list[float], y: list[float]) -> str:
  return "M" + "L".join(f"{a} {b}" for a, b in zip(x, y, strict=True))
