"""Latent space: a map of stored latents, any point of which can be decoded."""

from __future__ import annotations

import functools
from html import escape
from typing import NamedTuple

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from launch.evaluation.sample_files import class_name
from launch.evaluation.space import PERPLEXITY, tsne
from launch.report.charts import apart
from launch.studio.content import Studio
from launch.studio.parts import Controls, tile, tiles, told
from lightningdit_jax.pipeline import Pipeline
from lightningdit_jax.store.latents import LatentStore, normalise
from vavae_jax.common.errors import InputError

POINTS = 600  # of the map, which takes seconds
SIZE, THUMBNAIL, DOT = (960, 640), 44, 4  # pixels
NEAREST = 5
# Paul Tol's "muted", as in reports.
COLOURS = (
  *("#332288", "#cc6677", "#44aa99", "#999933", "#aa4499"),
  *("#117733", "#882255", "#ddcc77", "#88ccee"),
)


class Map(NamedTuple):
  """Some latents in the plane."""

  latents: np.ndarray  # as stored, float32 [n, h, w, Z]
  flat: np.ndarray  # normalised, in a row each, [n, h w Z]
  labels: np.ndarray  # [n]
  places: np.ndarray  # pixels (x, y) of the picture, [n, 2]


@functools.lru_cache(maxsize=1)
def map_of(store: LatentStore) -> Map:
  """`POINTS` latents of a store by t-SNE; InputError where there are too few."""
  if len(store) < NEAREST:
    raise InputError(f"{store.path} has {len(store)} latents; a map needs at least {NEAREST}.")
  chosen = np.sort(np.random.default_rng(0).permutation(len(store))[:POINTS])
  latents = np.empty((len(chosen), *store.shape), np.float32)
  store.read(chosen, np.zeros(len(chosen), bool), out=latents)
  flat = normalise(latents, store.mean, store.std).reshape(len(chosen), -1)
  plane = tsne(flat, seed=0, perplexity=min(PERPLEXITY, (len(flat) - 1) / 3))
  share = (plane - plane.min(0)) / np.maximum(np.ptp(plane, axis=0), 1e-9)
  edge = THUMBNAIL / 2 + 4
  return Map(latents, flat, store.labels_of(chosen), edge + share * (np.array(SIZE) - 2 * edge))


@functools.lru_cache(maxsize=1)
def draw(pipe: Pipeline, store: LatentStore) -> Image.Image:
  """The map: a point for each latent in the colour of its class, decoded where there is room."""
  found, canvas = map_of(store), Image.new("RGB", SIZE, "white")
  pen, colours = ImageDraw.Draw(canvas), [_colour(label) for label in found.labels]
  for (x, y), colour in zip(found.places, colours, strict=True):
    pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=colour)
  shown = apart(found.places, 1.15 * THUMBNAIL, 150)
  for i, picture in zip(shown, pipe.tokenizer.decode(found.latents[shown]), strict=True):
    x, y = np.round(found.places[i] - THUMBNAIL / 2).astype(int).tolist()
    pen.rectangle((x - 2, y - 2, x + THUMBNAIL + 1, y + THUMBNAIL + 1), colours[i])
    canvas.paste(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), (x, y))
  return canvas


def _colour(label: int) -> str:
  return COLOURS[label % len(COLOURS)]


def at(found: Map, x: float, y: float) -> np.ndarray:
  """The latent of a place of the map, [h, w, Z]: a mean of the three next ones by their distance.

  On a point it is that of the point.
  """
  distance = np.sum((found.places - [x, y]) ** 2, 1)
  near = np.argsort(distance)[:3]
  weight = 1 / np.maximum(distance[near], 1e-6)
  return np.tensordot(weight / weight.sum(), found.latents[near], 1).astype(np.float32)


def nearest(found: Map, latent: np.ndarray, store: LatentStore) -> np.ndarray:
  """The places in `found` of the latents that are nearest to a latent, the nearest first."""
  flat = normalise(latent, store.mean, store.std).ravel()
  return np.argsort(np.sum((found.flat - flat) ** 2, 1))[:NEAREST]


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab, whose map is drawn when it is opened."""
  pipe, store = studio.model, studio.store
  assert store is not None
  names = store.manifest.get("class_names", [])

  @told
  def picked(event: gr.SelectData) -> str:
    found = map_of(store)
    latent = at(found, *event.index)
    near = nearest(found, latent, store)
    first, *others = pipe.tokenizer.decode([latent, *found.latents[near]])
    captions = [class_name(label, names) for label in found.labels[near]]
    pieces = [tile(picture, text) for picture, text in zip(others, captions, strict=True)]
    note = "Beside it the training pictures whose latents are nearest, decoded too."
    return tiles([tile(first, "This place", "chosen"), *pieces], note)

  gr.Markdown("A point for each training picture; pictures of similar latents are near. Touch it.")
  canvas = gr.Image(
    interactive=False, show_label=False, format="png", buttons=["fullscreen"], elem_id="map"
  )  # fmt: skip
  items = [
    f'<li style="--c:{colour}">{escape(name)}</li>'
    for colour, name in zip(COLOURS, names, strict=False)
  ]
  gr.HTML(f'<ul class="legend">{"".join(items)}</ul>')
  result = gr.HTML(elem_id="picked")
  canvas.select(picked, None, result, show_progress="hidden")
  tab.select(told(lambda: draw(pipe, store)), None, canvas)
