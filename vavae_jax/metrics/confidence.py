"""The uncertainty of a Frechet distance: its spread, and its bias with few samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vavae_jax.metrics.distribution import Gaussian, Moments

_ROWS = 1_000  # that are made float64 together
POINTS = 15


class Interval(NamedTuple):
  """A confidence interval of 95 % and the standard deviation behind it."""

  low: float
  high: float
  deviation: float


class Infinity(NamedTuple):
  """A distance extrapolated to infinitely many samples."""

  distance: float  # the line's value at 1/N = 0
  slope: float  # of the distance by 1/N
  residual: float  # root mean square distance of the points from the line


def resampled(
  features_NF: np.ndarray, reference: Gaussian, count: int, seed: int = 0
) -> Iterator[float]:
  """Yields distances to `reference` of `count` bootstrap samples, drawn with replacement."""
  draw = np.random.default_rng((seed, 0))
  for _ in range(count):
    yield _distance(features_NF, draw.integers(len(features_NF), size=len(features_NF)), reference)


def interval(distance: float, resamples: list[float]) -> Interval:
  """distance -+ 1.96 standard deviations of at least two resamples.

  The resamples' mean is biased, since a resample has fewer different pictures. The interval does
  not cover the bias by few samples, for which see `extrapolated`.
  """
  deviation = float(np.std(resamples, ddof=1))
  return Interval(distance - 1.96 * deviation, distance + 1.96 * deviation, deviation)


def subset_distances(
  features_NF: np.ndarray, reference: Gaussian, seed: int = 0
) -> Iterator[tuple[int, float]]:
  """Yields (size, distance to `reference`) of random subsets.

  Their sizes go from a tenth of the samples (at least 5,000, if there are twice as many) to all.
  """
  total = len(features_NF)
  least = 5_000 if total >= 10_000 else max(total // 10, 2)
  draw = np.random.default_rng((seed, 1))
  for size in np.linspace(least, total, POINTS).astype(int):
    yield int(size), _distance(features_NF, draw.permutation(total)[:size], reference)


def extrapolated(sizes_and_distances: list[tuple[int, float]]) -> Infinity:
  """The distance of infinitely many samples, by a straight line in 1/N through `subset_distances`.

  Source: Chong and Forsyth 2020, arXiv 1911.07023.
  """
  sizes, distances = np.array(sizes_and_distances, np.float64).T
  slope, distance = np.polyfit(1 / sizes, distances, 1)
  left = distances - (distance + slope / sizes)
  return Infinity(float(distance), float(slope), float(np.sqrt(np.mean(left**2))))


def _distance(features_NF: np.ndarray, rows: np.ndarray, reference: Gaussian) -> float:
  moments = Moments()
  for start in range(0, len(rows), _ROWS):
    moments.update(features_NF[rows[start : start + _ROWS]])
  return reference.distance(moments.mean, moments.cov).distance
