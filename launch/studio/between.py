"""Between: the way from one noise to another, or from one picture to another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from launch.evaluation.sample_files import contact_sheet
from launch.studio.content import Studio, settings
from launch.studio.parts import QUIET, WAITING, Controls, opened, sides, tile, tiles, told, uri
from lightningdit_jax.pipeline import Pipeline
from vavae_jax.common.keys import LAST_SEED

_SMALLEST = 256  # pixels of the animation
_MILLISECONDS = 120  # of one picture


def spherical(a: np.ndarray, b: np.ndarray, places: np.ndarray) -> np.ndarray:
  """Points [N, ...] of the arc from a, at the place 0, to b, at 1, of lengths from |a| to |b|."""
  lengths = [float(np.linalg.norm(x)) or 1.0 for x in (a, b)]
  first, last = (x / length for x, length in zip((a, b), lengths, strict=True))
  angle = np.arccos(np.clip(np.sum(first * last), -1, 1))
  t = np.reshape(places, (-1, *[1] * a.ndim))
  if np.sin(angle) < 1e-6:  # no arc
    return ((1 - t) * a + t * b).astype(np.float32)
  way = (np.sin((1 - t) * angle) * first + np.sin(t * angle) * last) / np.sin(angle)
  return (way * ((1 - t) * lengths[0] + t * lengths[1])).astype(np.float32)


def seeds(
  pipe: Pipeline, label: int, first: int, last: int, count: int, **changes: Any
) -> list[Image.Image]:
  """Samples of a class on the way from the noise of one seed to that of another."""
  # As many as all tabs draw, so that nothing else is compiled.
  a, b = (pipe.noise(seed, count)[0] for seed in (first, last))
  return _drawn(pipe, label, spherical(a, b, np.linspace(0, 1, count)), **changes)


def on_the_way(
  pipe: Pipeline, label: int, first: int, last: int, place: float, count: int, **changes: Any
) -> list[Image.Image]:
  """Samples of a class from all noises of one seed, at a place of their ways to another's."""
  ends = [pipe.noise(seed, count) for seed in (first, last)]
  at = np.array([place])
  noise = np.concatenate([spherical(a, b, at) for a, b in zip(*ends, strict=True)])
  return _drawn(pipe, label, noise, **changes)


def _drawn(pipe: Pipeline, label: int, noise: np.ndarray, **changes: Any) -> list[Image.Image]:
  given = {"noise": noise, "batch_size": len(noise), "progress": False, **changes}
  return pipe.sample([label], num=len(noise), **given)


def show(way: Sequence[Image.Image]) -> str:
  """The way as an animation, there and back for ever, and a strip; links that save them."""
  size = [x * -(-_SMALLEST // max(way[0].size)) for x in way[0].size]
  first, *rest = [x.resize(size, Image.Resampling.BICUBIC) for x in [*way, *way[-2:0:-1]]]
  options = {"save_all": True, "append_images": rest, "duration": _MILLISECONDS, "loop": 0}
  moving = uri(first, "WEBP", **options)
  strip = uri(contact_sheet(np.stack([np.asarray(x) for x in way]), len(way)))
  return (
    f'<div class="way"><img src="{moving}" alt="The way, there and back"></div><p>'
    f'<a class="save" download="between.webp" href="{moving}">Save the animation</a>'
    f'<a class="save" download="between.png" href="{strip}">Save the strip</a></p>'
    f"{tiles(tile(x) for x in way)}"
  )


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""
  pipe, names = studio.model, studio.classes

  @told
  def of_seeds(name: str, first: int, last: int, *controls: Any) -> str:
    label = names.index(name)
    return show(seeds(pipe, label, first, last, studio.num, **settings(*controls)))

  @told
  def of_place(place: float, name: str, first: int, last: int, *controls: Any) -> str:
    chosen = (names.index(name), first, last, place, studio.num)
    return tiles(tile(x) for x in on_the_way(pipe, *chosen, **settings(*controls)))

  @told
  def of_pictures(*ends: Any) -> str | dict[str, Any]:
    if not all(ends):
      return gr.skip()
    first, last = pipe.tokenizer.encode([opened(x, pipe.tokenizer.image_size) for x in ends])
    return show(pipe.tokenizer.decode(spherical(first, last, np.linspace(0, 1, studio.num))))

  asked, shown = sides()
  with asked, gr.Tabs():
    with gr.Tab("Two seeds"):
      label = gr.Dropdown(names, value=names[0], label="Class")
      seed: dict[str, Any] = {"precision": 0, "minimum": 0, "maximum": LAST_SEED, "min_width": 100}
      with gr.Row():
        given = [label, gr.Number(1, label="From seed", **seed)]
        given += [gr.Number(2, label="To seed", **seed), *controls[1:-1]]
      draw = gr.Button("Draw the way", variant="primary")
      # A flow map draws as fast as somebody drags.
      live = bool(pipe.config.model.dmf_depth)
      place = gr.Slider(0, 1, 0, step=0.02, label="Or go along it", visible=live)
      gr.Markdown("Guidance, solver and steps are those of the tab Generate.")
    with gr.Tab("Two pictures"):
      sources: dict[str, Any] = {"sources": ["upload", "clipboard"], "height": 200}
      ends = [gr.Image(label=text, **sources) for text in ("From", "To")]
  with shown:
    result = gr.HTML(tiles([], "Draw the way from one seed to another, or drop two pictures."))
  draw.click(of_seeds, given, result, **WAITING)
  place.input(of_place, [place, *given], result, **QUIET)
  for picture in ends:
    picture.upload(of_pictures, ends, result, preprocess=False, **WAITING)
