"""Training: samples and reconstructions over the steps, and curves; follows a run under way."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from launch.engine.writers import curve, read_metrics
from launch.report.charts import Curve, line_chart
from launch.studio.content import Studio
from launch.studio.parts import QUIET, Controls, tile, told
from vavae_jax.data.order import spread

SECONDS = 5.0  # between looks at the files
PICTURES = 12  # of a strip
WIDTH = 360  # pixels of a picture
CHIEF = ("loss", "mse", "cosine", "reconstruction/psnr", "teacher_cosine", "kl")


def names_of(workdir: Path) -> list[str]:
  """Metrics that a training has written."""
  return sorted({name for line in read_metrics(workdir) for name in line} - {"step"})


def state_of(workdir: Path) -> list[tuple[str, int]]:
  """What changes when there is something new to see."""
  files = [workdir / "metrics.jsonl", *_pictures(workdir)]
  return [(str(path), path.stat().st_mtime_ns) for path in files if path.exists()]


def _pictures(workdir: Path) -> list[Path]:
  return sorted(workdir.glob("pictures/*/*.png"))


def filmstrips(workdir: Path) -> str:
  """A strip of pictures for each evaluation that wrote some."""
  strips = []
  for name, group in groupby(_pictures(workdir), lambda path: path.parent.name):
    paths = list(group)
    shown = spread(len(paths), PICTURES)
    pieces = [_film(paths[i], paths[i].stat().st_mtime_ns) for i in shown]
    title = escape(name.replace("_", " "))
    strips.append(f'<h3>{title}</h3><div class="film">{"".join(pieces)}</div>')
  return "".join(strips) or '<p class="note">No pictures yet: the first evaluation draws some.</p>'


@functools.lru_cache(maxsize=256)
def _film(path: Path, changed: int) -> str:
  del changed  # so that a new file of the name is read
  with Image.open(path) as picture:
    small = picture.convert("RGB")
    small.thumbnail((2 * WIDTH, 4 * WIDTH))
  return tile(small, f"step {int(path.stem):,}")


def curves(workdir: Path, chosen: Sequence[str]) -> str:
  """A chart for each of some metrics."""
  lines = read_metrics(workdir)
  charts = [line_chart(Curve(name, "value", {name: curve(lines, name)})) for name in chosen]
  return f'<div class="charts">{"".join(charts)}</div>'


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""
  choices = [str(path) for path in studio.workdirs]

  @told
  def choose(workdir: str) -> Any:
    names = names_of(Path(workdir))
    return gr.Dropdown(choices=names, value=[name for name in CHIEF if name in names])

  @told
  def update(workdir: str, chosen: list[str], seen: Any) -> Any:
    now = (workdir, chosen, state_of(Path(workdir)))
    if now == seen:
      return gr.skip(), gr.skip(), gr.skip()
    return filmstrips(Path(workdir)), curves(Path(workdir), chosen), now

  with gr.Row():
    workdir = gr.Dropdown(choices, value=choices[0], label="Workdir", min_width=280)
    metrics = gr.Dropdown([], multiselect=True, label="Curves", min_width=280)
  gr.Markdown(f"It looks for news every {SECONDS:g} seconds.")
  strips, charts, seen = gr.HTML(), gr.HTML(elem_classes="curves"), gr.State()
  given = {"inputs": [workdir, metrics, seen], "outputs": [strips, charts, seen], **QUIET}
  for event in (page.load, workdir.input):
    event(choose, workdir, metrics, **QUIET).then(update, **given)
  for event in (metrics.input, gr.Timer(SECONDS).tick):
    event(update, **given)
