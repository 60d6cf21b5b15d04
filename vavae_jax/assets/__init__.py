"""The embedded images: 1,852 emoji of 64 x 64 pixels on white, in nine groups.

They let the whole pipeline train, sample and be tested where no data set is at hand. All tiles lie
in one lossless picture, so that the package holds two files instead of thousands; `build.py` beside
this file rebuilds both.

Source: Fluent Emoji (Microsoft, MIT) from @lobehub/fluent-emoji-3d 1.1.0 (LobeHub, MIT), names and
groups from emoji-datasource-google 16.0.0 (Cal Henderson, MIT).
"""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
from PIL import Image


def load_emoji() -> tuple[np.ndarray, np.ndarray, list[str], list[str]]:
  """Images [1852,64,64,3] uint8 in the standard order of emoji; labels [1852] int32 in 0..8;
  the name of each image; the names of the nine classes.
  """
  folder = resources.files(__name__)
  description = json.loads(folder.joinpath("emoji.json").read_text(encoding="utf-8"))
  with folder.joinpath("emoji.webp").open("rb") as file:
    atlas = np.asarray(Image.open(file).convert("RGB"))
  tile, columns, tiles = description["tile"], description["columns"], description["tiles"]
  rows = -(-len(tiles) // columns)
  if atlas.shape != (rows * tile, columns * tile, 3):
    raise ValueError(
      f"emoji.webp is {atlas.shape[1]} x {atlas.shape[0]} pixels, emoji.json describes "
      f"{columns * tile} x {rows * tile}: rebuild both with vavae_jax.assets.build."
    )
  grid = atlas.reshape(rows, tile, columns, tile, 3).swapaxes(1, 2)
  images = grid.reshape(-1, tile, tile, 3)[: len(tiles)]
  _, names, labels = zip(*tiles, strict=True)
  return images, np.asarray(labels, np.int32), list(names), description["class_names"]
