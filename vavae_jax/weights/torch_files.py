"""Reads PyTorch weight files without PyTorch, and without running what may hide in them.

A .pt or .pth file is a pickle that names tensors, which `torch_pickles.py` reads, and the bytes of
their storages beside it. Since PyTorch 1.6 it is an uncompressed zip archive (`NAME/data.pkl`,
`NAME/data/KEY`); before, it was five pickles followed by the storages' bytes.

Source: the two layouts as torch.save writes them (torch/serialization.py, PyTorch 1.0 to 2.13).
"""

from __future__ import annotations

import errno
import io
import os
import pickle
import reprlib
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from vavae_jax.common.errors import InputError
from vavae_jax.weights.torch_pickles import StandIn, Unpickler

_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

# All that zipfile, the unpickler and numpy raise where bytes are missing or wrong.
_DAMAGE = (
  zipfile.BadZipFile,
  pickle.UnpicklingError,
  struct.error,
  EOFError,
  AttributeError,
  LookupError,
  TypeError,
  ValueError,
  OverflowError,
  RuntimeError,
  MemoryError,
)


def read_torch_file(path: str | os.PathLike[str]) -> dict[Any, Any]:
  """Reads a file (.pt, .pth, .bin, .ckpt) that torch.save wrote of a dictionary, list or tensor.

  Each tensor or parameter, however deep, becomes a read-only numpy array of the same shape and
  dtype (those that numpy lacks as of ml_dtypes); numbers, strings, lists and dictionaries stay as
  they are, and all else is a `StandIn`. A list becomes a dictionary with the keys "0", "1", ...,
  a tensor alone one with the key "0".

  InputError if there is no such file, or it is no PyTorch file, is truncated or damaged, asks for
  what only an attack needs, or a tensor reaches outside its storage.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(f"There is no file {path}; give the path of a .pt, .pth, .bin or .ckpt file.")
  try:
    with path.open("rb") as file:
      is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
      file.seek(0)
      content = _read_zip(file) if is_zip else _read_legacy(file)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error
  except (*_DAMAGE, OSError) as error:
    # A damaged archive may point to before its start; what else the system says is the disk's.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
      raise
    raise InputError(
      f"{path} is truncated, damaged or not a PyTorch weight file ({error}): fetch it again."
    ) from error
  if isinstance(content, np.ndarray):
    content = [content]
  if type(content) in (list, tuple) and content:
    content = {str(i): value for i, value in enumerate(content)}
  if not isinstance(content, dict) or (isinstance(content, StandIn) and not content):
    kind = repr(content) if isinstance(content, StandIn) else type(content).__name__
    raise InputError(f"{path} holds a {kind}, a dictionary is needed: save a state_dict().")
  return content


def _read_zip(file: io.BufferedReader) -> Any:
  size = os.fstat(file.fileno()).st_size
  with zipfile.ZipFile(file) as archive:
    infos = {info.filename: info for info in archive.infolist()}
    if not any(info.CRC for info in infos.values()):  # saved so, by torch.serialization's options
      for info in infos.values():
        info.CRC = None  # type: ignore[assignment]  # which zipfile takes for: not to be checked
    pickles = [name for name in infos if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise InputError("a zip archive, but no PyTorch weight file: it has no single data.pkl")
    folder = pickles[0].removesuffix("data.pkl")
    if (total := sum(info.compress_size for info in archive.infolist())) > size:
      raise InputError(
        f"its entries have {total} bytes, more than the file's {size}: they overlap, or it is cut"
      )

    def read(name: str) -> bytes:
      # PyTorch never compresses; a few compressed bytes could swell to all of the memory.
      if infos[folder + name].compress_type != zipfile.ZIP_STORED:
        raise InputError(f"{name} is compressed: unpack the archive and pack it with zip -0")
      return archive.read(folder + name)

    if f"{folder}byteorder" in infos and read("byteorder") != b"little":
      raise InputError("written on a big-endian machine: save it again on a little-endian one")
    data_pkl = io.BytesIO(read("data.pkl"))
    return Unpickler(data_pkl, size, lambda key, _: read(f"data/{key}")).load()


def _read_legacy(file: io.BufferedReader) -> Any:
  available = size = os.fstat(file.fileno()).st_size

  def allocate(key: str, needed: int) -> bytearray:
    nonlocal available
    available -= needed
    if available < 0:
      raise InputError("truncated: the file is shorter than the tensors that it announces")
    return bytearray(needed)

  if Unpickler(file, size, allocate).load() != _LEGACY_MAGIC:
    raise InputError("not a PyTorch weight file: neither its zip format nor the older one")
  protocol = Unpickler(file, size, allocate).load()
  system = Unpickler(file, size, allocate).load()
  if protocol != _LEGACY_PROTOCOL or not system["little_endian"]:
    found = reprlib.repr((protocol, system))
    raise InputError(f"protocol and system {found}: save it again with PyTorch 1.6 or later")
  unpickler = Unpickler(file, size, allocate)
  content = unpickler.load()
  if unpickler.unknown:
    raise InputError(
      f"its older layout has {', '.join(sorted(unpickler.unknown))}, which cannot be told apart "
      "from what follows: save it again with PyTorch 1.6 or later"
    )

  # The storages' bytes come last: fill the memory that the arrays already look at.
  keys = Unpickler(file, size, allocate).load()
  if sorted(keys) != sorted(unpickler.storages):
    raise InputError("the stored tensors are not those that the file announces: it is damaged")
  for key in keys:
    dtype, data = unpickler.storages[key].dtype, unpickler.storages[key].data
    count = int.from_bytes(file.read(8), "little")
    if count * dtype.itemsize != len(data) or file.readinto(data) != len(data):
      raise InputError(f"truncated or damaged at storage {key!r}: fetch it again")
  return content
