"""Files of published weights -> PyTorch name: array, whichever of the common kinds they are.

PyTorch's pickles are read without PyTorch and without running what is in them; safetensors and npz
files hold nothing but arrays.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vavae_jax.common.errors import InputError
from vavae_jax.weights.torch_files import read_torch_file

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npz")
# Of an npz, unpacked to packed. Weights hardly shrink; more is a few bytes made to fill all memory.
_MAX_EXPANSION = 100
# Under one of these a checkpoint keeps its weights, beside optimizers and counters.
_WRAPPERS = ("state_dict", "model", "ema")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads weights of a .pt, .pth, .bin, .ckpt, .safetensors or .npz file: PyTorch name -> array.

  A checkpoint that keeps its weights under "state_dict", "model" or "ema" is opened at the first of
  these; arrays have the shape and dtype they are stored with. InputError if there is no such file,
  it is of another kind or damaged, or has more than tensors among its weights.
  """
  weights = unwrap(read_content(path))
  others = [str(name) for name, value in weights.items() if not isinstance(value, np.ndarray)]
  if others:
    raise InputError(
      f"{path} holds more than tensors: {', '.join(others[:8])}. Save the state_dict() alone, or "
      f"under {' or '.join(map(repr, _WRAPPERS))}."
    )
  return dict(weights)


def read_content(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads all that is in such a file: arrays, and of PyTorch's files whatever its dictionary holds.

  InputError if there is no such file, or it is of another kind or damaged.
  """
  path = Path(path)
  if path.suffix not in SUFFIXES:
    raise InputError(f"{path}: a file of weights ends in one of {', '.join(SUFFIXES)}.")
  if not path.is_file():
    raise InputError(f"There is no file {path}; give the path of a file of weights.")
  if path.suffix == ".safetensors":
    try:
      return load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
      raise InputError(f"{path} is damaged or not a safetensors file ({error}).") from error
  if path.suffix == ".npz":
    return _read_npz(path)
  return read_torch_file(path)


def _read_npz(path: Path) -> dict[str, Any]:
  try:
    with zipfile.ZipFile(path) as archive:
      unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > _MAX_EXPANSION * path.stat().st_size:
      raise InputError(
        f"{path} would unpack to {unpacked / 2**20:.0f} MiB from {path.stat().st_size} bytes; no "
        "weights shrink so far. If it is yours, save it with numpy.savez, which packs nothing."
      )
    with np.load(path, allow_pickle=False) as arrays:
      content = {name: arrays[name] for name in arrays.files}
  except (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, MemoryError, RecursionError),
    *(LookupError, TypeError, ValueError, OverflowError, NotImplementedError, SyntaxError),
  ) as error:
    raise InputError(f"{path} is damaged or not an npz file ({error}).") from error
  if odd := [name for name, x in content.items() if x.dtype.kind not in "biufc"]:
    raise InputError(f"{path} has arrays that hold no numbers: {', '.join(odd[:8])}.")
  return content


def unwrap(content: Mapping[str, Any]) -> Mapping[str, Any]:
  """The weights of a checkpoint: what it has under "state_dict", "model" or "ema", else itself."""
  for name in _WRAPPERS:
    if isinstance(content.get(name), Mapping):
      return content[name]
  return content
