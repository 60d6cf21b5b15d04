"""A token's position: the fixed embedding added to it, and the rotation of queries and keys.

Both are constants of the actual token grid, height x width. Source: hustvl/LightningDiT
models/pos_embed.py and models/lightningdit.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Rope = tuple[np.ndarray, np.ndarray]


def position_embedding(height: int, width: int, dim: int) -> np.ndarray:
  """The fixed embedding, float32 [height * width, dim]; dim is a multiple of 4.

  The first half of the channels is the column's, then the row's; each half is sines, then cosines.
  """
  row, column = _angles(height, width, dim // 4)
  parts = [part for angle in (column, row) for part in (np.sin(angle), np.cos(angle))]
  return np.concatenate(parts, axis=1).astype(np.float32)


def rope_tables(height: int, width: int, head_size: int) -> Rope:
  """Cosine and sine of RoPE's angles, float32 [height * width, head_size] each.

  The first half of the channels turns by the row, the second by the column; channels 2i and 2i+1
  share an angle, so head_size is a multiple of 4.
  """
  angle_NE = np.concatenate(_angles(height, width, head_size // 4), axis=1).repeat(2, axis=1)
  return np.cos(angle_NE).astype(np.float32), np.sin(angle_NE).astype(np.float32)


def _angles(height: int, width: int, count: int) -> list[np.ndarray]:
  """The angles of the row and of the column at each position: two of [height * width, count]."""
  frequencies = 1.0 / 10000.0 ** (np.arange(count) / count)
  places = np.indices((height, width)).reshape(2, -1)
  return [np.outer(place_N, frequencies) for place_N in places]


def rotate(x_BKNE: jax.Array, rope: Rope) -> jax.Array:
  """Turns channels (2i, 2i+1) as points of a plane, with rolls: a stride would split TPU lanes."""
  cos_NE, sin_NE = rope
  is_first = np.arange(x_BKNE.shape[-1]) % 2 == 0
  turned_BKNE = jnp.where(is_first, -jnp.roll(x_BKNE, -1, axis=-1), jnp.roll(x_BKNE, 1, axis=-1))
  return x_BKNE * cos_NE + turned_BKNE * sin_NE
