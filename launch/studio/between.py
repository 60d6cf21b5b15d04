"""Between: the way from one noise to another, or from one picture to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from launch.evaluation.sample_files import contact_sheet
from launch.studio.content import Studio, settings
from launch.studio.parts import (
  QUIET,
  Controls,
  animation,
  opened,
  png,
  saved,
  tile,
  tiles,
  told,
  uri,
)
from lightningdit_jax.pipeline import Pipeline
from vavae_jax.common.keys import LAST_SEED
from vavae_jax.tokenizer import Tokenizer


def spherical(a: np.ndarray, b: np.ndarray, count: int) -> np.ndarray:
  """Points [count, ...] from one array to another along an arc, their lengths from |a| to |b|."""
  lengths = [float(np.linalg.norm(x)) or 1.0 for x in (a, b)]
  first, last = (x / length for x, length in zip((a, b), lengths, strict=True))
  angle = np.arccos(np.clip(np.sum(first * last), -1, 1))
  shape = (count, *[1] * a.ndim)
  t = np.linspace(0, 1, count).reshape(shape)
  if np.sin(angle) < 1e-6:  # no arc
    return ((1 - t) * a + t * b).astype(np.float32)
  way = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * last) / np.sin(angle)
  return (way * ((1 - t) * lengths[0] + t * lengths[1])).astype(np.float32)


def seeds(
  pipe: Pipeline, label: int, first: int, last: int, count: int, **changes: Any
) -> list[Image.Image]:
  """Samples of a class on the way from the noise of one seed to that of another."""
  ends = [pipe.noise(seed, count)[0] for seed in (first, last)]
  noise = spherical(ends[0], ends[1], count)
  given = {"noise": noise, "batch_size": count, "progress": False, **changes}
  return pipe.sample([label], num=count, **given)


def pictures(
  tokenizer: Tokenizer, first: Image.Image, last: Image.Image, count: int
) -> list[Image.Image]:
  """What latents on the way between those of two pictures of one size decode to."""
  start, end = tokenizer.encode([first, last])
  return tokenizer.decode(spherical(start, end, count))


def show(way: Sequence[Image.Image]) -> str:
  """The way as an animation and a strip, and links that save them."""
  moving = animation(way)
  strip = contact_sheet(np.stack([np.asarray(x) for x in way]), len(way))
  links = [
    saved("between.webp", moving, "Save the animation"),
    saved("between.png", png(strip), "Save the strip"),
  ]
  player = f'<div class="way"><img src="{uri(moving, "webp")}" alt="The way, there and back"></div>'
  return f"{player}<p>{' '.join(links)}</p>{tiles(tile(x) for x in way)}"


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""
  pipe, names = studio.model, studio.classes()
  size = pipe.tokenizer.image_size

  def of_seeds(name: str, first: int, last: int, *controls: Any) -> str:
    way = seeds(pipe, names.index(name), first, last, studio.num, **settings(*controls))
    return show(way)

  def of_pictures(first: Any, last: Any) -> str | dict[str, Any]:
    if not first or not last:
      return gr.skip()
    way = pictures(pipe.tokenizer, opened(first, size), opened(last, size), studio.num)
    return show(way)

  with gr.Row():
    with gr.Column(scale=1, min_width=280), gr.Tabs():
      with gr.Tab("Two seeds"):
        label = gr.Dropdown(names, value=names[0], label="Class")
        with gr.Row():
          first = gr.Number(1, label="From seed", precision=0, minimum=0, maximum=LAST_SEED)
          last = gr.Number(2, label="To seed", precision=0, minimum=0, maximum=LAST_SEED)
        draw = gr.Button("Draw the way", variant="primary")
        gr.Markdown("Guidance, solver and steps are those of the tab Generate.")
      with gr.Tab("Two pictures"):
        sources: dict[str, Any] = {"sources": ["upload", "clipboard"], "height": 200}
        ends = [gr.Image(label=text, **sources) for text in ("From", "To")]
    with gr.Column(scale=2, min_width=320):
      result = gr.HTML(tiles([], "Draw the way from one seed to another, or drop two pictures."))
  draw.click(told(of_seeds), [label, first, last, *controls[1:-1]], result, **QUIET)
  for picture in ends:
    picture.upload(told(of_pictures), ends, result, preprocess=False, **QUIET)
