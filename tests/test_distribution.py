"""Frechet distance, Inception score, precision and recall against the reference case and limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.reference import make_frechet, procedural
from vavae_jax.metrics import energy
from vavae_jax.metrics.distribution import (
  Moments,
  frechet_distance,
  inception_score,
  precision_recall,
)

REFERENCE = dict(np.load(Path(__file__).parent / "reference" / "metrics.npz"))
FEATURES = procedural.normal("feat_a", (400, 24))
SAMPLES = 1.2 * procedural.normal("feat_b", (500, 24)) + np.float32(0.1)


def moments(*batches: np.ndarray) -> Moments:
  result = Moments()
  for batch in batches:
    result.update(batch)
  return result


def distance(a: Moments, b: Moments) -> float:
  return frechet_distance(a.mean, a.cov, b.mean, b.cov)


def test_frechet_distance_matches_reference():
  ours = distance(moments(FEATURES), moments(SAMPLES))
  np.testing.assert_allclose(ours, REFERENCE["fid"], rtol=1e-6)
  np.testing.assert_allclose(ours, REFERENCE["fid_library"], rtol=1e-6)


TOOLS = json.loads((Path(__file__).parent / "reference" / "frechet.json").read_text())


@pytest.mark.parametrize("name", make_frechet.CASES)
def test_frechet_distance_is_that_of_other_tools(name):
  ours = distance(*map(moments, make_frechet.features(name)))
  for tool, theirs in TOOLS[name].items():
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, err_msg=tool)


@pytest.mark.torch
@pytest.mark.parametrize("name", make_frechet.CASES)
def test_the_other_tools_still_say_so(name):
  for tool, value in make_frechet.distances(name).items():
    np.testing.assert_allclose(value, TOOLS[name][tool], rtol=1e-4, err_msg=tool)


def test_inception_score_matches_reference():
  logits = procedural.normal("logits_is", (500, 30)).astype(np.float64)
  probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  ours = inception_score(probabilities, split_size=100)
  np.testing.assert_allclose(ours, REFERENCE["inception_score_split100"], rtol=1e-6)


@pytest.mark.parametrize("block_size", [512, 37])
def test_precision_recall_match_reference(block_size):
  ours = precision_recall(FEATURES, SAMPLES, k=3, block_size=block_size)
  assert ours.precision == REFERENCE["precision"]
  assert ours.recall == REFERENCE["recall"]


@pytest.mark.filterwarnings("error")  # the empty batch has no mean
def test_moments_do_not_depend_on_the_batches():
  streamed = moments(FEATURES[:1], FEATURES[1:1], FEATURES[1:150], FEATURES[150:])
  np.testing.assert_allclose(streamed.mean, FEATURES.mean(0, dtype=np.float64), atol=1e-14)
  np.testing.assert_allclose(streamed.cov, np.cov(FEATURES.T.astype(np.float64)), atol=1e-13)


def test_merged_moments_are_those_of_all_features():
  merged = moments(FEATURES[:90])
  merged.merge(Moments())
  merged.merge(moments(FEATURES[90:]))
  np.testing.assert_allclose(merged.cov, moments(FEATURES).cov, atol=1e-13)
  assert merged.count == 400


def test_merging_leaves_the_other_alone():
  part, whole = moments(FEATURES[:9]), Moments()
  whole.merge(part)
  whole.update(FEATURES[9:])
  np.testing.assert_allclose(part.cov, np.cov(FEATURES[:9].T.astype(np.float64)), atol=1e-13)


def test_moments_keep_their_digits_far_from_zero():
  far = FEATURES.astype(np.float64) + 1e6
  np.testing.assert_allclose(
    moments(far[:70], far[70:]).cov, np.cov(FEATURES.T.astype(np.float64)), atol=1e-8
  )


def test_frechet_distance_of_commuting_gaussians():
  mu, cov1, cov2 = np.zeros(3), np.diag([1.0, 4.0, 9.0]), np.diag([4.0, 4.0, 0.0])
  np.testing.assert_allclose(frechet_distance(mu, cov1, mu + 2, cov2), 12 + 1 + 0 + 9, rtol=1e-12)


def test_frechet_distance_survives_fewer_features_than_dimensions():
  few, other = moments(FEATURES[:7]), moments(SAMPLES[:11])
  assert abs(distance(few, few)) < 1e-6
  np.testing.assert_allclose(distance(few, other), distance(other, few), rtol=1e-6)


def test_inception_score_limits():
  confident = np.tile(np.eye(5), (4, 1))
  np.testing.assert_allclose(inception_score(confident, 20), 5, rtol=1e-12)
  np.testing.assert_allclose(inception_score(np.full((7, 5), 0.2), 7), 1, rtol=1e-12)


def test_inception_score_counts_the_last_smaller_split():
  # Splits of two classes, two classes, one class.
  rows = np.eye(3)[[0, 1, 0, 1, 2]]
  np.testing.assert_allclose(inception_score(rows, 2), (2 + 2 + 1) / 3, rtol=1e-12)


def test_precision_recall_tell_the_two_failures_apart():
  grid = np.stack(np.meshgrid(np.arange(6.0), np.arange(6.0)), -1).reshape(-1, 2)
  one_mode = 0.01 * procedural.normal("mode", (8, 2)) + 2.5
  collapsed = precision_recall(grid, one_mode, k=2)
  assert collapsed == (1.0, 0.0)
  assert precision_recall(one_mode, grid, k=2) == (0.0, 1.0)
  assert precision_recall(grid, grid + 100.0, k=2) == (0.0, 0.0)
  assert precision_recall(grid, grid, k=2) == (1.0, 1.0)


def test_a_ball_includes_its_surface():
  assert precision_recall(np.array([[0.0], [1.0]]), np.array([[2.0], [9.0]]), k=1).precision == 0.5


def test_negative_eigenvalues_are_refused_and_rounding_is_not():
  mu, good = np.zeros(2), np.eye(2)
  rounding, wrong = np.diag([1.0, -1e-9]), np.diag([1.0, -1e-3])
  np.testing.assert_allclose(frechet_distance(mu, rounding, mu, good), 1.0, atol=1e-8)
  flat = np.diag([1.0, 0.0])  # would hide the wrong direction
  for pair in [(wrong, good), (good, wrong), (flat, wrong)]:
    with pytest.raises(ValueError, match=r"eigenvalue -0\.001"):
      frechet_distance(mu, pair[0], mu, pair[1])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "same network"),
    ((np.zeros(2), np.eye(2), np.full(2, np.nan), np.eye(2)), "mu2 holds NaN"),
    ((np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), np.zeros(2), np.eye(2)), "not symmetric"),
  ],
)
def test_frechet_distance_refuses(arguments, message):
  with pytest.raises(ValueError, match=message):
    frechet_distance(*arguments)


@pytest.mark.parametrize(
  ("features", "message"),
  [
    (np.zeros((4, 2, 2)), r"\[N,F\]"),
    (np.array([[0.0, np.inf], [0.0, 0.0]]), "1 of 2 rows"),
    (np.zeros((4, 3)), "size 3 after features of size 2"),
  ],
)
def test_moments_refuse(features, message):
  seen = moments(np.ones((3, 2)))
  with pytest.raises(ValueError, match=message):
    seen.update(features)
  assert seen.count == 3


def test_covariance_needs_two_features():
  with pytest.raises(ValueError, match="Got 1 features"):
    _ = moments(FEATURES[:1]).cov


@pytest.mark.parametrize(
  ("probabilities", "split_size"),
  [(np.eye(3), 0), (np.zeros((0, 3)), 1), (2 * np.eye(3), 1), (np.array([[1.5, -0.5]]), 1)],
)
def test_inception_score_refuses(probabilities, split_size):
  with pytest.raises(ValueError, match=r"at least one|sum 1"):
    inception_score(probabilities, split_size)


@pytest.mark.parametrize(
  ("samples", "k", "message"),
  [(SAMPLES[:3], 3, "k = 3"), (SAMPLES, 0, "k = 0"), (SAMPLES[:, :5], 3, "same network for both")],
)
def test_precision_recall_refuses(samples, k, message):
  with pytest.raises(ValueError, match=message):
    precision_recall(FEATURES, samples, k)


def test_energy_distance_and_neighbours_tell_sets_apart(monkeypatch):
  draw = np.random.default_rng(0)
  same, other = (draw.standard_normal((2, 700, 3)) for _ in range(2))
  far = other[0] + [2, 0, 0]
  pairs = ((same[0], far), (same[0], same[0]), (far, far))
  between, first, second = (np.linalg.norm(a[:, None] - b, axis=-1).sum() for a, b in pairs)
  expected = 2 * between / 700**2 - (first + second) / (700 * 699)
  monkeypatch.setattr(energy, "_BLOCK", 64)
  assert energy.energy_distance(same[0], far) == pytest.approx(expected, rel=1e-6)
  assert abs(energy.energy_distance(*same)) < 0.02
  assert energy.told_apart(*same) == pytest.approx(0.5, abs=0.05)
  assert energy.told_apart(same[0], far) > 0.8
  assert energy.told_apart(same[0], same[0]) == 0
