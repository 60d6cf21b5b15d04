"""Reference cases: what the published implementation computed on procedural weights and inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from tests.reference import procedural

FOLDER = Path(__file__).parent / "reference"


def load(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
  """A case by its name: (what ran, weights by PyTorch name, expected arrays in PyTorch layout)."""
  spec = json.loads((FOLDER / f"{name}.json").read_text())
  weights = procedural.state_dict(spec.get("state_dict_shapes", {}), spec.get("seed", 0))
  with np.load(FOLDER / f"{name}.npz") as arrays:
    return spec, weights, dict(arrays)


def random_weights(abstract: nnx.Module, scale: float = 0.2) -> Any:
  """The module that `nnx.eval_shape` outlined, with normal weights, made without compiling.

  No zeros of an initialisation remain, which would hide mistakes; running variances are positive.
  """
  graph, state = nnx.split(abstract)
  weights = {}
  for path, leaf in flatten_dict(nnx.to_pure_dict(state)).items():
    value = scale * procedural.normal(str(path), leaf.shape)
    weights[path] = jnp.asarray(np.abs(value) + 1 if path[-1] == "var" else value)
  return nnx.merge(graph, unflatten_dict(weights))


def nhwc(array: np.ndarray) -> np.ndarray:
  """NCHW -> NHWC."""
  return np.moveaxis(array, 1, -1)


def assert_near(actual: Any, expected: Any, tolerance: float, floor: float = 0.0) -> None:
  """All elements within `tolerance`, in units of the largest expected one, or within `floor`."""
  actual, expected = np.asarray(actual), np.asarray(expected)
  assert actual.shape == expected.shape
  atol = max(tolerance * np.abs(expected).max(), floor)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)
