"""Files of published weights -> PyTorch name: array, whichever of the common kinds they are.

PyTorch's pickles are read without PyTorch and without running what is in them; safetensors and npz
files hold nothing but arrays.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vavae_jax.common.addresses import local_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import read_note
from vavae_jax.weights.torch_files import read_torch_file
from vavae_jax.weights.torch_pickles import OddTensor, StandIn
from vavae_jax.weights.torch_weights import StateDict, without_wrappers

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".npz")
# Of an npz, unpacked to packed. Weights hardly shrink; more is a few bytes made to fill all memory.
_MAX_EXPANSION = 100
_MAX_DEPTH = 3  # of dictionaries in a file that may hold the weights


class Place(NamedTuple):
  """A place of tensors in a file.

  Attributes:
    path: keys of dictionaries.
    prefix: what the names begin with.
    all: tensors of that dictionary, without what wrappers put into names, with the prefix.
    odd: likewise, kinds of those that are no arrays.
  """

  path: tuple[str, ...]
  prefix: str
  all: dict[str, np.ndarray]
  odd: Mapping[str, str] = MappingProxyType({})

  @property
  def where(self) -> str:
    """For people, such as "state_dict/vae."; "" for the file itself."""
    return "/".join((*self.path, *([self.prefix] if self.prefix else [])))

  @property
  def depth(self) -> int:
    """How many keys and parts of the prefix."""
    return len(self.path) + self.prefix.count(".")

  @property
  def tensors(self) -> dict[str, np.ndarray]:
    """Name without the prefix -> array; InputError if some are none."""
    begins, length = self.prefix, len(self.prefix)
    if odd := [f"{x} ({kind})" for x, kind in self.odd.items() if x.startswith(begins)]:
      raise InputError(
        f"Weights must be dense tensors of numbers, and these are none: {', '.join(odd[:8])}. Save "
        "them as such: by dequantize(), to_dense(), full_tensor() or their like."
      )
    return {name[length:]: x for name, x in self.all.items() if name.startswith(begins)}

  def aside(self, content: Mapping[Any, Any]) -> Counter[str]:
    """Other contents of the file -> how many tensors or values."""
    there = content
    for key in self.path:
      there = _entries(there)[key]
    others = [
      *((k, v) for k, v in content.items() if self.path and k != self.path[0]),
      *((k, v) for k, v in there.items() if not _is_named_tensor(k, v)),
    ]
    found = Counter(name.split(".")[0] for name in self.all if not name.startswith(self.prefix))
    for key, value in others:
      # With its kind where that is not known here.
      name = f"{key}: {value!r}" if isinstance(value, StandIn) else str(key)
      found[name] += len(value) if isinstance(value, Mapping) and value else 1
    return found


def read_state_dict(path: str | os.PathLike[str], marks: Collection[str] = ()) -> StateDict:
  """Reads weights of a .pt, .pth, .bin, .ckpt, .safetensors or .npz file: PyTorch name -> array.

  `marks` are names of the model's tensors, as `weights_in` takes them; arrays have the shape and
  dtype they are stored with. InputError if there is no such file, it is of another kind or damaged,
  or has no weights, or several models'.
  """
  content = read_content(path)
  try:
    return weights_in(content, marks)
  except InputError as error:
    raise InputError(f"{path}: {error}") from error


def read_content(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Reads all that is in such a file: arrays, and of PyTorch's files whatever its dictionary holds.

  Of a .json, the configuration of an AutoencoderKL of diffusers, statistics of latents are arrays.
  hf:OWNER/NAME/FILE is fetched, as by `local_file`. InputError if there is no such file, or it is
  of another kind or damaged.
  """
  path = local_file(path)
  if path.suffix == ".json" and path.is_file():
    return _read_json(path)
  if path.suffix not in SUFFIXES:
    raise InputError(f"{path}: a file of weights ends in one of {', '.join(SUFFIXES)}.")
  if not path.is_file():
    raise InputError(f"There is no file {path}; give the path of a file of weights.")
  if path.suffix == ".safetensors":
    try:
      return load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError) as error:
      if small := _float8_in(path):
        raise InputError(
          f"{path} holds 8-bit floats, which are rounded too far to be taken for the weights: "
          f"{', '.join(small[:8])}. Give a file of 16 or 32 bits."
        ) from error
      raise InputError(f"{path} is damaged or not a safetensors file ({error}).") from error
  if path.suffix == ".npz":
    return _read_npz(path)
  return read_torch_file(path)


def _float8_in(path: Path) -> list[str]:
  """Tensors of a safetensors file that are 8-bit floats, which numpy lacks."""
  with path.open("rb") as file:
    size = int.from_bytes(file.read(8), "little")
    try:
      entries = json.loads(file.read(min(size, path.stat().st_size))).items()
      return [name for name, about in entries if about.get("dtype", "").startswith("F8_")]
    except (ValueError, AttributeError, RecursionError):
      return []  # no header; the file is damaged


def _read_json(path: Path) -> dict[str, Any]:
  kinds: dict[str, Any] = dict.fromkeys(("latents_mean", "latents_std"), list | None)
  content = read_note(path, **kinds)
  try:
    for name in kinds.keys() & content.keys():
      content[name] = np.asarray(content[name], np.float32).reshape(1, -1, 1, 1)
  except (ValueError, TypeError) as error:
    raise InputError(f"{path}: {name} is no list of numbers.") from error
  return content


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


def weights_in(content: Mapping[Any, Any], marks: Collection[str] = ()) -> StateDict:
  """The weights of a file or checkpoint, not their average where it has both.

  They are at the place that has one of `marks`; without marks, or where none is found, in the
  dictionary with most tensors. InputError if there are none, or several such places.
  """
  found = dictionaries(content)
  if not found:
    raise InputError("There are no tensors with names; save a state_dict().")
  most = max(len(place.all) for place in found)
  large = [place for place in found if 2 * len(place.all) >= most]  # a model and its average
  return choose(places(found, marks) or large, average=False).tensors


def dictionaries(content: Mapping[Any, Any]) -> list[Place]:
  """A file's dictionaries that have tensors, the outermost first."""
  found = []
  for path, there in _walk(content, (), {id(content)}):
    named = {key: value for key, value in there.items() if _is_named_tensor(key, value)}
    odd = {k: repr(v) for k, v in there.items() if isinstance(v, OddTensor) and isinstance(k, str)}
    if named or odd:
      found.append(Place(path, "", without_wrappers(named), without_wrappers(odd)))
  return found


def places(found: Sequence[Place], marks: Collection[str]) -> list[Place]:
  """Where in dictionaries a tensor is called as one of `marks`, perhaps after a prefix."""
  return [
    place._replace(prefix=prefix)
    for place in found
    for prefix in sorted(
      {
        name.removesuffix(mark)
        for mark in marks
        for name in place.all
        if f".{name}".endswith(f".{mark}")
      }
    )
  ]


def _is_named_tensor(key: Any, value: Any) -> bool:
  return isinstance(key, str) and isinstance(value, np.ndarray)


# "ema" as a word of its own, as in model_ema and ema_0.9999, not in schema.
_AVERAGE = re.compile(r"(?<![a-z])ema(?![a-z])", re.IGNORECASE)


def choose(found: Sequence[Place], *, average: bool) -> Place:
  """The place nearest to the file's top, and of several the average, or what is none.

  InputError, listing them, if there are several yet.
  """
  least = min(place.depth for place in found)
  nearest = [place for place in found if place.depth == least]
  alike = [place for place in nearest if bool(_AVERAGE.search(place.where)) == average] or nearest
  if len(alike) > 1:
    names = ", ".join(place.where for place in alike[:8])
    raise InputError(
      f"The file has several models' weights: {names}. Give a file of one of them, or "
      "convert one: python -m launch.convert SOURCE DEST --part=NAME."
    )
  return alike[0]


def _walk(
  content: Mapping[Any, Any], path: tuple[str, ...], seen: set[int]
) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
  """A dictionary and those in it, with their keys, also in lists; each once, so that none may hold
  itself.
  """
  yield path, content
  for key, value in content.items():
    inside = isinstance(value, Mapping) or type(value) in (list, tuple)
    if inside and isinstance(key, str) and id(value) not in seen and len(path) < _MAX_DEPTH:
      seen.add(id(value))
      held = _entries(value)
      if value is not held:  # a list; the tensors in it have no names
        held = {k: v for k, v in held.items() if not isinstance(v, np.ndarray | OddTensor)}
      yield from _walk(held, (*path, key), seen)


def _entries(value: Any) -> Mapping[Any, Any]:
  """A dictionary, or a list as one with its places for keys."""
  return value if isinstance(value, Mapping) else {str(i): x for i, x in enumerate(value)}
