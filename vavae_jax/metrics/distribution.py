"""Distances between sets of features: Frechet distance, Inception score, precision and recall.

Notable: float64 NumPy on the host, because these numbers are differences of large sums. Features
stream through `Moments`, so 50,000 images need F x F numbers and not N x F. The Frechet distance
takes the trace of the matrix root from symmetric eigenvalues: `scipy.linalg.sqrtm` returns NaN or
complex values on some BLAS builds, and silently dropping their imaginary part changes the score.

Source: Heusel et al. 2017 (FID), Salimans et al. 2016 (Inception score), Kynkaanniemi et al. 2019
(precision, recall), as guided-diffusion's evaluator computes them; the reference case `metrics`.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

# Covariances are positive semi-definite up to rounding; float32 files of them are so up to 1e-7.
_NEGATIVE_TOLERANCE = 1e-6


class PrecisionRecall(NamedTuple):
  """Share of samples inside the reference manifold, share of references inside the samples'."""

  precision: float
  recall: float


@dataclasses.dataclass
class Moments:
  """Mean and covariance of features that arrive in batches, in float64.

  Chan's pairwise update keeps deviations from the running mean, so a mean that is large against
  the spread costs no digits. Parts computed on several hosts are joined by `merge`.

  Attributes:
    count: number of features seen.
    mean: their mean [F], float64; empty before the first update.
    scatter: sum of the outer products of the deviations from the mean [F,F], float64.
  """

  count: int = 0
  mean: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
  scatter: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

  def update(self, features_NF: np.ndarray) -> None:
    """Adds a batch.

    Args:
      features_NF: features [N,F], any float dtype; N may be zero and may change between calls.

    Raises:
      ValueError: if the features are not [N,F], F changes or a value is not finite.
    """
    features_NF = _checked_features("features", features_NF)
    if len(features_NF) == 0:
      return
    mean_F = features_NF.mean(axis=0)
    deviation_NF = features_NF - mean_F
    self.merge(Moments(len(features_NF), mean_F, deviation_NF.T @ deviation_NF))

  def merge(self, other: Moments) -> None:
    """Adds all features that `other` has seen.

    Args:
      other: moments of features of the same size.

    Raises:
      ValueError: if the feature sizes differ.
    """
    if other.count == 0:
      return
    if self.count == 0:
      self.count, self.mean, self.scatter = other.count, other.mean, other.scatter
      return
    if self.mean.shape != other.mean.shape:
      raise ValueError(
        f"Got features of size {other.mean.size} after features of size {self.mean.size}: use one "
        "Moments per feature network."
      )
    count = self.count + other.count
    shift_F = other.mean - self.mean
    self.mean = self.mean + shift_F * (other.count / count)
    self.scatter = self.scatter + other.scatter
    self.scatter += np.outer(shift_F, shift_F) * (self.count * other.count / count)
    self.count = count

  @property
  def cov(self) -> np.ndarray:
    """Unbiased covariance [F,F], float64; ValueError before two features were seen."""
    if self.count < 2:
      raise ValueError(f"Got {self.count} features, a covariance needs at least 2: add more.")
    return self.scatter / (self.count - 1)


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
  """Squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

  Args:
    mu1: mean [F] of the first set.
    cov1: unbiased covariance [F,F] of the first set.
    mu2: mean [F] of the second set.
    cov2: unbiased covariance [F,F] of the second set.

  Returns:
    The distance; lower is better. Equal inputs give zero up to rounding, of either sign.

  Raises:
    ValueError: if shapes do not fit, a value is not finite, or a covariance is asymmetric or has
      an eigenvalue below zero by more than rounding.

  Source: Heusel et al. 2017, equation 6.
  """
  mu1, mu2, cov1, cov2 = (np.asarray(x, np.float64) for x in (mu1, mu2, cov1, cov2))
  size = mu1.size
  if mu1.shape != (size,) or mu2.shape != (size,) or {cov1.shape, cov2.shape} != {(size, size)}:
    raise ValueError(
      f"Got means {mu1.shape}, {mu2.shape} and covariances {cov1.shape}, {cov2.shape}, need [F], "
      "[F], [F,F], [F,F]: compare features of the same network."
    )
  for name, array in {"mu1": mu1, "cov1": cov1, "mu2": mu2, "cov2": cov2}.items():
    if not np.isfinite(array).all():
      raise ValueError(f"{name} holds NaN or infinity: look for the batch of features that does.")
  # C1 C2 has the eigenvalues of the symmetric R C2 R with R R = C1.
  values_F, vectors_FF = np.linalg.eigh(_symmetric("cov1", cov1))
  root_FF = vectors_FF * np.sqrt(_clip_rounding("cov1", values_F)) @ vectors_FF.T
  _clip_rounding("cov2", np.linalg.eigvalsh(_symmetric("cov2", cov2)))
  product_FF = root_FF @ cov2 @ root_FF
  values_F = np.linalg.eigvalsh((product_FF + product_FF.T) / 2)
  trace_root = np.sqrt(_clip_rounding("cov1 cov2", values_F)).sum()
  shift_F = mu1 - mu2
  return float(shift_F @ shift_F + np.trace(cov1) + np.trace(cov2) - 2 * trace_root)


def inception_score(probabilities: np.ndarray, split_size: int) -> float:
  """Inception score exp(E KL(p(y|x) || p(y))), the mean over splits of the samples.

  Args:
    probabilities: class probabilities [N,classes] of a classifier, each row summing to 1, in
      random order: a split must see all classes.
    split_size: samples per split; the published scores use 5,000. A last smaller split counts
      like the others.

  Returns:
    The score, between 1 and the number of classes; higher is better.

  Raises:
    ValueError: if the rows are not probabilities or split_size is not positive.

  Source: Salimans et al. 2016; guided-diffusion's evaluator.
  """
  probabilities = _checked_features("probabilities", probabilities)
  if len(probabilities) == 0 or split_size < 1:
    raise ValueError(
      f"Got {len(probabilities)} rows and split_size {split_size}, need at least one of each."
    )
  if probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3:
    raise ValueError("Rows of probabilities are not >= 0 with sum 1: pass the softmax of logits.")
  scores = []
  for start in range(0, len(probabilities), split_size):
    split = probabilities[start : start + split_size]
    ratio = split / np.maximum(split.mean(axis=0), np.finfo(np.float64).tiny)
    # p log p -> 0 as p -> 0, hence the 1 in place of a ratio of zero.
    divergence_N = (split * np.log(np.where(split > 0, ratio, 1))).sum(axis=1)
    scores.append(np.exp(divergence_N.mean()))
  return float(np.mean(scores))


def precision_recall(
  reference: np.ndarray, samples: np.ndarray, k: int = 3, block_size: int = 512
) -> PrecisionRecall:
  """Improved precision and recall over k-nearest-neighbour manifolds.

  A manifold is the union of balls around the features of a set, each reaching to its k-th nearest
  neighbour in that set, itself excluded. Distances are computed in blocks of rows, so the memory
  is block_size x N numbers.

  Args:
    reference: features [N,F] of the reference set, N > k.
    samples: features [M,F] of the samples, M > k.
    k: which neighbour sets the radius.
    block_size: rows of distances held at once.

  Returns:
    Precision: the share of samples inside the reference manifold. Recall: the share of references
    inside the samples' manifold. Both in [0,1]; higher is better.

  Raises:
    ValueError: if the feature sizes differ, a set has no k-th neighbour or a value is not finite.

  Source: Kynkaanniemi et al. 2019, equations 1 to 3.
  """
  reference = _checked_features("reference", reference)
  samples = _checked_features("samples", samples)
  if reference.shape[1] != samples.shape[1]:
    raise ValueError(
      f"Got features of sizes {reference.shape[1]} and {samples.shape[1]}, need one size: use the "
      "same network for both."
    )
  if not 1 <= k < min(len(reference), len(samples)):
    raise ValueError(
      f"Got k = {k} with {len(reference)} references and {len(samples)} samples, need "
      "1 <= k < the smaller set: lower k or add samples."
    )
  return PrecisionRecall(
    precision=_share_inside(samples, reference, k, block_size),
    recall=_share_inside(reference, samples, k, block_size),
  )


def _share_inside(points: np.ndarray, centres: np.ndarray, k: int, block_size: int) -> float:
  """Share of points inside at least one ball around the centres."""
  radius = np.empty(len(centres))
  for start in range(0, len(centres), block_size):
    distance = _squared_distances(centres[start : start + block_size], centres)
    own = np.arange(len(distance))
    distance[own, start + own] = np.inf
    radius[start : start + block_size] = np.partition(distance, k - 1, axis=1)[:, k - 1]
  num_inside = 0
  for start in range(0, len(points), block_size):
    distance = _squared_distances(points[start : start + block_size], centres)
    num_inside += int((distance <= radius).any(axis=1).sum())
  return num_inside / len(points)


def _squared_distances(a_NF: np.ndarray, b_MF: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances [N,M], never negative."""
  squared_N, squared_M = np.square(a_NF).sum(axis=1), np.square(b_MF).sum(axis=1)
  return np.maximum(squared_N[:, None] + squared_M - 2 * a_NF @ b_MF.T, 0)


def _checked_features(name: str, array: np.ndarray) -> np.ndarray:
  """The array as float64 [N,F], all finite."""
  array = np.asarray(array, np.float64)
  if array.ndim != 2:
    raise ValueError(f"{name} has shape {array.shape}, need [N,F]: pool or flatten it first.")
  if not np.isfinite(array).all():
    bad = int((~np.isfinite(array).all(axis=1)).sum())
    raise ValueError(
      f"{name} holds NaN or infinity in {bad} of {len(array)} rows: find their images."
    )
  return array


def _symmetric(name: str, matrix: np.ndarray) -> np.ndarray:
  """The matrix itself; eigh reads one triangle, so a difference of the other would be ignored."""
  asymmetry, largest = np.abs(matrix - matrix.T).max(), np.abs(matrix).max()
  if asymmetry > _NEGATIVE_TOLERANCE * largest:
    raise ValueError(f"{name} is not symmetric (by {asymmetry:g}), so it is no covariance.")
  return matrix


def _clip_rounding(name: str, eigenvalues: np.ndarray) -> np.ndarray:
  """Eigenvalues with negative ones of rounding size set to zero; larger ones are an error."""
  smallest, largest = eigenvalues.min(), np.abs(eigenvalues).max()
  if smallest < -_NEGATIVE_TOLERANCE * largest:
    raise ValueError(
      f"{name} has the eigenvalue {smallest:g} beside a largest of {largest:g}; covariances have "
      "none below zero: check how it was computed or read."
    )
  return np.maximum(eigenvalues, 0)
