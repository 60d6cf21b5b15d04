"""Runs that are killed, stopped or starved end like undisturbed ones; see survive.py."""

from __future__ import annotations

import pytest

from tests.survive import scenarios

SCENARIOS = scenarios(kills=4, mounted=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Shared, so that undisturbed runs are made once."""
  return tmp_path_factory.mktemp("survival")


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_survives(name, folder, environment):
  # Optimised: what is computed anew by a resumed run must have the same bits.
  # In a cache of their own, since a kill may leave half an entry.
  variables = environment | {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
  }
  (folder / name).mkdir()
  outcome = SCENARIOS[name](folder / name, variables)
  assert outcome.survived, outcome
