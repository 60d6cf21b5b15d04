"""Files of the latent store: safetensors shards in the published layout, with notes.

`latents`, `latents_flip` [n, Z, h, w] and `labels` [n] int64 are posterior samples of pictures and
of their mirror images. Or `mean`, `std`, `mean_flip`, `std_flip` are the posteriors themselves, and
each epoch may draw anew. Shards written here also note a hash of their contents and the moments of
their channels, in metadata that other readers ignore, so that both are known without reading them.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import ml_dtypes
import numpy as np

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url, write_safetensors

SAMPLES = ("latents", "latents_flip")
POSTERIORS = ("mean", "std", "mean_flip", "std_flip")
LABELS = "labels"
# Of latents that are read, each as float32; float32 and bfloat16 are written.
DTYPES = {
  "F32": np.dtype(np.float32),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F16": np.dtype(np.float16),
  "F64": np.dtype(np.float64),
}
_LABEL_DTYPES = {
  f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}") for kind in "IU" for size in (1, 2, 4, 8)
}
_MAX_HEADER = 2**24
_NOTE = "vavae_jax"


@dataclasses.dataclass(frozen=True)
class Moments:
  """Per channel: count of numbers, their mean and the sum of squares around it, float64 [Z]."""

  count: int
  mean: np.ndarray
  m2: np.ndarray

  @classmethod
  def of(cls, latents_BZhw: np.ndarray, extra_variance_BZhw: np.ndarray | None = None) -> Moments:
    """Moments of latents, or of all samples from posteriors with these means and variances."""
    values = np.asarray(latents_BZhw, np.float64)
    mean = values.mean((0, 2, 3))
    m2 = np.square(values - mean[:, None, None]).sum((0, 2, 3))
    if extra_variance_BZhw is not None:
      m2 += np.asarray(extra_variance_BZhw, np.float64).sum((0, 2, 3))
    return cls(values.size // len(mean), mean, m2)

  def merged(self, other: Moments) -> Moments:
    """Moments of both together (Chan, Golub and LeVeque 1983)."""
    count = self.count + other.count
    if not count:
      return self
    difference = other.mean - self.mean
    mean = self.mean + difference * (other.count / count)
    m2 = self.m2 + other.m2 + np.square(difference) * (self.count * other.count / count)
    return Moments(count, mean, m2)

  @property
  def std(self) -> np.ndarray:
    """Unbiased standard deviation."""
    return np.sqrt(self.m2 / max(self.count - 1, 1))


def merge(moments: Iterable[Moments]) -> Moments:
  """Moments of all together, in the order given."""
  return functools.reduce(Moments.merged, moments)


# What odd JSON of a header or a note leads to.
_DAMAGE = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


class Note(NamedTuple):
  """Metadata that a shard written here carries."""

  sha256: str  # of the tensors' names and bytes
  moments: Moments  # of the unflipped latents
  skipped: list[str]  # pictures that could not be read and are not in it


class Shard:
  """A shard; its arrays, `tensors` by name, cost nothing until they are read: see `read`.

  `note` is None in shards that others wrote. InputError if the file is damaged or no such shard.
  """

  def __init__(self, path: Path):
    self.path = path
    try:
      self.tensors, metadata = read(path)
      self.note = _parse_note(metadata.get(_NOTE))
    except (OSError, *_DAMAGE) as error:
      raise InputError(
        f"The latent shard {path} cannot be read ({error}); encode again."
      ) from error
    self.has_posteriors = POSTERIORS[0] in self.tensors
    wanted = {*(POSTERIORS if self.has_posteriors else SAMPLES), LABELS}
    if missing := sorted(wanted - self.tensors.keys()):
      raise InputError(f"The latent shard {path} lacks {missing}.")
    self.labels = np.asarray(self.tensors[LABELS][:])
    shapes = {self.tensors[name].shape for name in wanted - {LABELS}}
    kinds = {self.tensors[name].dtype for name in wanted - {LABELS}}
    if (
      len(shapes) > 1
      or len(next(iter(shapes))) != 4
      or self.labels.shape != next(iter(shapes))[:1]
      or not kinds <= set(DTYPES.values())
      or self.labels.dtype not in _LABEL_DTYPES.values()
    ):
      found = {name: (str(x.dtype), x.shape) for name, x in self.tensors.items()}
      raise InputError(f"The latent shard {path} has tensors that do not belong together: {found}.")
    self.shape = next(iter(shapes))[1:]

  def __len__(self) -> int:
    return len(self.labels)

  def compute_sha256(self) -> str:
    """The hash of the contents that the file has now."""
    return _sha256(self.tensors)

  def compute_moments(self) -> Moments:
    """The moments of the contents that the file has now."""
    return _moments(self.tensors)


class _Object:
  """The bytes of a file in a bucket, which are fetched when they are asked for."""

  def __init__(self, path: Path):
    self._system, self._name = fsspec.core.url_to_fs(str(path))
    self._size = int(self._system.info(self._name)["size"])

  def __len__(self) -> int:
    return self._size

  def __getitem__(self, some: slice) -> bytes:
    return self._system.cat_file(self._name, *some.indices(self._size)[:2])

  def pieces(self, starts: np.ndarray, size: int) -> list[bytes]:
    """Those of `size` bytes that begin at `starts`, all at once."""
    names, ends = [self._name] * len(starts), (starts + size).tolist()
    return self._system.cat_ranges(names, starts.tolist(), ends, on_error="raise")


class Rows:
  """An array of a file in a bucket, whose rows are fetched when they are indexed."""

  def __init__(self, file: _Object, begin: int, dtype: np.dtype, shape: tuple[int, ...]):
    self._file, self._begin, self.dtype, self.shape = file, begin, dtype, shape

  def __len__(self) -> int:
    return self.shape[0]

  def __getitem__(self, rows: Any) -> np.ndarray:
    places = np.arange(len(self))[rows]
    size = math.prod(self.shape[1:]) * self.dtype.itemsize
    starts = self._begin + places.ravel() * size
    if len(starts) and (np.diff(starts) == size).all():
      found = self._file[int(starts[0]) : int(starts[-1]) + size]
    else:
      found = b"".join(self._file.pieces(starts, size))
    return np.frombuffer(found, self.dtype).reshape(*places.shape, *self.shape[1:])


def read(path: Path, *, whole: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
  """(arrays by name, metadata) of a safetensors file: mapped into memory or, in a bucket, `Rows`,
  unless it is fetched `whole`.

  ValueError if it is not complete.
  """
  lazily = is_url(path) and not whole
  content: Any
  if lazily:
    content = _Object(path)
  elif is_url(path):
    content = memoryview(path.read_bytes())
  else:
    with path.open("rb") as file:
      content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
  size = int.from_bytes(content[:8], "little")
  if not 0 < size <= min(_MAX_HEADER, len(content) - 8):
    raise ValueError("its header is not whole")
  header: dict[str, Any] = json.loads(bytes(content[8 : 8 + size]))
  metadata = header.pop("__metadata__", {})
  tensors: dict[str, Any] = {}
  for name, entry in header.items():
    dtype = (DTYPES | _LABEL_DTYPES).get(entry["dtype"])
    begin, end = (int(x) for x in entry["data_offsets"])
    shape = tuple(int(x) for x in entry["shape"])
    if dtype is None or min(shape, default=0) < 0:
      raise ValueError(f"{name} is {entry['dtype']} of shape {shape}")
    most = len(content) - 8 - size
    if not 0 <= begin <= end <= most or end - begin != math.prod(shape) * dtype.itemsize:
      raise ValueError(f"{name} is not whole")
    begin, end = (8 + size + x for x in (begin, end))
    if lazily:
      tensors[name] = Rows(content, begin, dtype, shape)
    else:
      tensors[name] = np.frombuffer(content[begin:end], dtype).reshape(shape)
  return tensors, metadata


def write_shard(
  path: Path, tensors_BhwZ: Mapping[str, np.ndarray], labels_B: np.ndarray, skipped: Sequence[str]
) -> None:
  """Writes one shard, named by `shard_name`, whole or not at all.

  The tensors are those of `SAMPLES` or of `POSTERIORS`, float32 or bfloat16; `skipped` names
  pictures that could not be read.
  """
  tensors = {
    name: np.ascontiguousarray(x.transpose(0, 3, 1, 2)) for name, x in tensors_BhwZ.items()
  }
  tensors[LABELS] = np.asarray(labels_B, np.int64)
  moments = _moments(tensors)
  note = {
    "sha256": _sha256(tensors),
    "count": moments.count,
    "mean": moments.mean.tolist(),
    "m2": moments.m2.tolist(),
    "skipped": list(skipped),
  }
  write_safetensors(path, tensors, {_NOTE: json.dumps(note)})


def shard_name(number: int, count: int) -> str:
  """The name of the `number`-th of `count` shards; names sort as numbers do."""
  digits = max(3, len(str(count - 1)))
  return f"latents_rank00_shard{number:0{digits}d}.safetensors"


def _parse_note(text: str | None) -> Note | None:
  if text is None:
    return None
  note = json.loads(text)
  mean, m2 = (np.asarray(note[key], np.float64) for key in ("mean", "m2"))
  return Note(str(note["sha256"]), Moments(int(note["count"]), mean, m2), list(note["skipped"]))


def _sha256(tensors: Mapping[str, np.ndarray]) -> str:
  digest = hashlib.sha256()
  for name in sorted(tensors):
    digest.update(name.encode())
    digest.update(np.ascontiguousarray(tensors[name]).view(np.uint8).data)
  return digest.hexdigest()


def _moments(tensors: Mapping[str, np.ndarray]) -> Moments:
  """Computed in pieces, since float64 takes twice the memory."""
  name = POSTERIORS[0] if POSTERIORS[0] in tensors else SAMPLES[0]
  channels = tensors[name].shape[1]
  pieces = [Moments(0, np.zeros(channels), np.zeros(channels))]
  for begin in range(0, len(tensors[name]), 1024):
    rows = slice(begin, begin + 1024)
    variance = None
    if name == POSTERIORS[0]:
      variance = np.square(np.asarray(tensors[POSTERIORS[1]][rows], np.float64))
    pieces.append(Moments.of(tensors[name][rows], variance))
  return merge(pieces)
