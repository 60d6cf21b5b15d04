"""Compare: two models, or two averages of one, on the same noise."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from launch.studio import content
from launch.studio.content import Studio, settings
from launch.studio.parts import WAITING, Controls, sides, tile, tiles, told
from lightningdit_jax.pipeline import Pipeline
from vavae_jax.common.errors import InputError

load = functools.lru_cache(maxsize=2)(content.load)  # a model stays in memory


def compare(
  first: Pipeline, second: Pipeline, labels: Sequence[int], seed: int, **changes: Any
) -> list[list[Image.Image]]:
  """Samples of both models, which begin with the same noise.

  `labels` are of the first; the second has the classes of the same names where both have names.
  InputError where their latents are of other shapes, or the second lacks a class.
  """
  noises = [model.noise(seed, len(labels)) for model in (first, second)]
  if len({noise.shape for noise in noises}) > 1:
    raise InputError(
      "The latents of the two models are {} and {}; the same noise needs one shape.".format(
        *(noise.shape[1:] for noise in noises)
      )
    )
  classes: Sequence[str | int] = labels
  if first.class_names and second.class_names:
    classes = [first.class_names[label] for label in labels]
    if lacking := [name for name in classes if name not in second.class_names]:
      raise InputError(f"The other model has no class {lacking[0]!r}; choose classes of both.")
  given = {"seed": seed, "batch_size": len(labels), "progress": False, **changes}
  return [model.sample(classes, noise=noises[0], **given) for model in (first, second)]


def other(studio: Studio, source: str, ema: float | None) -> Pipeline:
  """The second model, or another average of the page's own."""
  tokenizer = studio.tokenizer if source == studio.source else ""
  return load(source, tokenizer=tokenizer, ema=ema)


def show(both: Sequence[Sequence[Image.Image]], captions: Sequence[str]) -> str:
  """The samples of both, those of the same noise one above the other."""
  first, second = (np.stack([np.asarray(x, int) for x in row]) for row in both)
  note = "Above this model, below the other. They differ by {:.1f} of 255 on average."
  pairs = (
    f'<div class="pair">{tile(above)}{tile(below, text)}</div>'
    for above, below, text in zip(*both, captions, strict=True)
  )
  return tiles(pairs, note.format(np.abs(first - second).mean()))


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""
  own = studio.second or studio.source

  @told
  def run(source: str, average: str, classes: list[str], *rest: Any) -> str:
    *controls, seed = rest
    try:
      ema = float(average) if average.strip() else None
    except ValueError as error:
      raise InputError(f"The average is {average!r}; give its decay, such as 0.9999.") from error
    labels = studio.labels(classes)
    second = other(studio, source if studio.is_local else own, ema)
    both = compare(studio.model, second, labels, seed, **settings(*controls))
    return show(both, [studio.classes[label] for label in labels])

  asked, shown = sides()
  with asked:
    info = "A model folder, a workdir, or USER/NAME; --model2 gives one at the start."
    local = studio.is_local
    second = gr.Textbox(own, label="The other model", info=info, interactive=local)
    info = "Decay of its average; empty: the first one, 0: none."
    average = gr.Textbox(label="Its average", info=info)
    button = gr.Button("Draw both", variant="primary")
    gr.Markdown("Classes, seed and settings are those of the tab Generate.")
  with shown:
    hint = "Draw the same noise with both models."
    result = gr.HTML(tiles([], hint), elem_id="compared")
  button.click(run, [second, average, *controls], result, **WAITING)
