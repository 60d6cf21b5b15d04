"""A token's position: the fixed embedding added to it, and the rotation of queries and keys.

Both are constants of the actual token grid, height x width. Source: hustvl/LightningDiT
models/pos_embed.py and models/lightningdit.py.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vavae_jax.common.sharding import platform

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
  """Turns channels (2i, 2i+1) as points of a plane.

  The partner of a channel comes by rolls, as a stride would split a CPU's vectors. TPUs, whose
  lanes a roll moves as slowly, multiply with a signed permutation: each result is one input times 1
  or -1 and so exact, in bfloat16 as in float32.
  """
  cos_NE, sin_NE = rope
  if platform() == "tpu":
    matrix_EE = jnp.asarray(quarter_turn(x_BKNE.shape[-1]), x_BKNE.dtype)
    turned_BKNE = jnp.matmul(x_BKNE, matrix_EE, precision=jax.lax.Precision.HIGHEST)
  else:
    is_first = np.arange(x_BKNE.shape[-1]) % 2 == 0
    turned_BKNE = jnp.where(is_first, -jnp.roll(x_BKNE, -1, axis=-1), jnp.roll(x_BKNE, 1, axis=-1))
  return x_BKNE * cos_NE + turned_BKNE * sin_NE


def quarter_turn(head_size: int) -> np.ndarray:
  """P, float32 [head_size, head_size]: x P has -x[2i+1] in channel 2i, and x[2i] in 2i+1."""
  return np.kron(np.eye(head_size // 2), [[0, 1], [-1, 0]]).astype(np.float32)
