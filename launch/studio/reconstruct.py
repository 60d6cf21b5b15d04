"""Reconstruct: a picture through the tokenizer, and what its latent looks like."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import gradio as gr
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from launch.studio.content import Studio
from launch.studio.parts import Controls, opened, tile, tiles, told
from vavae_jax.common.errors import InputError
from vavae_jax.data.images import to_float
from vavae_jax.metrics.pixels import psnr
from vavae_jax.teachers import load_teacher
from vavae_jax.tokenizer import Tokenizer

TEACHER = "efficientnet_lite0"
ENLARGED = 4  # times, of the difference


class Rebuilt(NamedTuple):
  """A picture and what a tokenizer makes of it, uint8 [H, W, 3]; the latent [h, w, 3]."""

  original: np.ndarray
  reconstruction: np.ndarray
  difference: np.ndarray  # grey where there is none
  latent: np.ndarray
  psnr: float  # decibels


def rebuild(tokenizer: Tokenizer, picture: Image.Image) -> Rebuilt:
  """A picture, whose sides the tokenizer's cells divide, encoded and decoded."""
  original = np.asarray(picture)
  z = tokenizer.encode(original)
  again = np.asarray(tokenizer.decode(z))
  error = again.astype(int) - original
  value = psnr(*(to_float(jnp.asarray(x)[None]) for x in (original, again)))
  difference = np.clip(128 + ENLARGED * error, 0, 255).astype(np.uint8)
  return Rebuilt(original, again, difference, pca_map(z), float(value[0]))


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


def teacher_map(picture: np.ndarray) -> np.ndarray | None:
  """`pca_map` of a teacher's features of a picture uint8 [H, W, 3]; None where it is missing."""
  run = _teacher()
  return pca_map(np.asarray(run(picture[None]))[0]) if run else None


@functools.cache
def _teacher() -> Any:
  try:
    graph, params = nnx.split(load_teacher(TEACHER))
  except InputError:
    return None  # the page says so
  return jax.jit(lambda image_BHWC: nnx.merge(graph, params)(to_float(image_BHWC)))


def show(studio: Studio, upload: Any) -> str:
  """The tab's pictures of an upload; InputError for a file that is no picture."""
  tokenizer = studio.model.tokenizer
  rebuilt = rebuild(tokenizer, opened(upload, tokenizer.image_size))
  height, width, channels = (*rebuilt.latent.shape[:2], tokenizer.channels)
  pieces = [
    tile(rebuilt.original, "Original"),
    tile(rebuilt.reconstruction, f"Reconstruction, PSNR {rebuilt.psnr:.2f} dB"),
    tile(rebuilt.difference, f"Difference, times {ENLARGED}"),
    tile(rebuilt.latent, f"Latent, {height} x {width} x {channels}, as colours", "cells"),
  ]
  note = "Maps show the first three principal components of their cells as red, green and blue."
  if (teacher := teacher_map(rebuilt.original)) is None:
    note += f" The teacher's stands beside them where {TEACHER} is installed."
  else:
    pieces.append(tile(teacher, "Features of EfficientNet-Lite0, as colours", "cells"))
  return tiles(pieces, note)


def build(studio: Studio, page: gr.Blocks, tab: gr.Tab, controls: Controls) -> None:
  """The tab."""
  size = studio.model.tokenizer.image_size
  with gr.Row():
    with gr.Column(scale=1, min_width=280):
      picture = gr.Image(label="Your picture", sources=["upload", "clipboard"], height=280)
      gr.Markdown(f"Its middle is brought to {size} x {size} pixels. It stays on this machine.")
    with gr.Column(scale=2, min_width=320):
      result = gr.HTML(tiles([], "Drop a picture, and see what the tokenizer keeps of it."))
  # As it was uploaded: our own reading names what is wrong with a file.
  picture.upload(
    told(lambda upload: show(studio, upload)), picture, result, preprocess=False
  )  # fmt: skip
