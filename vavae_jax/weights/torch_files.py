"""Reads PyTorch weight files without PyTorch, and without running what may hide in them.

A .pt or .pth file is a pickle that names tensors, and the bytes of their storages beside it. A
pickle is a program, and weights come from strangers: the unpickler here knows the few names that
make up tensors. Whatever else a checkpoint holds, from a Namespace to a scheduler, becomes a
`StandIn`: nothing is imported, called or set. What a tensor claims about its storage is checked
before an array looks at it, and all tensors together are bounded by the size of the file.

Notable: both layouts are read. Since PyTorch 1.6 a file is an uncompressed zip archive
(`NAME/data.pkl`, `NAME/data/KEY`); before, it was five pickles followed by the storages' bytes.
Arrays are read-only views, so that tensors which share a storage share memory here too.

Source: the two layouts as torch.save writes them (torch/serialization.py, PyTorch 1.0 to 2.13).
"""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
import reprlib
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from vavae_jax.common.errors import InputError

DTYPES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
  "ComplexFloatStorage": np.dtype(np.complex64),
  "ComplexDoubleStorage": np.dtype(np.complex128),
}
# Elements that a tensor may have beyond those stored, by strides of zero.
_MAX_EXPANDED = 2**20
# Of all tensors' bytes to the file's: several names may share a storage, as averages and ties do.
_MAX_SHARED = 16
# What programs start or load others with; no class or value of a checkpoint is among them.
_ATTACKS = (
  *("os", "posix", "nt", "pty", "commands", "subprocess", "sys", "importlib", "runpy", "shutil"),
  *("socket", "webbrowser", "ctypes"),
)
_ATTACKING_BUILTINS = ("eval", "exec", "execfile", "compile", "open", "__import__")
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
  """Reads a weight file (.pt, .pth, .bin, .ckpt) that torch.save wrote of a dictionary.

  Each tensor or parameter, however deep, becomes a read-only numpy array of the same shape and
  dtype (bfloat16 as that of ml_dtypes); numbers, strings, lists and dictionaries stay as they are.

  InputError if there is no such file, or it is no PyTorch file, is truncated or damaged, holds
  anything but tensors and plain values, or a tensor reaches outside its storage.
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
  if not isinstance(content, dict) or (isinstance(content, StandIn) and not content):
    kind = repr(content) if isinstance(content, StandIn) else type(content).__name__
    raise InputError(f"{path} holds a {kind}, a dictionary is needed: save a state_dict().")
  return content


class StandIn(dict[Any, Any]):
  """What a file has beside tensors and plain values: its name, and the entries of a dictionary.

  It takes every call, argument and item that a pickle gives it, and does nothing with them.
  """

  def __init__(self, kind: str):
    super().__init__()
    self._kind = kind

  def __repr__(self) -> str:
    return self._kind

  def __call__(self, *_: Any) -> StandIn:
    return StandIn(self._kind)

  def extend(self, _: Any) -> None:
    """Of a list; it stays empty."""

  append = add = extend


class _Storage(NamedTuple):
  """Memory of one or more tensors. A tuple, because no pickle can alter a tuple."""

  dtype: np.dtype
  data: bytes | bytearray


class _Unpickler(pickle._Unpickler):
  """Builds containers, plain values and arrays, and nothing else.

  The base class is the unpickler in Python: the one in C sizes its memo by the largest index in
  the file, so that a single wrong byte could take all of the memory.
  """

  def __init__(self, file: IO[bytes], size: int, fetch: Callable[[str, int], bytes | bytearray]):
    """`size` is of the whole file in bytes; `fetch` gives the memory of the storage with that key
    and number of bytes.
    """
    super().__init__(file, encoding="utf-8")  # Python 2 wrote some of the old files
    self._fetch = fetch
    self._left = _MAX_SHARED * size + 4 * _MAX_EXPANDED  # bytes that tensors may have yet
    self.storages: dict[str, _Storage] = {}

  def load_build(self) -> None:
    """Sets no attribute: PyTorch sets a state dict's `_metadata`, a stranger could set `items`."""
    self.stack.pop()  # type: ignore[attr-defined]  # typeshed leaves the stack out

  def load_dict(self) -> None:
    """Keys are plain: one that holds itself twice over takes for ever to hash."""
    items = self.pop_mark()  # type: ignore[attr-defined]
    self.append(_checked(zip(items[::2], items[1::2], strict=True)))  # type: ignore[attr-defined]

  def load_setitem(self) -> None:
    """As `load_dict`."""
    value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
    self.stack[-1].update(_checked([(key, value)]))  # type: ignore[attr-defined]

  def load_setitems(self) -> None:
    """As `load_dict`."""
    items = self.pop_mark()  # type: ignore[attr-defined]
    pairs = zip(items[::2], items[1::2], strict=True)
    self.stack[-1].update(_checked(pairs))  # type: ignore[attr-defined]

  def load_newobj(self) -> None:
    """Makes a stand-in, whatever the arguments."""
    self.stack.pop()  # type: ignore[attr-defined]
    self.append(self.stack.pop()())  # type: ignore[attr-defined]

  def load_newobj_ex(self) -> None:
    """As `load_newobj`, with arguments by name."""
    self.stack.pop()  # type: ignore[attr-defined]
    self.load_newobj()

  def load_bytearray8(self) -> None:
    """Reads the bytes before it makes room for them: their number may be any."""
    size = int.from_bytes(self.read(8), "little")  # type: ignore[attr-defined]
    self.append(self.read(size))  # type: ignore[attr-defined]

  def load_empty_set(self) -> None:
    """Sets are of no use here, and to hash what is in them may take for ever."""
    self.append(StandIn("builtins.set"))  # type: ignore[attr-defined]

  def load_frozenset(self) -> None:
    """As `load_empty_set`."""
    self.pop_mark()  # type: ignore[attr-defined]
    self.append(StandIn("builtins.frozenset"))  # type: ignore[attr-defined]

  dispatch: ClassVar[dict[int, Any]] = {
    **pickle._Unpickler.dispatch,
    pickle.BUILD[0]: load_build,
    pickle.DICT[0]: load_dict,
    pickle.SETITEM[0]: load_setitem,
    pickle.SETITEMS[0]: load_setitems,
    pickle.NEWOBJ[0]: load_newobj,
    pickle.NEWOBJ_EX[0]: load_newobj_ex,
    pickle.BYTEARRAY8[0]: load_bytearray8,
    pickle.EMPTY_SET[0]: load_empty_set,
    pickle.FROZENSET[0]: load_frozenset,
  }

  def find_class(self, module: str, name: str) -> Any:
    if module == "torch" and name in DTYPES:
      return name
    # Bound methods: a pickle can set attributes on a function that it is given, not on these.
    known: dict[tuple[str, str], Any] = {
      ("collections", "OrderedDict"): self._ordered,
      ("torch._utils", "_rebuild_tensor"): self._tensor,
      ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
      ("torch._utils", "_rebuild_parameter"): self._parameter,
      ("torch._utils", "_rebuild_parameter_with_state"): self._parameter,
      ("torch._tensor", "_rebuild_from_type_v2"): self._with_attributes,
    }
    if module.partition(".")[0] in _ATTACKS or (
      module in ("builtins", "__builtin__") and name in _ATTACKING_BUILTINS
    ):
      raise InputError(
        f"refused: the file asks for {module}.{name}, which starts programs and is no part of a "
        "weight file: it may be an attack."
      )
    return known.get((module, name)) or StandIn(f"{module}.{name}")

  def persistent_load(self, pid: Any) -> _Storage | StandIn:
    # The older layout has one field more, for a view into another storage, long out of use.
    tag, kind, key, _, count, *view = pid
    if isinstance(kind, StandIn):  # of a dtype that numpy lacks
      return kind
    plain = isinstance(kind, str) and isinstance(key, str) and isinstance(count, int)
    if not plain or tag != "storage" or kind not in DTYPES or view not in ([], [None]) or count < 0:
      raise InputError(
        f"storage {reprlib.repr(pid)} is not understood: save it again with PyTorch 1.6 or later"
      )
    dtype = DTYPES[kind]
    size = count * dtype.itemsize
    if key not in self.storages:
      self.storages[key] = _Storage(dtype, self._fetch(key, size))
    storage = self.storages[key]
    if storage.dtype != dtype or len(storage.data) != size:
      raise InputError(
        f"storage {key!r} has {len(storage.data)} bytes of {storage.dtype}, a tensor takes it for "
        f"{size} bytes of {dtype}: the file is damaged"
      )
    return storage

  def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Any:
    """Views a storage as torch does; offset and stride count elements."""
    if isinstance(storage, StandIn):
      return storage
    numbers = (offset, *shape, *stride)
    if (
      not isinstance(storage, _Storage)
      or len(shape) != len(stride)
      or not all(isinstance(n, int) and n >= 0 for n in numbers)
    ):
      claimed = ", ".join(map(reprlib.repr, (shape, stride, offset)))
      raise InputError(f"a tensor of shape, stride, offset {claimed} makes no sense")
    dtype, data = storage
    if math.prod(shape) > max(len(data) // dtype.itemsize, _MAX_EXPANDED):
      raise InputError(
        f"a tensor of shape {shape} repeats a storage of {len(data)} bytes: no weights do, and a "
        "copy of it may fill all memory"
      )
    self._left -= math.prod(shape) * dtype.itemsize
    if self._left < 0:
      raise InputError(
        f"its tensors together have more than {_MAX_SHARED} times the bytes of the file: no "
        "weights do, and copies of them may fill all memory"
      )
    if math.prod(shape):
      # In Python's unbounded integers: the same sum in 64 bits could wrap around to a small one.
      end = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) + 1
      if end * dtype.itemsize > len(data):
        raise InputError(
          f"a tensor of shape {shape}, stride {stride}, offset {offset} needs {end} elements, its "
          f"storage has {len(data) // dtype.itemsize}: the file is damaged"
        )
      steps = tuple(step * dtype.itemsize for step in stride)
      array = np.ndarray(shape, dtype, data, offset * dtype.itemsize, steps)
    else:
      array = np.empty(shape, dtype)
    array.flags.writeable = False
    return array

  def _parameter(self, data: Any, *_: Any) -> Any:
    return data

  def _with_attributes(self, function: Any, _type: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of another class, or with attributes: the tensor alone."""
    if function not in (self._tensor, self._parameter):
      return StandIn(repr(function))
    return function(*arguments)

  def _ordered(self, pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(_checked(pairs))


def _checked(pairs: Iterable[Any]) -> dict[Any, Any]:
  """A dictionary of plain keys; other keys become their place and type, since to hash one may take
  for ever.
  """
  plain = str | int | float | bool | None
  return {
    key if isinstance(key, plain) else f"key {i}, a {type(key).__name__}": value
    for i, (key, value) in enumerate(pairs)
  }


def _read_zip(file: io.BufferedReader) -> Any:
  size = os.fstat(file.fileno()).st_size
  with zipfile.ZipFile(file) as archive:
    infos = {info.filename: info for info in archive.infolist()}
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
    return _Unpickler(data_pkl, size, lambda key, _: read(f"data/{key}")).load()


def _read_legacy(file: io.BufferedReader) -> Any:
  available = size = os.fstat(file.fileno()).st_size

  def allocate(key: str, needed: int) -> bytearray:
    nonlocal available
    available -= needed
    if available < 0:
      raise InputError("truncated: the file is shorter than the tensors that it announces")
    return bytearray(needed)

  if _Unpickler(file, size, allocate).load() != _LEGACY_MAGIC:
    raise InputError("not a PyTorch weight file: neither its zip format nor the older one")
  protocol = _Unpickler(file, size, allocate).load()
  system = _Unpickler(file, size, allocate).load()
  if protocol != _LEGACY_PROTOCOL or not system["little_endian"]:
    found = reprlib.repr((protocol, system))
    raise InputError(f"protocol and system {found}: save it again with PyTorch 1.6 or later")
  unpickler = _Unpickler(file, size, allocate)
  content = unpickler.load()

  # The storages' bytes come last: fill the memory that the arrays already look at.
  keys = _Unpickler(file, size, allocate).load()
  if sorted(keys) != sorted(unpickler.storages):
    raise InputError("the stored tensors are not those that the file announces: it is damaged")
  for key in keys:
    dtype, data = unpickler.storages[key]
    count = int.from_bytes(file.read(8), "little")
    if count * dtype.itemsize != len(data) or file.readinto(data) != len(data):
      raise InputError(f"truncated or damaged at storage {key!r}: fetch it again")
  return content
