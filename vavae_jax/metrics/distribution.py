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
  """

  count: int = 0  # features seen
  # Their mean [F], and the sum of the outer products of the deviations from it [F,F].
  mean: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
  scatter: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

  def update(self, features_NF: np.ndarray) -> None:
    """Adds features [N,F], N at least 0; ValueError if F changes or a value is not finite."""
    features_NF = _checked_features("features", features_NF)
    if len(features_NF) == 0:
      return
    mean_F = features_NF.mean(axis=0)
    deviation_NF = features_NF - mean_F
    self.merge(Moments(len(features_NF), mean_F, deviation_NF.T @ deviation_NF))

  def merge(self, other: Moments) -> None:
    """Adds all features that `other` has seen; ValueError if the feature sizes differ."""
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


class Frechet(NamedTuple):
  """A squared Frechet distance and its parts."""

  distance: float  # the sum of the two parts; lower is better
  means: float  # |mu1 - mu2|^2
  covariances: float  # tr(C1 + C2 - 2 (C1 C2)^(1/2))
  # How far the most negative eigenvalue of C1 C2 was below zero, in units of the largest: rounding,
  # which was set to zero. 0 if there was none.
  negative: float


class Gaussian:
  """A Gaussian to which others are compared, by its mean [F] and unbiased covariance [F,F].

  The root of the covariance is taken once. ValueError if shapes do not fit, a value is not finite,
  or the covariance is asymmetric or has an eigenvalue below zero by more than rounding.
  """

  def __init__(self, mean: np.ndarray, cov: np.ndarray):
    self.mean, self.cov = _checked_moments("1", mean, cov)
    values_F, vectors_FF = np.linalg.eigh(self.cov)
    self._root = vectors_FF * np.sqrt(_clip_rounding("cov1", values_F)) @ vectors_FF.T

  def distance(self, mean: np.ndarray, cov: np.ndarray) -> Frechet:
    """To a Gaussian of the same size; ValueError: see the constructor."""
    mean, cov = _checked_moments("2", mean, cov)
    if mean.shape != self.mean.shape:
      raise ValueError(
        f"Got means of sizes {self.mean.size} and {mean.size}: compare features of the same "
        "network."
      )
    _clip_rounding("cov2", np.linalg.eigvalsh(cov))
    # C1 C2 has the eigenvalues of the symmetric R C2 R with R R = C1.
    product_FF = self._root @ cov @ self._root
    values_F = np.linalg.eigvalsh((product_FF + product_FF.T) / 2)
    trace_root = np.sqrt(_clip_rounding("cov1 cov2", values_F)).sum()
    shift_F = self.mean - mean
    means = float(shift_F @ shift_F)
    covariances = float(np.trace(self.cov) + np.trace(cov) - 2 * trace_root)
    negative = float(max(-values_F.min(), 0) / max(np.abs(values_F).max(), np.finfo(float).tiny))
    return Frechet(means + covariances, means, covariances, negative)


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
  """Squared Frechet distance of two Gaussians, |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).

  Means are [F], covariances unbiased and [F,F]; ValueError: see `Gaussian`. Lower is better; equal
  inputs give zero up to rounding, of either sign.

  Source: Heusel et al. 2017, equation 6.
  """
  return Gaussian(mu1, cov1).distance(mu2, cov2).distance


class ProbabilitySums(NamedTuple):
  """Sums of probabilities that give a split's inception score; sums of parts add up.

  The mean divergence of p(y|x) from p(y) is E sum p(y|x) log p(y|x) - sum p(y) log p(y).
  """

  rows: int
  entropy: float  # sum of p log p over all rows and classes
  total: np.ndarray  # sum of the rows [classes]

  @classmethod
  def of(cls, probabilities: np.ndarray) -> ProbabilitySums:
    """Sums over rows [N,classes]; ValueError if they are not probabilities that sum to 1."""
    probabilities = _checked_features("probabilities", probabilities)
    if len(probabilities) and (
      probabilities.min() < 0 or np.abs(probabilities.sum(axis=1) - 1).max() > 1e-3
    ):
      raise ValueError("Rows of probabilities are not >= 0 with sum 1: pass the softmax of logits.")
    return cls(len(probabilities), float(_p_log_p(probabilities).sum()), probabilities.sum(axis=0))

  def score(self) -> float:
    """The inception score of the rows; there is at least one."""
    mean = self.total / self.rows
    return float(np.exp(self.entropy / self.rows - _p_log_p(mean).sum()))


def _p_log_p(p: np.ndarray) -> np.ndarray:
  """p log p, which goes to 0 as p does."""
  return p * np.log(np.where(p > 0, p, 1))


def inception_score(probabilities: np.ndarray, split_size: int) -> float:
  """Inception score exp(E KL(p(y|x) || p(y))), the mean over splits of the samples.

  It is between 1 and the number of classes; higher is better. ValueError for other arguments.

  Args:
    probabilities: class probabilities [N,classes] of a classifier, each row summing to 1, in
      random order: a split must see all classes.
    split_size: samples per split; the published scores use 5,000. A last smaller split counts
      like the others.
  """
  if len(probabilities) == 0 or split_size < 1:
    raise ValueError(
      f"Got {len(probabilities)} rows and split_size {split_size}, need at least one of each."
    )
  splits = range(0, len(probabilities), split_size)
  parts = [ProbabilitySums.of(probabilities[i : i + split_size]) for i in splits]
  return float(np.mean([part.score() for part in parts]))


def precision_recall(
  reference: np.ndarray, samples: np.ndarray, k: int = 3, block_size: int = 512
) -> PrecisionRecall:
  """Improved precision and recall over k-nearest-neighbour manifolds.

  A manifold is the union of balls around the features of a set, each reaching to its k-th nearest
  neighbour in that set, itself excluded. Distances are computed in blocks of rows, so the memory
  is block_size x N numbers. Source: Kynkaanniemi et al. 2019, equations 1 to 3.

  `reference` [N,F] and `samples` [M,F] have more than k rows. ValueError if not, if the feature
  sizes differ or a value is not finite. Both results are in [0,1]; higher is better.
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
  radius, squared_M = np.empty(len(centres)), np.square(centres).sum(axis=1)
  for start in range(0, len(centres), block_size):
    distance = _squared_distances(centres[start : start + block_size], centres, squared_M)
    own = np.arange(len(distance))
    distance[own, start + own] = np.inf
    radius[start : start + block_size] = np.partition(distance, k - 1, axis=1)[:, k - 1]
  num_inside = 0
  for start in range(0, len(points), block_size):
    distance = _squared_distances(points[start : start + block_size], centres, squared_M)
    num_inside += int((distance <= radius).any(axis=1).sum())
  return num_inside / len(points)


def _squared_distances(a_NF: np.ndarray, b_MF: np.ndarray, squared_M: np.ndarray) -> np.ndarray:
  """Squared Euclidean distances [N,M], never negative; `squared_M` are the squares of b's norms."""
  squared_N = np.square(a_NF).sum(axis=1)
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


def _checked_moments(
  number: str, mean: np.ndarray, cov: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Both as float64, finite and symmetric; eigh reads one triangle and would hide a difference."""
  mean, cov = np.asarray(mean, np.float64), np.asarray(cov, np.float64)
  if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
    raise ValueError(f"Got a mean {mean.shape} and a covariance {cov.shape}, need [F] and [F,F].")
  for name, array in ((f"mu{number}", mean), (f"cov{number}", cov)):
    if not np.isfinite(array).all():
      raise ValueError(f"{name} holds NaN or infinity: look for the batch of features that does.")
  asymmetry, largest = np.abs(cov - cov.T).max(), np.abs(cov).max()
  if asymmetry > _NEGATIVE_TOLERANCE * largest:
    raise ValueError(f"cov{number} is not symmetric (by {asymmetry:g}), so it is no covariance.")
  return mean, cov


def _clip_rounding(name: str, eigenvalues: np.ndarray) -> np.ndarray:
  """Eigenvalues with negative ones of rounding size set to zero; larger ones are an error."""
  smallest, largest = eigenvalues.min(), np.abs(eigenvalues).max()
  if smallest < -_NEGATIVE_TOLERANCE * largest:
    raise ValueError(
      f"{name} has the eigenvalue {smallest:g} beside a largest of {largest:g}; covariances have "
      "none below zero: check how it was computed or read."
    )
  return np.maximum(eigenvalues, 0)
