"""Where a token is: the fixed embedding added to it, and the rotation of queries and keys.

Both are constants of the actual grid. Source: hustvl/LightningDiT models/pos_embed.py and
models/lightningdit.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Rope = tuple[np.ndarray, np.ndarray]


def position_embedding(height: int, width: int, dim: int) -> np.ndarray:
  """The fixed position embedding: the first half of the channels is the column, then the row.

  Args:
    height: rows of the token grid.
    width: columns of the token grid.
    dim: channels, a multiple of 4.

  Returns:
    [height * width, dim] float32; each half is sines, then cosines.
  """
  row_N, column_N = np.indices((height, width)).reshape(2, -1)
  frequencies = 1.0 / 10000.0 ** (np.arange(dim // 4) / (dim / 4))
  angles = [np.outer(position_N, frequencies) for position_N in (column_N, row_N)]
  parts = [part for angle in angles for part in (np.sin(angle), np.cos(angle))]
  return np.concatenate(parts, axis=1).astype(np.float32)


def rope_tables(height: int, width: int, head_size: int) -> Rope:
  """Cosine and sine of the angle by which RoPE turns each channel: first by row, then by column.

  Args:
    height: rows of the token grid.
    width: columns of the token grid.
    head_size: channels of a head, a multiple of 4.

  Returns:
    Two [height * width, head_size] float32 arrays; channels 2i and 2i+1 share an angle.
  """
  row_N, column_N = np.indices((height, width)).reshape(2, -1)
  pairs_per_axis = head_size // 4
  frequencies = 1.0 / 10000.0 ** (np.arange(pairs_per_axis) / pairs_per_axis)
  angles = [np.outer(position_N, frequencies) for position_N in (row_N, column_N)]
  angle_NE = np.concatenate(angles, axis=1).repeat(2, axis=1)
  return np.cos(angle_NE).astype(np.float32), np.sin(angle_NE).astype(np.float32)


def rotate(x_BKNE: jax.Array, rope: Rope) -> jax.Array:
  """Turns channels (2i, 2i+1) as points of a plane, with rolls: a stride would split TPU lanes."""
  cos_NE, sin_NE = rope
  is_first = np.arange(x_BKNE.shape[-1]) % 2 == 0
  turned_BKNE = jnp.where(is_first, -jnp.roll(x_BKNE, -1, axis=-1), jnp.roll(x_BKNE, 1, axis=-1))
  return x_BKNE * cos_NE + turned_BKNE * sin_NE
