"""Writes PyTorch weight files without PyTorch: what torch.load(weights_only=True) reads.

A file is an uncompressed zip archive: a pickle that names tensors, and the bytes of each. The
pickle's few opcodes are put down by hand, so that nothing of PyTorch is needed to name its classes.

Source: the layout as torch.save writes it (torch/serialization.py, PyTorch 2.13).
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file
from vavae_jax.weights.torch_pickles import DTYPES

_STORAGES = {dtype: name for name, dtype in DTYPES.items()}
_FOLDER = "archive"
_ALIGNMENT = 64  # of every tensor in the file, so that it can be mapped into memory
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same tensors make the same bytes
_LOCAL_HEADER = 30  # bytes of a zip entry's, before its name


def write_torch_file(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
  """Writes a state dict, or a dictionary of them, whole or not at all; replaces an older file.

  InputError for an array of a dtype that has no storage of its own in PyTorch.
  """
  arrays: list[np.ndarray] = []
  program = b"".join([pickle.PROTO, b"\x02", *_mapping(content, arrays), pickle.STOP])
  with atomic_file(Path(path)) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    _add(archive, file, "data.pkl", program)
    _add(archive, file, "byteorder", b"little")
    for key, array in enumerate(arrays):
      _add(archive, file, f"data/{key}", array.tobytes())
    _add(archive, file, "version", b"3\n")


def _mapping(content: Mapping[str, Any], arrays: list[np.ndarray]) -> Iterator[bytes]:
  """The opcodes of an ordered dictionary; appends its arrays to `arrays`, in the order of keys."""
  yield from (*_ordered_dict(), pickle.MARK)
  for name, value in content.items():
    yield _text(name)
    yield from (_mapping if isinstance(value, Mapping) else _tensor)(value, arrays)
  yield pickle.SETITEMS


def _tensor(value: Any, arrays: list[np.ndarray]) -> Iterator[bytes]:
  """_rebuild_tensor_v2(storage, offset, shape, strides, requires_grad, hooks)."""
  array = np.asarray(value)
  if array.dtype not in _STORAGES:
    known = ", ".join(map(str, _STORAGES))
    raise InputError(f"Tensors of dtype {array.dtype} are not written; give one of {known}.")
  strides = np.cumprod([1, *array.shape[:0:-1]])[::-1] if array.ndim else ()
  yield from (_global("torch._utils", "_rebuild_tensor_v2"), pickle.MARK)
  yield from (pickle.MARK, _text("storage"), _global("torch", _STORAGES[array.dtype]))
  yield from (_text(str(len(arrays))), _text("cpu"), _integer(array.size), pickle.TUPLE)
  yield from (pickle.BINPERSID, _integer(0), *_integers(array.shape), *_integers(strides))
  yield from (pickle.NEWFALSE, *_ordered_dict(), pickle.TUPLE, pickle.REDUCE)
  arrays.append(array)


def _ordered_dict() -> tuple[bytes, ...]:
  return _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE


def _global(module: str, name: str) -> bytes:
  return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
  encoded = value.encode()
  return pickle.BINUNICODE + len(encoded).to_bytes(4, "little") + encoded


def _integer(value: Any) -> bytes:
  return pickle.LONG1 + b"\x08" + int(value).to_bytes(8, "little", signed=True)


def _integers(values: Any) -> Iterator[bytes]:
  yield pickle.MARK
  yield from map(_integer, values)
  yield pickle.TUPLE


def _add(archive: zipfile.ZipFile, file: IO[bytes], name: str, data: bytes) -> None:
  """One entry, its data aligned by an extra field as PyTorch pads it."""
  info = zipfile.ZipInfo(f"{_FOLDER}/{name}", _EPOCH)
  end = file.tell() + _LOCAL_HEADER + len(info.filename) + 4
  padding = -end % _ALIGNMENT
  info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
  archive.writestr(info, data)
