"""The evaluators of both trainings give the same on 1, 2 and 4 processes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.evaluators_everywhere import HELD_OUT
from vavae_jax.common import mesh
from vavae_jax.common.batches import in_shares

LAYOUTS = ("2:1:2", "4:2:2")


@pytest.fixture(scope="module")
def found(command, pipeline, tmp_path_factory):
  """By layout: all that the evaluators gave."""
  output = tmp_path_factory.mktemp("evaluators")
  done = command("tests.evaluators_everywhere", pipeline, output, ",".join(["1:1:1", *LAYOUTS]))
  assert done.returncode == 0, done.stderr
  return {path.stem: dict(np.load(path)) for path in output.iterdir()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_losses_of_several_processes_are_those_of_one(found, layout):
  """The last batch of 8 has 3 records, fewer than there are of four processes."""
  assert HELD_OUT % 8 == 3
  names = [name for name in found[layout] if name.startswith("validation/")]
  assert len(names) == 18
  for name in names:
    assert found[layout][name] == pytest.approx(found["1:1:1"][name], rel=1e-6), name


def test_rows_of_a_share_are_loaded_when_their_turn_comes():
  loaded = []

  def load(rows):
    loaded.append(rows.tolist())
    return rows

  found = list(in_shares(lambda x: 2 * x, load, 7, 3, mesh.make_mesh()))
  assert loaded == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
  assert [rows.tolist() for rows, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
  assert [out.tolist() for _, out in found] == [[0, 2, 4], [6, 8, 10], [12]]
