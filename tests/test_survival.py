"""Runs that are killed, stopped or starved end like undisturbed ones; see survive.py."""

from __future__ import annotations

import concurrent.futures

import pytest

from tests.survive import scenarios

SCENARIOS = scenarios(kills=4, mounted=False)


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory, environment):
  """The outcomes of the scenarios that this session tests: two run at a time, since they wait a
  lot, and share a folder, so that undisturbed runs are made once."""
  folder = tmp_path_factory.mktemp("survival")
  # Optimised: what is computed anew by a resumed run must have the same bits.
  # In a cache of their own, since a kill may leave half an entry.
  variables = environment | {
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
  }

  def outcome(name):
    (folder / name).mkdir()
    return SCENARIOS[name](folder / name, variables)

  items = [item for item in request.session.items if item.path == request.path]
  names = [item.callspec.params["name"] for item in items]
  pool = concurrent.futures.ThreadPoolExecutor(2)
  yield {name: pool.submit(outcome, name) for name in names}
  pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_survives(name, outcomes):
  outcome = outcomes[name].result()
  assert outcome.survived, outcome
