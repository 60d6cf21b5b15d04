"""A small flow learns cells of a latent space, and its page says how well."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from launch.evaluation.cells import open_cells
from launch.lab import cells
from launch.lab.cells import Settings


@pytest.fixture
def given(tmp_path):
  """Cells of two kinds on a ring, in a file."""
  angle = np.random.default_rng(0).uniform(0, 2 * np.pi, 400)
  values = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
  save_file({"cells": values}, tmp_path / "ring.safetensors")
  return open_cells(str(tmp_path / "ring.safetensors"))


def test_a_flow_learns_what_no_gaussian_is(given, monkeypatch):
  monkeypatch.setattr(cells, "STEPS", (50, 3000))
  monkeypatch.setattr(cells, "BATCH", 64)
  values, _ = given.draw(400, 0)
  early, late = cells.learn(values[80:], values[:80], 64, seed=0)
  draw = np.random.default_rng(0).multivariate_normal([0, 0], np.cov(values.T), 80)
  gaussian = cells.compared(draw, values[:80])
  assert late["energy"] < min(early["energy"], gaussian["energy"])
  assert 0.3 < late["told"] < gaussian["told"]


def test_the_page_has_all_cells_and_controls_and_keeps_what_is_done(given, tmp_path, monkeypatch):
  monkeypatch.setattr(cells, "STEPS", (1, 2))
  settings = Settings(runs=1, seeds=1, width=8)
  found = {"plain": cells.examine("plain", given, tmp_path, settings)}
  monkeypatch.setattr(cells, "learn", lambda *_: pytest.fail("learned again"))
  assert cells.examine("plain", given, tmp_path, settings) == found["plain"]
  text = "\n".join(cells.lines_of(found, tmp_path / "page.md", settings))
  for part in ("| plain, paper | 0.263 | 0.145 | 0.995 |", "| a fitted Gaussian |", "| 2 steps |"):
    assert part in text
  for drawn in ("page_learned.png", "page_latents_plain.png"):
    assert (tmp_path / drawn).is_file()
    assert f"({drawn})" in text
  (tmp_path / "plain-latents.png").unlink()
  assert cells.examine("plain", given, tmp_path, settings)["maps"].is_file()


def test_another_seed_has_results_of_its_own(given, tmp_path, monkeypatch):
  monkeypatch.setattr(cells, "learn", lambda *given: given[-1])
  first, second = (
    cells.examine("plain", given, tmp_path, Settings(runs=1, seeds=1, seed=seed, width=8))
    for seed in (0, 1)
  )
  assert (second["spread"]["seed"], second["learned"]) == (1, [1])
  changed = "a fitted Gaussian"
  assert second["controls"][changed] != first["controls"][changed]


def test_samples_of_the_first_steps_have_little_of_the_initial_weights(given, monkeypatch):
  monkeypatch.setattr(cells, "STEPS", (100,))
  values, _ = given.draw(400, 0)
  (early,) = cells.learn(values[80:], values[:80], 64, seed=0)
  monkeypatch.setattr(cells, "DECAY", 0.0)  # the weights themselves
  (raw,) = cells.learn(values[80:], values[:80], 64, seed=0)
  monkeypatch.undo()
  assert early["frechet"] < 2 * raw["frechet"] + 0.02
