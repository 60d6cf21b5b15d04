"""Compare: two models, or two averages of one, on the same noise."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from launch.studio.content import Studio, settings
from launch.studio.parts import Controls, tile, told
from lightningdit_jax.pipeline import Pipeline
from vavae_jax.common.errors import InputError

AVERAGE = "Decay of its average; empty: the first one, 0: none."


@functools.lru_cache(maxsize=2)
def load(source: str, ema: float | None) -> Pipeline:
  """A model, which stays in memory; errors as of `Pipeline.load`."""
  return Pipeline.load(source, ema=ema)


def compare(
  first: Pipeline, second: Pipeline, labels: Sequence[int], seed: int, **changes: Any
) -> tuple[list[Image.Image], list[Image.Image]]:
  """Samples of both models, which begin with the same noise.

  InputError where their latents are of other shapes, or one lacks a class of the other.
  """
  noise = first.noise(seed, len(labels))
  other = second.noise(seed, len(labels))
  if other.shape != noise.shape:
    raise InputError(
      f"The latents of the two models are {noise.shape[1:]} and {other.shape[1:]}; the same noise "
      "needs one shape."
    )
  given = {"noise": noise, "seed": seed, "batch_size": len(labels), "progress": False, **changes}
  return first.sample(labels, **given), second.sample(labels, **given)


def show(
  above: Sequence[Image.Image], below: Sequence[Image.Image], captions: Sequence[str]
) -> str:
  """The samples of both, those of the same noise one above the other."""
  pairs = [
    f'<div class="pair">{tile(a)}{tile(b, text)}</div>'
    for a, b, text in zip(above, below, captions, strict=True)
  ]
  a, b = (np.stack([np.asarray(x, int) for x in row]) for row in (above, below))
  apart = np.abs(a - b).mean()
  note = f"Above this model, below the other. They differ by {apart:.1f} of 255 on average."
  return f'<div class="tiles">{"".join(pairs)}</div><p class="note">{note}</p>'


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""
  names = studio.classes()
  with gr.Row():
    with gr.Column(scale=1, min_width=280):
      second = gr.Textbox(
        studio.second or studio.source, label="The other model",
        info="A model folder, a workdir, or USER/NAME; --model2 gives one at the start.",
        interactive=studio.is_local,
      )  # fmt: skip
      average = gr.Textbox(label="Its average", info=AVERAGE)
      button = gr.Button("Draw both", variant="primary")
      gr.Markdown("Classes, seed and settings are those of the tab Generate.")
    with gr.Column(scale=2, min_width=320):
      result = gr.HTML(elem_id="compared")

  def run(source: str, ema: str, classes: list[str], *rest: Any) -> str:
    *controls, seed = rest
    if not studio.is_local:
      source = studio.second or studio.source
    try:
      decay = float(ema) if ema.strip() else None
    except ValueError as error:
      raise InputError(f"The average is {ema!r}; give its decay, such as 0.9999.") from error
    labels = studio.labels(classes)
    both = compare(studio.model, load(source, decay), labels, seed, **settings(*controls))
    return show(*both, [names[label] for label in labels])

  button.click(told(run), [second, average, *controls], result, show_progress="minimal")
