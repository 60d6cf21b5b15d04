"""Files of published weights -> PyTorch name: array, whichever of the two common kinds they are.

PyTorch's pickles are read without PyTorch and without running what is in them; safetensors files
hold nothing but tensors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vavae_jax.errors import InputError
from vavae_jax.torch_files import read_torch_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors")
# Under one of these a checkpoint keeps its weights, beside optimizers and counters.
_WRAPPERS = ("state_dict", "model", "ema")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads the weights of a .pt, .pth, .bin, .ckpt or .safetensors file.

  Args:
    path: of the file. A checkpoint that keeps its weights under "state_dict" or "model" is opened.

  Returns:
    PyTorch name -> array of the shape and dtype it is stored with.

  Raises:
    InputError: there is no such file, it is of another kind or damaged, or has more than tensors
      among its weights.
  """
  path = Path(path)
  if path.suffix not in SUFFIXES:
    raise InputError(f"{path}: a file of weights ends in one of {', '.join(SUFFIXES)}.")
  if not path.is_file():
    raise InputError(f"There is no file {path}; give the path of a file of weights.")
  if path.suffix == ".safetensors":
    try:
      return load_file(path)
    except (SafetensorError, OSError) as error:
      raise InputError(f"{path} is damaged or no safetensors file ({error}).") from error
  weights = unwrap(read_torch_file(path))
  others = [str(name) for name, value in weights.items() if not isinstance(value, np.ndarray)]
  if others:
    raise InputError(
      f"{path} holds more than tensors: {', '.join(others[:8])}. Save the state_dict() alone, or "
      f"under {' or '.join(map(repr, _WRAPPERS))}."
    )
  return dict(weights)


def unwrap(content: Mapping[str, Any]) -> Mapping[str, Any]:
  """The weights of a checkpoint: what it has under "state_dict" or "model", else itself."""
  for name in _WRAPPERS:
    if isinstance(content.get(name), Mapping):
      return content[name]
  return content
