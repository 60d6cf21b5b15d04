"""Pictures in data sets that others have prepared: tensorflow-datasets, Hugging Face."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import numpy as np
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import named_files
from vavae_jax.data.sources.base import Source, Unreadable, checked_label, listing_of
from vavae_jax.data.sources.listing import NO_CLASS, is_hidden


class TensorFlowDatasets(Source):
  """A prepared data set of tensorflow-datasets with an "image" and perhaps a "label".

  "NAME/SPLIT", such as "imagenet2012/train" or "cifar10:3.0.2/train[:90%]", is looked for in
  TFDS_DATA_DIR or ~/tensorflow_datasets, prepared with file_format="array_record".
  """

  def __init__(self, name_and_split: str):
    import tensorflow_datasets as tfds  # slow, and only needed here

    name, _, split = name_and_split.rpartition("/")
    if not name:
      raise InputError(f"tfds:{name_and_split} names no split; write tfds:NAME/SPLIT.")
    self._name = name_and_split
    try:
      builder = tfds.builder(name)
      features = builder.info.features
      if features is None or "image" not in features:
        raise InputError(f"tfds:{name} has no feature called image, but {features}.")
      self._records = builder.as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
      )
    except InputError:
      raise
    except Exception as error:  # its libraries raise kinds of their own
      reason = " ".join(str(error).split())[:200]
      raise InputError(
        f"tfds:{name_and_split} cannot be opened ({reason}). Prepare it with "
        f'tfds.builder("{name}", file_format="array_record").download_and_prepare(), and set '
        "TFDS_DATA_DIR to the folder it is in."
      ) from error
    self._has_label = "label" in features
    class_names = getattr(features["label"], "names", None) if self._has_label else [NO_CLASS]
    if class_names is None:
      raise InputError(f"tfds:{name} has the label {features['label']}; needed is a ClassLabel.")
    self.class_names = list(class_names)
    self._identity = f"{builder.info.full_name} {split} {len(self._records)}"

  def __len__(self) -> int:
    return len(self._records)

  def encoded(self, index: int) -> tuple[bytes, int]:
    try:
      record = self._records[index]
    except (RuntimeError, ValueError) as error:
      raise Unreadable(f"The record {self.name(index)} is damaged ({error}).") from error
    label = record["label"] if self._has_label else 0
    return record["image"], checked_label(label, self, index)

  def name(self, index: int) -> str:
    return f"tfds:{self._name}#{index}"

  def identity(self) -> str:
    return hashlib.sha256(self._identity.encode()).hexdigest()


# What a column of labels may be called, the likeliest first: numbers, or names of classes.
_LABELS = ("label", "labels", "fine_label", "cls", "label_name")


class HuggingFace(Source):
  """Parquet files with pictures, as Hugging Face stores data sets.

  A parquet file is read by groups of rows; whoever reads at random, as training does, reads a group
  for each picture. `launch.prepare` makes ArrayRecord files of it, once.

  The path is a parquet file, a pattern of such, a folder with some, or OWNER/NAME[/SPLIT] on the
  hub, of which the parquet files (those whose names begin with the split) are fetched.
  """

  def __init__(self, path: str):
    import pyarrow.parquet as parquet  # slow, and only needed here

    self._files = _parquet_files(path)
    try:
      opened = [parquet.ParquetFile(file) for file in self._files]
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
      raise InputError(f"hf:{path} is damaged or not parquet ({error}).") from error
    schema = opened[0].schema_arrow
    pictures = [f.name for f in schema if f.name in ("image", "img", "webp", "jpg", "png")]
    if not pictures or any(file.schema_arrow.names != schema.names for file in opened):
      raise InputError(
        f"hf:{path} has the columns {', '.join(schema.names)}; needed are image and label, the "
        "same in all files."
      )
    named = _classes_in(schema)
    labels = [name for name in (*_LABELS, *sorted(named)) if name in schema.names]
    self._columns = pictures[:1] + labels[:1]
    if labels[:1] != ["label"] or len({*labels, *pictures}) > 2:
      others = ", ".join(name for name in schema.names if name not in self._columns)
      self.beside = (
        f"its columns {others or 'of labels: none'}; taken are {pictures[0]} and "
        f"{labels[0] if labels else 'one class for all'}"
      )
    # Where each group of rows begins: [file, group, first row].
    groups = [
      (number, group, file.metadata.row_group(group).num_rows)
      for number, file in enumerate(opened)
      for group in range(file.num_row_groups)
    ]
    self._groups = [(number, group) for number, group, _ in groups]
    self._starts = np.cumsum([0, *(rows for *_, rows in groups)])
    if not len(self):
      raise InputError(f"hf:{path} has no rows.")
    self.class_names = self._names_of(named, labels[:1])
    self._labels = {name: label for label, name in enumerate(self.class_names)}

  def _names_of(self, named: Mapping[str, list[str]], label: list[str]) -> list[str]:
    if not label:
      return [NO_CLASS]
    if label[0] in named:
      return named[label[0]]
    found: dict[type, set[Any]] = {}
    for file, group in self._groups:
      for value in _group(self._files[file], group, (label[0],))[label[0]]:
        if not isinstance(value, int | str | None):
          raise InputError(
            f"{self._files[file]} has the label {value!r}; needed are numbers or names of classes."
          )
        found.setdefault(type(value), set()).add(value)
    found.pop(type(None), None)  # such rows are unreadable
    if str in found and len(found) > 1:
      raise InputError(
        f"{self._files[0]} and those beside it have numbers and names as labels; take either."
      )
    if str in found:
      return sorted(found[str])
    largest = max((max(values) for values in found.values()), default=0)
    if largest > 10**6:
      raise InputError(f"hf:{self._files[0]} has the label {largest}, too large for a class.")
    return [str(i) for i in range(largest + 1)]

  def __len__(self) -> int:
    return int(self._starts[-1])

  def encoded(self, index: int) -> tuple[bytes, int]:
    place = int(np.searchsorted(self._starts, index, "right")) - 1
    file, group = self._groups[place]
    try:
      rows = _group(self._files[file], group, tuple(self._columns))
    except (OSError, ValueError) as error:
      raise Unreadable(f"The rows of {self.name(index)} are damaged ({error}).") from error
    row = index - int(self._starts[place])
    image = rows[self._columns[0]][row]
    data = image.get("bytes") if isinstance(image, dict) else image
    if not isinstance(data, bytes):
      raise Unreadable(f"{self.name(index)} is not a picture's file but {type(data).__name__}.")
    label = rows[self._columns[1]][row] if len(self._columns) > 1 else 0
    if label is None:
      raise Unreadable(f"{self.name(index)} has no label.")
    if isinstance(label, str):
      label = self._labels.get(label, label)
    return data, checked_label(label, self, index)

  def name(self, index: int) -> str:
    return f"hf:{Path(self._files[0]).parent}#{index}"

  def identity(self) -> str:
    sizes = [(file, os.path.getsize(file)) for file in self._files]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()

  def listing(self) -> str:
    return listing_of(f"{Path(file).name} {os.path.getsize(file)}" for file in self._files)


@functools.lru_cache(maxsize=8)
def _group(file: str, group: int, columns: tuple[str, ...]) -> dict[str, list[Any]]:
  import pyarrow.parquet as parquet

  with io.FileIO(file) as opened:
    return parquet.ParquetFile(opened).read_row_group(group, columns=list(columns)).to_pydict()


def _unreadable(error: OSError) -> NoReturn:
  raise InputError(
    f"The folder {error.filename} cannot be read ({error.strerror}); name the folder of the "
    "parquet files alone."
  ) from error


def _classes_in(schema: Any) -> dict[str, list[str]]:
  """Column -> the names of its classes, of those that a set declares with such."""
  try:
    noted = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = noted["info"]["features"].items()
  except (ValueError, LookupError, TypeError, AttributeError):
    return {}  # not every set names its classes
  return {
    column: [str(name) for name in about["names"]]
    for column, about in features
    if isinstance(about, dict) and isinstance(about.get("names"), list) and about["names"]
  }


# A split's name in that of a file or folder, by itself.
_SPLIT = re.compile(
  r"(?<![a-z])(train(?:ing)?|valid(?:ation)?|val|dev|test(?:ing)?|eval(?:uation)?)(?![a-z])", re.I
)


def _parquet_files(path: str) -> list[str]:
  if os.path.isdir(path):
    return _of_one_split(_below(path), path)
  if found := [str(file) for file in named_files(path)]:
    return _of_one_split(found, path)
  if path.count("/") not in (1, 2) or path.startswith((".", "/")):
    raise InputError(f"hf:{path} has no parquet files.")
  owner, name, *split = path.split("/")
  pattern = f"{split[0]}*.parquet" if split else "*.parquet"
  patterns = [pattern, f"*/{pattern}"]
  try:
    folder = huggingface_hub.snapshot_download(
      f"{owner}/{name}", repo_type="dataset", allow_patterns=patterns
    )
  except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
    reason = str(error).strip().partition("\n")[0]
    raise InputError(
      f"hf:{path} is not a file or folder here, and could not be fetched ({reason}). Without a "
      f"network, fetch the parquet files of {owner}/{name} elsewhere, and give their folder."
    ) from error
  # Where other splits may be, too, which were fetched before.
  there = {os.path.relpath(file, folder): file for file in _below(folder)}
  fitting = [file for name, file in there.items() if any(fnmatch(name, x) for x in patterns)]
  exact = [file for name, file in there.items() if file in fitting and [_split_of(name)] == split]
  if not fitting:
    begins = f" whose names begin with {split[0]}; its split" if split else ""
    raise InputError(
      f"{owner}/{name} has no parquet files{begins} was not fetched yet, or is called otherwise."
    )
  return _of_one_split(exact or fitting, path, hub=f"{owner}/{name}")


def _below(folder: str) -> list[str]:
  """The parquet files in a folder and those in it, sorted; none if there is no such folder."""
  walk = os.walk(folder, onerror=_unreadable) if os.path.isdir(folder) else ()
  paths = (Path(at, name) for at, _, names in walk for name in names)
  files = (file for file in paths if file.suffix == ".parquet" and file.is_file())
  return sorted(str(x) for x in files if not is_hidden(x.relative_to(folder).as_posix()))


def _of_one_split(found: list[str], path: str, hub: str = "") -> list[str]:
  """The files; InputError if there are none, or of several splits."""
  if not found:
    raise InputError(f"hf:{path} has no parquet files.")
  base = os.path.commonpath([os.path.dirname(file) for file in found])
  splits = {_split_of(os.path.relpath(file, base)): file for file in reversed(found)}
  splits.pop("", None)
  if len(splits) > 1:
    chosen = min(splits)
    one = f"{hub}/{chosen}" if hub else _pattern_of(chosen, splits[chosen], base)
    raise InputError(
      f"hf:{path} has the splits {', '.join(sorted(splits))}; choose one, such as hf:{one}."
    )
  return found


def _split_of(name: str) -> str:
  """The split that the name of a file tells, or that of a folder above it; "" where none does."""
  *folders, file = Path(name).with_suffix("").parts
  if numbered := re.fullmatch(r"(.+?)-\d+-of-\d+.*", file):
    return numbered[1]
  named = [part for part in (*folders, re.sub(r"[-_.]?\d+$", "", file)) if _SPLIT.search(part)]
  return named[-1] if named else ""


def _pattern_of(split: str, file: str, base: str) -> str:
  """What names the files of a split, of which one is given."""
  *folders, name = Path(os.path.relpath(file, base)).parts
  own = f"{split}*.parquet" if name.startswith(split) else "*.parquet"
  return str(Path(base, *(part if part == split else "*" for part in folders), own))
