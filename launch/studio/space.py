"""Latent space: a map of stored latents, any point of which can be decoded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from html import escape

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from launch.evaluation.space import PERPLEXITY, tsne
from launch.report.charts import apart
from launch.studio.content import Studio
from launch.studio.parts import Controls, tile, tiles, told
from lightningdit_jax.pipeline import Pipeline
from lightningdit_jax.store.latents import LatentStore, normalise
from vavae_jax.common.errors import InputError

POINTS = 600  # of the map, which takes seconds
SIZE, THUMBNAIL, DOT = (960, 640), 44, 4  # pixels
NEAREST = 6
# Paul Tol's "muted", as in reports.
COLOURS = (
  *("#332288", "#cc6677", "#44aa99", "#999933", "#aa4499"),
  *("#117733", "#882255", "#ddcc77", "#88ccee"),
)


@dataclasses.dataclass(frozen=True)
class Map:
  """Some latents in the plane.

  Attributes:
    latents: as stored, float32 [n, h, w, Z].
    flat: normalised, in a row each, [n, h w Z].
    labels: [n].
    places: pixels (x, y) of the picture, [n, 2].
  """

  latents: np.ndarray
  flat: np.ndarray
  labels: np.ndarray
  places: np.ndarray


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
  low, high = plane.min(0), plane.max(0)
  share = (plane - low) / np.maximum(high - low, 1e-9)
  edge = THUMBNAIL / 2 + 4
  places = edge + share * (np.array(SIZE) - 2 * edge)
  return Map(latents, flat, store.labels_of(chosen), places)


def draw(found: Map, decode: Callable[[np.ndarray], list[Image.Image]]) -> Image.Image:
  """The map: a point for each latent in the colour of its class, decoded where there is room."""
  canvas = Image.new("RGB", SIZE, "white")
  pen = ImageDraw.Draw(canvas)
  for (x, y), label in zip(found.places, found.labels, strict=True):
    pen.ellipse((x - DOT, y - DOT, x + DOT, y + DOT), fill=_colour(label))
  shown = apart(found.places, 1.15 * THUMBNAIL, 150)
  for place, picture in zip(shown, decode(found.latents[shown]), strict=True):
    corner = np.round(found.places[place] - THUMBNAIL / 2).astype(int)
    x, y = corner.tolist()
    frame = (x - 2, y - 2, x + THUMBNAIL + 1, y + THUMBNAIL + 1)
    pen.rectangle(frame, _colour(found.labels[place]))
    canvas.paste(picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS), (x, y))
  return canvas


@functools.lru_cache(maxsize=1)
def drawn(pipe: Pipeline, store: LatentStore) -> Image.Image:
  """The map of a store."""
  return draw(map_of(store), pipe.tokenizer.decode)


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


def pick(pipe: Pipeline, store: LatentStore, x: float, y: float) -> str:
  """What a place of the map decodes to, and the training pictures that are nearest to it."""
  found = map_of(store)
  latent = at(found, x, y)
  near = nearest(found, latent, store)
  names = store.manifest.get("class_names", [])
  captions = [names[i] if i < len(names) else str(i) for i in found.labels[near]]
  first, *others = pipe.tokenizer.decode([latent, *found.latents[near]])
  pieces = [tile(first, "This place", "chosen")]
  pieces += [tile(picture, text) for picture, text in zip(others, captions, strict=True)]
  return tiles(pieces, "Beside it the training pictures whose latents are nearest, decoded too.")


def legend(store: LatentStore) -> str:
  """The colours of the classes."""
  names = store.manifest.get("class_names", [])[: len(COLOURS)]
  items = (f'<li style="--c:{_colour(i)}">{escape(name)}</li>' for i, name in enumerate(names))
  return f'<ul class="legend">{"".join(items)}</ul>'


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab, whose map is drawn when it is opened."""
  store = studio.store
  assert store is not None
  gr.Markdown("A point for each training picture; pictures of similar latents are near. Touch it.")
  canvas = gr.Image(
    interactive=False, show_label=False, format="png", buttons=["fullscreen"], elem_id="map"
  )  # fmt: skip
  gr.HTML(legend(store))
  result = gr.HTML(elem_id="picked")

  def picked(event: gr.SelectData) -> str:
    return pick(studio.model, store, *event.index)

  canvas.select(told(picked), None, result, show_progress="hidden")
  tab.select(told(lambda: drawn(studio.model, store)), None, canvas)
