"""Pages: arrays and numbers in, one self-contained HTML file out.

Notable: pictures are data URIs and charts are inline SVG, whose text and lines take their
colours from the style sheet; so the file opens offline, needs no JavaScript, follows the reader's
light or dark mode and shrinks to a phone. Templates escape every text. The file is written whole
or not at all, so an interrupted run never leaves half a page.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vavae_jax.common.files import atomic_file

_FOLDER = Path(__file__).parent
_ARROWS = {"higher": "↑", "lower": "↓", "": ""}
_MAX_HEADLINES = 4


@dataclasses.dataclass(frozen=True)
class Figure:
  """One number with its unit; `better` is "higher", "lower", or "" where neither is."""

  name: str
  value: float
  unit: str = ""
  note: str = ""
  better: str = ""

  def __post_init__(self) -> None:
    if self.better not in _ARROWS:
      raise ValueError(f"Figure {self.name}: better is {self.better!r}, not in {[*_ARROWS]}.")

  @property
  def text(self) -> str:
    """The number as people read it."""
    return number(self.value)


class Section(NamedTuple):
  """A part of a page: a name, a sentence, and pieces from the functions below; left out if none of
  the pieces has content.
  """

  name: str
  caption: str
  parts: Sequence[str]

  @property
  def anchor(self) -> str:
    """The target of links to it."""
    return self.name.lower().replace(" ", "-")


def write_page(
  path: Path,
  title: str,
  sections: Iterable[Section],
  *,
  summary: str = "",
  figures: Sequence[Figure] = (),
  hero: str = "",
) -> None:
  """Writes a page; an older one at the same path stays whole until the new one is.

  The summary is a paragraph under the title, before the first four figures; `hero` stands above.
  """
  html = _templates().get_template("page.html")
  text = html.render(
    title=title,
    summary=summary,
    figures=figures[:_MAX_HEADLINES],
    sections=[section for section in sections if any(part.strip() for part in section.parts)],
    hero=hero,
    style=safe((_FOLDER / "style.css").read_text("utf-8")),
    arrows=_ARROWS,
  )
  with atomic_file(path) as file:
    file.write(text.encode(errors="backslashreplace"))  # names need not be UTF-8


def markdown(template: str, **values: Any) -> str:
  """A text by a template, in which nothing is escaped."""
  return _templates(autoescape=False).get_template(template).render(**values)


@functools.cache
def _templates(*, autoescape: bool = True) -> Any:
  import jinja2  # only when a page is made

  templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER / "templates"),
    autoescape=autoescape,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  templates.filters["data_uri"] = data_uri
  return templates


def part(name: str, *arguments: Any) -> str:
  """A piece of a page, by a macro of templates/parts.html."""
  return getattr(_templates().get_template("parts.html").module, name)(*arguments)


def safe(html: str) -> str:
  """Marks a text as HTML, which templates leave as it is."""
  from markupsafe import Markup

  return Markup(html)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table of texts."""
  return part("table", header, list(rows))


def figures_table(figures: Sequence[Figure], caveats: Sequence[str] = ()) -> str:
  """The figures with their notes, and what a reader must know before quoting them."""
  rows = [(f.name, f"{f.text} {f.unit}".strip(), f.better, f.note) for f in figures]
  shown = table(("figure", "value", "better", "note"), rows) if rows else safe("")
  return shown + part("caveats", caveats)


def details(name: str, text: str) -> str:
  """A text that opens by a click."""
  return part("details", name, text)


def strip(pictures_NHWC: np.ndarray, label: str) -> str:
  """Pictures for the head of a page."""
  return part("strip", pictures_NHWC, label)


def picture_rows(rows: Mapping[str, np.ndarray], columns: int) -> str:
  """Pictures uint8 [n,H,W,3] under a name each, `columns` beside each other; a name may be ""."""
  return part("picture_rows", rows.items(), columns)


def picture_pairs(left: np.ndarray, right: np.ndarray, names: tuple[str, str]) -> str:
  """Pictures uint8 [n,H,W,3] side by side in pairs; `names` are their alternative texts."""
  return part("picture_pairs", list(zip(left, right, strict=True)), names)


def picture_file(path: Path) -> str:
  """A PNG file."""
  return part("picture_file", base64.b64encode(path.read_bytes()).decode(), path.stem)


def bars(seconds: Mapping[str, float]) -> str:
  """How long each stage took, as bars."""
  longest = max([*seconds.values(), 1e-9])
  rows = [(name, 100 * value / longest, duration(value)) for name, value in seconds.items()]
  return part("bars", rows)


def data_uri(image_HWC: np.ndarray) -> str:
  """A picture, uint8 [H,W,3], as a data URI: a lossless WebP, which adds no blur."""
  if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[-1] != 3:
    raise ValueError(
      f"A picture is {image_HWC.dtype} {image_HWC.shape}, but uint8 [H,W,3] is needed: convert "
      "images in [-1,1] by clip(127.5 x + 128, 0, 255)."
    )
  buffer = io.BytesIO()
  Image.fromarray(image_HWC).save(buffer, "WEBP", lossless=True)
  return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def number(value: float) -> str:
  """A number in at most four significant digits, from ten thousand on as 12k or 3M."""
  if not math.isfinite(value):
    return "not finite"
  if abs(value) >= 999_950:  # 1000k after rounding
    return f"{value / 1e6:.4g}M"
  if abs(value) >= 9_999.5:  # 1e+04 after rounding
    return f"{value / 1e3:.4g}k"
  return f"{value:.4g}"


def duration(seconds: float) -> str:
  """Seconds as 1 min 40 s or 25.0 s."""
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
