"""Whether a reader can read the texts of a figure."""

from __future__ import annotations

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text


def crowded(figure: Figure) -> list[str]:
  """What a reader cannot see of a figure's texts: those that leave it, and pairs that overlap."""
  figure.draw_without_rendering()
  canvas = FigureCanvasAgg(figure)
  renderer, (width, height) = canvas.get_renderer(), canvas.get_width_height()
  hidden = set()
  for axis in (a for axes in figure.axes for a in (axes.xaxis, axes.yaxis)):
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    hidden |= {t.label1 for t in ticks if not low - 1e-9 <= t.get_loc() <= high + 1e-9}
  texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in hidden]
  boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in texts]
  boxes = [(text, box) for text, box in boxes if box.width > 1]
  cut = [t for t, b in boxes if min(b.x0, b.y0, width - b.x1, height - b.y1) < -1]
  pairs = itertools.combinations(boxes, 2)
  return cut + [f"{a} on {b}" for (a, one), (b, other) in pairs if one.overlaps(other)]
