"""What tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import jax
import pytest
from jax.sharding import Mesh

from launch.lab.plan import slices


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mesh]:
  """Makes the mesh of TPUs that are not here, by `slices.make_mesh`, to compile for."""
  monkeypatch.setattr(jax.config, "update", lambda *_: None)  # what tests run on stays
  slices.prepare()
  return slices.make_mesh
