"""Reports: arrays and numbers in, one self-contained HTML file out.

Notable: pictures are data URIs and charts are inline SVG, whose text and lines take their
colours from the style sheet; so the file opens offline, needs no JavaScript, follows the reader's
light or dark mode and shrinks to a phone. Every text goes through `html.escape`. The file is
written whole or not at all, so an interrupted run never leaves half a report.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np

from launch.report.charts import Curve, data_uri, line_chart, number, scatter
from vavae_jax.common.files import atomic_file

_STYLE = Path(__file__).with_name("style.css")
_ARROWS = {"higher": "↑", "lower": "↓", "": ""}
_MAX_HERO_TILES = 40
_MAX_HEADLINES = 4


@dataclasses.dataclass(frozen=True)
class Figure:
  """One number with its unit; `better` says which way is up: "higher", "lower" or ""."""

  name: str
  value: float
  unit: str = ""
  note: str = ""
  better: str = ""


class Section(NamedTuple):
  """A part of a page: its name, a sentence about it, its content as HTML; none if that is empty."""

  name: str
  caption: str
  content: str


@dataclasses.dataclass(frozen=True)
class Report:
  """All of the quickstart's page; a part without pictures, curves or points has no section.

  Attributes:
    title: of the page.
    summary: one paragraph for a reader who knows nothing yet.
    class_names: a name per class.
    samples: guided samples [classes,n,H,W,3], uint8.
    originals: held-out images [m,H,W,3], uint8.
    reconstructions: the same through the tokenizer [m,H,W,3], uint8.
    curves: charts in the order of the page.
    latents_2d: a place in the plane per image [p,2].
    latents_label: its class [p], integers.
    latents_caption: how the latents were brought to two dimensions.
    figures: numbers; the first four head the page.
    caveats: what a reader must know before quoting a figure.
    timings: seconds per stage, in order.
    config: the run's configuration as text.
    versions: versions by package.
    latents_thumbnails: the image at each place [p,H,W,3], uint8; some of them are drawn.
  """

  title: str
  summary: str
  class_names: list[str]
  samples: np.ndarray
  originals: np.ndarray
  reconstructions: np.ndarray
  curves: list[Curve]
  latents_2d: np.ndarray
  latents_label: np.ndarray
  latents_caption: str
  figures: list[Figure]
  caveats: list[str]
  timings: dict[str, float]
  config: str
  versions: dict[str, str]
  latents_thumbnails: np.ndarray | None = None


def write_page(
  path: Path,
  *,
  title: str,
  summary: str,
  figures: Sequence[Figure],
  sections: Sequence[Section],
  hero: str = "",
) -> None:
  """Writes a page; an older one at the same path stays whole until the new one is.

  Args:
    path: the HTML file; its folder is made.
    title: of the page.
    summary: one paragraph.
    figures: of which the first four head the page.
    sections: in their order.
    hero: HTML above the title.
  """
  shown = [section for section in sections if section.content]
  links = "".join(f'<a href="#{section.name.lower()}">{section.name}</a>' for section in shown)
  body = "".join(
    f'<section id="{name.lower()}"><h2>{name}</h2><p>{escape(caption)}</p>{content}</section>'
    for name, caption, content in shown
  )
  page = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    '<meta name="color-scheme" content="light dark">'
    f"<title>{escape(title)}</title><style>{_STYLE.read_text('utf-8')}</style></head><body>"
    f"<header>{hero}<h1>{escape(title)}</h1>"
    f'<p class="summary">{escape(summary)}</p>{_headlines(figures)}<nav>{links}</nav>'
    f"</header><main>{body}</main></body></html>\n"
  )
  with atomic_file(path) as file:
    file.write(page.encode())


def write_report(report: Report, path: Path) -> None:
  """Writes the quickstart's page; an older one at the same path stays whole until the new one is.

  Args:
    report: what to show.
    path: the HTML file; its folder is made.

  Raises:
    ValueError: if arrays of the report do not fit together or pictures are not uint8 RGB.
    OSError: if the file cannot be written.
  """
  _check(report)
  sections = [
    Section(
      "Samples",
      "New pictures: drawn from noise by the diffusion transformer under guidance, told nothing "
      "but the class, and decoded by the tokenizer.",
      _samples(report),
    ),
    Section(
      "Reconstructions",
      "Held-out pictures, seen by no training. Left the original, right what the tokenizer "
      "rebuilds from its latent.",
      _reconstructions(report),
    ),
    training_section(report.curves),
    Section("Latents", report.latents_caption, _latents(report)),
    Section("Figures", "", figures_table(report.figures, report.caveats)),
    Section("Run", f"{_duration(sum(report.timings.values()))} in all.", _run(report)),
  ]
  write_page(
    path,
    title=report.title,
    summary=report.summary,
    figures=report.figures,
    sections=sections,
    hero=_hero(report),
  )


def training_section(curves: Sequence[Curve]) -> Section:
  """Charts of a training."""
  caption = "Faint: as logged. Strong: moving average, with its last value above the chart."
  return Section("Training", caption, "".join(map(line_chart, curves)))


def _check(report: Report) -> None:
  """Raises ValueError where parts of the report do not fit together."""
  pictures = {
    "samples": (report.samples, 5),
    "originals": (report.originals, 4),
    "reconstructions": (report.reconstructions, 4),
  }
  if report.latents_thumbnails is not None:
    pictures["latents_thumbnails"] = (report.latents_thumbnails, 4)
  for name, (array, rank) in pictures.items():
    if array.dtype != np.uint8 or array.ndim != rank or array.shape[-1] != 3:
      raise ValueError(
        f"{name} is {array.dtype} {array.shape}, need uint8 of rank {rank} with 3 channels last: "
        "convert images in [-1,1] by clip(127.5 x + 128, 0, 255)."
      )
  num_points = len(report.latents_2d)
  shapes = {
    "samples": (report.samples.shape[:1], (len(report.class_names),)),
    "reconstructions": (report.reconstructions.shape, report.originals.shape),
    "latents_2d": (report.latents_2d.shape, (num_points, 2)),
    "latents_label": (report.latents_label.shape, (num_points,)),
  }
  if report.latents_thumbnails is not None:
    shapes["latents_thumbnails"] = (report.latents_thumbnails.shape[:1], (num_points,))
  for name, (given, needed) in shapes.items():
    if given != needed:
      raise ValueError(f"{name} has shape {given}, need {needed} to fit the rest of the report.")
  if not np.isfinite(report.latents_2d).all():
    raise ValueError("latents_2d holds NaN or infinity, need places in the plane: drop those.")
  labels, classes = report.latents_label, range(len(report.class_names))
  if labels.size and (labels.dtype.kind not in "iu" or not {*labels.tolist()} <= {*classes}):
    raise ValueError(f"latents_label needs integers in {classes}: give a name for each class.")
  for figure in report.figures:
    if figure.better not in _ARROWS:
      raise ValueError(f"Figure {figure.name}: better is {figure.better!r}, not in {[*_ARROWS]}.")


def _hero(report: Report) -> str:
  """Strip of samples in which neighbours are of different classes."""
  interleaved = report.samples.swapaxes(0, 1).reshape(-1, *report.samples.shape[2:])
  tiles = "".join(map(_picture, interleaved[:_MAX_HERO_TILES]))
  return f'<div class="hero" role="img" aria-label="Samples of all classes">{tiles}</div>'


def _headlines(figures: Sequence[Figure]) -> str:
  tiles = "".join(
    f"<div><dt>{escape(figure.name)} {_ARROWS[figure.better]}</dt><dd>{_value(figure)}</dd></div>"
    for figure in figures[:_MAX_HEADLINES]
  )
  return f'<dl class="headlines">{tiles}</dl>' if tiles else ""


def _samples(report: Report) -> str:
  columns = min(report.samples.shape[1], 10)
  return picture_rows(dict(zip(report.class_names, report.samples, strict=True)), columns)


def picture_rows(rows: Mapping[str, np.ndarray], columns: int) -> str:
  """Pictures [n,H,W,3] under a name each, `columns` beside each other."""
  return "".join(
    f'<div class="class"><h3>{escape(name)}</h3>'
    f'<div class="tiles" style="--columns:{columns}" role="img" aria-label="{escape(name)}">'
    f"{''.join(map(_picture, images))}</div></div>"
    for name, images in rows.items()
    if len(images)
  )


def _reconstructions(report: Report) -> str:
  return picture_pairs(report.originals, report.reconstructions, ("original", "reconstruction"))


def picture_pairs(left: np.ndarray, right: np.ndarray, names: tuple[str, str]) -> str:
  """Pictures [n,H,W,3] side by side in pairs; `names` are for who cannot see them."""
  pairs = "".join(
    f'<div class="pair">{_picture(a, names[0])}{_picture(b, names[1])}</div>'
    for a, b in zip(left, right, strict=True)
  )
  return f'<div class="pairs">{pairs}</div>' if pairs else ""


def _latents(report: Report) -> str:
  if not len(report.latents_2d):
    return ""
  return scatter(
    report.latents_2d, report.latents_label, report.class_names, report.latents_thumbnails
  )


def figures_table(figures: Sequence[Figure], caveats: Sequence[str] = ()) -> str:
  """The figures with their notes, and what must be known before they are quoted."""
  rows = "".join(
    f"<tr><th>{escape(figure.name)}<small>{escape(figure.note)}</small></th>"
    f"<td>{_value(figure)}</td><td>{escape(figure.better)}</td></tr>"
    for figure in figures
  )
  table = (
    "<table><thead><tr><th>figure</th><th>value</th><th>better</th></tr></thead>"
    f"<tbody>{rows}</tbody></table>"
  )
  told = "".join(f'<p class="caveat">{escape(caveat)}</p>' for caveat in caveats)
  return table + told if rows else told


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A plain table."""
  head = "".join(f"<th>{escape(name)}</th>" for name in header)
  body = "".join(
    "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
  )
  return (
    f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
  )


def data_uri_of_file(path: Path) -> str:
  """A PNG file as a picture of the page."""
  data = base64.b64encode(path.read_bytes()).decode()
  return f'<img class="plot" src="data:image/png;base64,{data}" alt="{escape(path.stem)}">'


def details(name: str, text: str) -> str:
  """A text that opens by a click."""
  return f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"


def _run(report: Report) -> str:
  longest = max([*report.timings.values(), 1e-9])
  bars = "".join(
    f'<dt>{escape(stage)}</dt><dd><i style="width:{100 * seconds / longest:.1f}%"></i></dd>'
    f"<dd>{_duration(seconds)}</dd>"
    for stage, seconds in report.timings.items()
  )
  versions = "".join(
    f"<dt>{escape(name)}</dt><dd>{escape(version)}</dd>"
    for name, version in report.versions.items()
  )
  return (
    f'<dl class="bars">{bars}</dl>'
    f"{details('Configuration', report.config)}"
    f'<details><summary>Versions</summary><dl class="versions">{versions}</dl></details>'
  )


def _picture(image_HWC: np.ndarray, alt: str = "") -> str:
  height, width, _ = image_HWC.shape
  return f'<img src="{data_uri(image_HWC)}" width="{width}" height="{height}" alt="{alt}">'


def _value(figure: Figure) -> str:
  return f"{number(figure.value)} <small>{escape(figure.unit)}</small>"


def _duration(seconds: float) -> str:
  minutes, rest = divmod(round(seconds), 60)
  return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
