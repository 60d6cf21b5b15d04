"""Reconstruct: a picture through the tokenizer, and what its latent looks like."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr
import jax
import numpy as np
from flax import nnx

from launch.studio.content import Studio
from launch.studio.parts import WAITING, Controls, opened, sides, tile, tiles, told
from vavae_jax.common.errors import InputError
from vavae_jax.data.images import to_float
from vavae_jax.metrics.pixels import psnr
from vavae_jax.teachers import load_teacher
from vavae_jax.tokenizer import Tokenizer

TEACHER = "efficientnet_lite0"
ENLARGED = 4  # times, of the difference


def pca_map(features_hwF: np.ndarray) -> np.ndarray:
  """The first three principal components of the cells of a map as colours, uint8 [h, w, 3]."""
  height, width, size = features_hwF.shape
  cells = features_hwF.reshape(-1, size).astype(np.float64)
  cells -= cells.mean(0)
  _, _, axes = np.linalg.svd(cells, full_matrices=False)
  axes = axes[:3] * np.sign(axes[:3].sum(1, keepdims=True) + 1e-12)  # else the sign is arbitrary
  found = np.zeros((len(cells), 3))
  found[:, : len(axes)] = cells @ axes.T
  low, high = np.percentile(found, [2, 98], axis=0)
  colours = (found - low) / np.maximum(high - low, 1e-12)
  return np.clip(255 * colours, 0, 255).astype(np.uint8).reshape(height, width, 3)


@functools.cache
def _teacher() -> Any:
  """A function from pictures in [-1, 1] to features; None where the teacher is not installed."""
  try:
    graph, params = nnx.split(load_teacher(TEACHER))
  except InputError:
    return None  # the page says so
  return jax.jit(lambda image_BHWC: nnx.merge(graph, params)(image_BHWC))


def show(tokenizer: Tokenizer, upload: dict[str, Any]) -> str:
  """The tab's pictures of an upload; InputError for a file that is no picture."""
  original = np.asarray(opened(upload, tokenizer.image_size))
  z_hwZ = tokenizer.encode(original)
  again = np.asarray(tokenizer.decode(z_hwZ))
  error = np.clip(128 + ENLARGED * (again.astype(int) - original), 0, 255).astype(np.uint8)
  first, second = (to_float(jax.numpy.asarray(x)[None]) for x in (original, again))
  pieces = [
    tile(original, "Original"),
    tile(again, f"Reconstruction, PSNR {psnr(first, second)[0]:.2f} dB"),
    tile(error, f"Difference, times {ENLARGED}; grey: none"),
    tile(pca_map(z_hwZ), "Latent, {} x {} x {}, as colours".format(*z_hwZ.shape), "cells"),
  ]
  note = "Maps show the first three principal components of their cells as red, green and blue."
  if run := _teacher():
    features = pca_map(np.asarray(run(first))[0])
    pieces.append(tile(features, "Features of EfficientNet-Lite0, as colours", "cells"))
  else:
    note += f" The teacher's stands beside them where {TEACHER} is installed."
  return tiles(pieces, note, "large")


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""
  tokenizer = studio.model.tokenizer
  asked, shown = sides()
  with asked:
    picture = gr.Image(label="Your picture", sources=["upload", "clipboard"], height=280)
    size = tokenizer.image_size
    gr.Markdown(f"Its middle is brought to {size} x {size} pixels. It stays on this machine.")
  with shown:
    result = gr.HTML(tiles([], "Drop a picture, and see what the tokenizer keeps of it."))
  # As it was uploaded: our own reading names what is wrong with a file.
  rebuild = told(lambda upload: show(tokenizer, upload))
  event = picture.upload(rebuild, picture, result, preprocess=False, **WAITING)
  event.failure(lambda: None, None, picture)  # room for another
