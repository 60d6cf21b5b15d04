"""How evenly points lie in the plane: the paper's figures of a latent space after t-SNE.

Source: table 6 of arXiv 2501.01423; `tools/latent_vis.py` of hustvl/LightningDiT.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Uniformity(NamedTuple):
  """Figures of the densities at some points; evenly spread points have 0, 0 and 1."""

  density_cv: float  # standard deviation of the densities over their mean
  gini: float  # their Gini coefficient
  normalized_entropy: float  # entropy of the densities as shares of their sum, over its maximum


def density(points_N2: np.ndarray) -> np.ndarray:
  """A Gaussian kernel estimate, bandwidth by Scott's rule, at the points themselves [N].

  ValueError for fewer than three points, or points not [N,2], not finite, or all on one line.
  """
  points_N2 = np.asarray(points_N2, np.float64)
  if points_N2.ndim != 2 or points_N2.shape[1] != 2 or len(points_N2) < 3:
    raise ValueError(f"Got points of shape {points_N2.shape}, need [N,2] with N of at least 3.")
  if not np.isfinite(points_N2).all() or np.linalg.matrix_rank(points_N2 - points_N2[0]) < 2:
    raise ValueError("The points are not finite, or lie on a line: they have no density.")
  from scipy.stats import gaussian_kde  # which takes a second to import

  return gaussian_kde(points_N2.T)(points_N2.T)


def uniformity(density_N: np.ndarray) -> Uniformity:
  """The three figures of densities [N], positive, from `density`."""
  ascending_N = np.sort(np.asarray(density_N, np.float64))
  count, total = len(ascending_N), ascending_N.sum()
  share_N = ascending_N / total
  entropy = -(share_N * np.log(share_N + 1e-10)).sum()  # as the reference guards its logarithm
  rank_N = 2 * np.arange(1, count + 1) - count - 1
  return Uniformity(
    density_cv=float(ascending_N.std() / ascending_N.mean()),
    gini=float((rank_N * ascending_N).sum() / (count * total)),
    normalized_entropy=float(entropy / np.log(count)),
  )
