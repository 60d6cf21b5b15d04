"""The unpickler of PyTorch's files: tensors and plain values come out, and nothing is run.

A pickle is a program, and weights come from strangers: the unpickler here knows the few names that
make up tensors. Whatever else a checkpoint holds, from a Namespace to a scheduler, becomes a
`StandIn`: nothing is imported, called or set. What a tensor claims about its storage is checked
before an array looks at it, and all tensors together are bounded by the size of the file.

Notable: no name is refused because of the module that it is in, since none could do anything here.
Those that only an attack asks for are refused all the same: the file is dangerous elsewhere.

Source: torch/_utils.py and torch/storage.py of PyTorch 1.0 to 2.13.
"""

from __future__ import annotations

import math
import pickle
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
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
# Storages whose bytes are no numbers by themselves, and how many make an element.
_BYTES = {
  **dict.fromkeys(("UntypedStorage", "QInt8Storage", "QUInt8Storage"), np.dtype("V1")),
  **dict.fromkeys(("QUInt4x2Storage", "QUInt2x4Storage"), np.dtype("V1")),
  "QInt32Storage": np.dtype("V4"),
}
_STORAGES = DTYPES | _BYTES
# PyTorch's dtypes of tensors in untyped storages, as all later than the above are.
_LATER = {
  f"torch.{dtype.name}": dtype
  for dtype in (
    *DTYPES.values(),
    *map(np.dtype, (np.uint16, np.uint32, np.uint64)),
    *map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz)),
    *map(np.dtype, (ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz)),
    np.dtype(ml_dtypes.float8_e8m0fnu),
  )
}
# Elements that a tensor may have beyond those stored, by strides of zero.
_MAX_EXPANDED = 2**20
# Of all tensors' bytes to the file's: several names may share a storage, as averages and ties do.
_MAX_SHARED = 16
# What runs programs or code, or deletes files, wherever it is reached from. Other names of the same
# modules, such as os.PathLike, are in sound checkpoints.
_ATTACK = re.compile(
  r"(?:.*\.)?(?:"
  r"(?:os|posix|nt)\.(?:system|popen|startfile|exec(?:l|v)p?e?|posix_spawnp?|spawn\w+|fork(?:pty)?"
  r"|remove|unlink|rmdir|removedirs|rename|kill|putenv)"
  r"|(?:builtins|__builtin__|_?io)\.(?:eval|exec|execfile|compile|open|__import__)"
  r"|(?:subprocess|commands|popen2|pty|runpy|webbrowser)\.\w+"
  r"|importlib\.(?:import_module|__import__|reload)|shutil\.(?:rmtree|move)|code\.interact"
  r"|socket\.(?:socket|create_connection)|ctypes\.(?:CDLL|PyDLL|WinDLL|cdll|pythonapi)\S*)"
)


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
    return type(self)(self._kind)

  def extend(self, _: Any) -> None:
    """Of a list; it stays empty."""

  append = add = extend


class OddTensor(StandIn):
  """A tensor that is no array: sparse, quantized, distributed, or of numbers that numpy lacks."""


class _Storage(NamedTuple):
  """Memory of one or more tensors. A tuple, because no pickle can alter a tuple."""

  kind: str
  data: bytes | bytearray

  @property
  def dtype(self) -> np.dtype:
    return _STORAGES[self.kind]


class Unpickler(pickle._Unpickler):
  """Builds containers, plain values and arrays, and nothing else.

  Arrays are read-only views, so that tensors which share a storage share memory here too.

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
    self.unknown: set[str] = set()  # kinds of storages that are not read

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
    whole = f"{module}.{name}"
    if module in ("torch", "torch.cuda", "torch.storage") and name in _STORAGES:
      return name
    # Bound methods: a pickle can set attributes on a function that it is given, not on these.
    known: dict[str, Any] = {
      "collections.OrderedDict": self._ordered,
      "torch._utils._rebuild_tensor": self._tensor,
      "torch._utils._rebuild_tensor_v2": self._tensor,
      "torch._utils._rebuild_tensor_v3": self._later_tensor,
      "torch._utils._rebuild_parameter": self._parameter,
      "torch._utils._rebuild_parameter_with_state": self._parameter,
      "torch._tensor._rebuild_from_type": self._with_attributes,
      "torch._tensor._rebuild_from_type_v2": self._with_attributes,
    }
    if _ATTACK.fullmatch(whole):
      raise InputError(
        f"refused: the file asks for {whole}, which can do harm and is no part of a weight file: "
        "it may be an attack."
      )
    is_tensor = module == "torch._utils" and name.startswith("_rebuild")
    return known.get(whole) or (OddTensor if is_tensor else StandIn)(whole)

  def persistent_load(self, pid: Any) -> _Storage | StandIn:
    if pid[0] == "module":  # beside a class, its source code
      return pid[1] if isinstance(pid[1], StandIn) else StandIn("a class")
    # The older layout has one field more, for a view into another storage, long out of use.
    tag, kind, key, _, count, *view = pid
    if isinstance(kind, StandIn):
      self.unknown.add(repr(kind))
      return kind
    plain = isinstance(kind, str) and isinstance(key, str) and isinstance(count, int)
    known = plain and tag == "storage" and kind in _STORAGES
    if not known or view not in ([], [None]) or count < 0:
      raise InputError(
        f"storage {reprlib.repr(pid)} is not understood: save it again with PyTorch 1.6 or later"
      )
    size = count * _STORAGES[kind].itemsize
    if key not in self.storages:
      self.storages[key] = _Storage(kind, self._fetch(key, size))
    storage = self.storages[key]
    if storage.kind != kind or len(storage.data) != size:
      raise InputError(
        f"storage {key!r}, a {storage.kind}, has {len(storage.data)} bytes, a tensor takes it for "
        f"{size} bytes of a {kind}: the file is damaged"
      )
    return storage

  def _tensor(
    self, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any
  ) -> np.ndarray | StandIn:
    """Views a storage as torch does; `more` may have metadata behind two entries."""
    if isinstance(storage, StandIn) or (isinstance(storage, _Storage) and storage.kind in _BYTES):
      return OddTensor(repr(storage) if isinstance(storage, StandIn) else f"torch.{storage.kind}")
    if not isinstance(storage, _Storage):
      raise InputError(f"a tensor of {type(storage).__name__} instead of a storage makes no sense")
    return self._view(storage.dtype, storage.data, offset, shape, stride, *more[2:])

  def _later_tensor(
    self, storage: Any, offset: Any, shape: Any, stride: Any, *more: Any
  ) -> np.ndarray | StandIn:
    """As `_tensor`, with the dtype before the metadata."""
    dtype = more[2]
    if not isinstance(storage, _Storage) or not isinstance(dtype, StandIn):
      raise InputError("a tensor without storage or dtype makes no sense")
    if repr(dtype) not in _LATER:
      return OddTensor(repr(dtype))
    return self._view(_LATER[repr(dtype)], storage.data, offset, shape, stride, *more[3:])

  def _view(
    self,
    dtype: np.dtype,
    data: bytes | bytearray,
    offset: Any,
    shape: Any,
    stride: Any,
    metadata: Any = None,
  ) -> np.ndarray | OddTensor:
    """A read-only view; offset and stride count elements."""
    if metadata:  # its numbers are yet to be conjugated or negated
      return OddTensor(f"torch.Tensor with {reprlib.repr([*metadata])}")
    numbers = (offset, *shape, *stride)
    if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
      claimed = ", ".join(map(reprlib.repr, (shape, stride, offset)))
      raise InputError(f"a tensor of shape, stride, offset {claimed} makes no sense")
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

  def _with_attributes(self, function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    """A tensor of another class, or with attributes: the tensor alone."""
    if function in (self._tensor, self._later_tensor, self._parameter):
      return function(*arguments)
    return OddTensor(repr(kind) if isinstance(kind, StandIn) else "a tensor of no known class")

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
