"""Energy distance and nearest neighbours: how two sets differ beyond mean and covariance.

Source: Szekely and Rizzo, Energy statistics; Lopez-Paz and Oquab, Revisiting classifier two-sample
tests.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_BLOCK = 1024  # rows whose distances are in memory at once


def energy_distance(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
  """2 E|a - b| - E|a - a'| - E|b - b'|, without bias: about 0 for sets of one distribution.

  N and M are at least 2; ValueError otherwise.
  """
  if min(len(a_NF), len(b_MF)) < 2:
    raise ValueError(f"Got {len(a_NF)} and {len(b_MF)} vectors, need 2 of each.")
  between = _sum(a_NF, b_MF) / (len(a_NF) * len(b_MF))
  within = sum(_sum(x, x) / (len(x) * (len(x) - 1)) for x in (a_NF, b_MF))
  return 2 * between - within


def told_apart(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
  """Share of vectors whose nearest other vector is of their own set.

  0.5 where the sets have one distribution, 1 where they are apart, below 0.5 where one copies the
  other. ValueError unless the sets are equally large: the share depends on their sizes.
  """
  if len(a_NF) != len(b_NF) or len(a_NF) < 2:
    raise ValueError(f"Got {len(a_NF)} and {len(b_NF)} vectors, need as many of each.")
  both, own = np.concatenate([a_NF, b_NF]), 0
  for start, distances in _distances(both, both):
    rows = np.arange(len(distances))
    distances[rows, start + rows] = np.inf
    own += ((distances.argmin(1) < len(a_NF)) == (start + rows < len(a_NF))).sum()
  return float(own) / len(both)


def _sum(a_NF: np.ndarray, b_MF: np.ndarray) -> float:
  return float(sum(distances.sum() for _, distances in _distances(a_NF, b_MF)))


def _distances(a_NF: np.ndarray, b_MF: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
  """(Index of the first row, Euclidean distances of some rows of a from all of b), in turn."""
  a, b = np.asarray(a_NF, np.float64), np.asarray(b_MF, np.float64)
  squared = np.square(b).sum(1)
  for start in range(0, len(a), _BLOCK):
    rows = a[start : start + _BLOCK]
    square = np.square(rows).sum(1)[:, None] + squared - 2 * rows @ b.T
    yield start, np.sqrt(np.maximum(square, 0))
