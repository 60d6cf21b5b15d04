"""The model folder: the form in which a model travels.

  config.json                how the weights are used: architecture, transport, sampling, classes
  tokenizer.safetensors      between pictures and latents
  diffusion.safetensors      the weights that are sampled; not there in a tokenizer alone
  latents_stats.safetensors  mean and deviation of the latents, with the diffusion model
  README.md, samples.png     for people

Nothing in it refers to a path, and nothing is executed. config.json has the checksum of each other
file that is read, so that damage is found before it is used. A folder is written whole or not at
all.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict, FrozenConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from vavae_jax.common import functional, keys
from vavae_jax.common.addresses import HUB, local_file, with_hub
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import (
  at_home,
  check_free,
  hidden,
  is_url,
  place,
  read_note,
  sha256_of,
  write_json,
  write_safetensors,
)
from vavae_jax.common.keys import DTYPES, Key

FORMAT = 1
CONFIG, CARD, PICTURE = "config.json", "README.md", "samples.png"
STATISTICS = "latents_stats.safetensors"
WEIGHTS = {"tokenizer": "tokenizer.safetensors", "diffusion": "diffusion.safetensors"}
FILES = (CONFIG, CARD, PICTURE, STATISTICS, *WEIGHTS.values())
# What says of a part where its weights are from.
ORIGIN: dict[str, Key] = {
  "step": Key(0, keys.MAYBE, "Of its training."),
  "ema": Key(0.0, "[0, 1)", "Decay of the average that was taken; 0: the weights themselves."),
  "sha256": Key("", text="Of the weights in float32, as their training has them."),
  "data": Key("", text="What they were trained on, for people."),
  "figures": Key((), text="Name, value and protocol of each, by |.", kind=str, is_list=True),
  "evaluations": Key((), text="JSON of each that the card shows.", kind=str, is_list=True),
}
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_IN_CACHE = re.compile(r".*[/\\]models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]\w+")
TAKEN = "a workdir, a model folder, or USER/NAME of a model on the hub"  # by `find`
_NUMBERS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Part:
  """One of the two models.

  Attributes:
    settings: its section of config.json, but for `origin`.
    params: nested dicts of float32 arrays.
    origin: values of the keys `ORIGIN`.
  """

  settings: dict[str, Any]
  params: Any
  origin: dict[str, Any]


def is_model(path: Path) -> bool:
  """Whether a folder is a model's; a workdir has a config.json too."""
  config = path / CONFIG
  return config.is_file() and "format_version" in read_note(config)


def parts_of(folder: Path) -> list[str]:
  """The parts that a model folder has, by the names of `WEIGHTS`."""
  return [name for name in WEIGHTS if name in read_note(folder / CONFIG)]


def find(source: str | os.PathLike[str], files: Sequence[str] = ()) -> Path:
  """The model folder or workdir that a person named; every command, key and call asks here.

  A path of this machine or of a bucket; a model on the hub by USER/NAME or hf:USER/NAME, of which
  the files of a model folder alone are downloaded, once, into the hub's cache. A path that exists
  comes first. With the endings of `files` also such a file, by its path or hf:OWNER/NAME/FILE.
  InputError where there is none.
  """
  name = at_home(os.fspath(source))
  if is_url(name):
    return place(name)
  if Path(name).exists():
    return Path(name)
  repository = name.removeprefix(HUB)
  is_repository = _REPOSITORY.fullmatch(repository) and not name.endswith(tuple(files))
  if files and name.startswith(HUB) and not is_repository:
    return local_file(name)
  if is_repository:
    what = name if name.startswith(HUB) else f"{name} is no folder here, and"
    advice = f"Give {TAKEN}; private ones need the token of hf auth login or HF_TOKEN"
    with with_hub(what, "fetched from the Hugging Face hub", advice):
      found = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(FILES)))
    if not is_model(found):
      raise InputError(f"{name} on the Hugging Face hub is no model folder; give {TAKEN}.")
    return found
  also = f", or a file of weights ({', '.join(files)})" if files else ""
  raise InputError(f"{name} does not exist; give {TAKEN}{also}.")


def address(path: Path) -> str:
  """What names a folder that `find` gave, to be found again: its path, or hf:USER/NAME."""
  if is_url(path):
    return str(path)
  cached = _IN_CACHE.fullmatch(str(path.absolute()))
  return f"{HUB}{cached[1]}/{cached[2]}" if cached else str(path.absolute())


def save(
  folder: Path,
  parts: Mapping[str, Part],
  *,
  dtype: str = "float32",
  about: Mapping[str, Any],
  statistics: Mapping[str, np.ndarray] | None = None,
  files: Mapping[str, bytes] | None = None,
) -> None:
  """Writes a model folder, in place of one that is there.

  Args:
    parts: by the names of `WEIGHTS`.
    dtype: of the weights on disk, one of `DTYPES`.
    about: further entries of config.json.
    statistics: of the latents, "mean" and "std" float32 [Z].
    files: `CARD` and `PICTURE`, where there are any.

  Raises:
    InputError: the folder holds something else, or the disk lacks the space.
  """
  folder = Path(folder).resolve()  # of a link, what it leads to
  check_free_name(folder)
  keys.check({"dtype": Key("float32", DTYPES)}, {"dtype": dtype})
  number = _NUMBERS[dtype]
  tensors = {WEIGHTS[name]: _flat(part.params, number) for name, part in parts.items()}
  if statistics:
    tensors[STATISTICS] = {name: np.asarray(x, np.float32) for name, x in statistics.items()}
  folder.parent.mkdir(parents=True, exist_ok=True)
  size = sum(x.nbytes for each in tensors.values() for x in each.values())
  check_free(folder.parent, size, "for the model; free some space, or choose another folder")
  # By the process, so that two which write the same folder do not take each other's files.
  aside = hidden(folder, f"{os.getpid()}.partial")
  partial, replaced = aside / "new", aside / "old"
  try:
    for name, arrays in tensors.items():
      write_safetensors(partial / name, arrays)
    for name, content in (files or {}).items():
      (partial / name).write_bytes(content)
    config: dict[str, Any] = {"format_version": FORMAT, "dtype": dtype}
    config |= {name: {**part.settings, "origin": part.origin} for name, part in parts.items()}
    config |= {**about, "files": {name: sha256_of(partial / name) for name in tensors}}
    write_json(partial / CONFIG, config)
    if folder.exists():
      folder.rename(replaced)
    partial.rename(folder)
  finally:
    if replaced.exists() and not folder.exists():
      replaced.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def check_free_name(folder: Path) -> None:
  """Raises InputError where there is something else than a model folder, which may be lost."""
  there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
  if folder.exists() and not (folder.is_dir() and (is_model(folder) or not there)):
    raise InputError(f"{folder} is no model folder; give another name, or move it away.")
  if others := sorted({*there} - {*FILES}):
    raise InputError(
      f"{folder} has other files than a model's, {', '.join(others[:4])}: give another name, or "
      "move them away."
    )


def _flat(params: Any, number: Any) -> dict[str, np.ndarray]:
  return {_name(path): np.asarray(x).astype(number) for path, x in flatten_dict(params).items()}


def _name(path: tuple[str | int, ...]) -> str:
  return ".".join(map(str, path))  # layers of a list have numbers


def frozen(table: Mapping[str, Any], config: FrozenConfigDict) -> FrozenConfigDict:
  """Of a training's configuration what a tree of keys has; defaults, where it is older than one."""

  def only(table: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return {
      k: given.get(k, x.default) if isinstance(x, Key) else only(x, given.get(k, {}))
      for k, x in table.items()
    }

  return FrozenConfigDict(ConfigDict(only(table, config.to_dict())))


def read_config(folder: Path, table: Mapping[str, Any], part: str) -> dict[str, Any]:
  """config.json, with the section of a part completed by the defaults of its tree of keys.

  Raises:
    InputError: no model folder, one without that part, of another version, or with keys or values
      that are not known.
  """
  path = folder / CONFIG
  if not path.is_file() or not is_model(folder):
    raise InputError(f"{folder} is no model folder: it has no {CONFIG} of one.")
  config = read_note(path, files=dict)
  if part not in config:
    raise InputError(f"{folder} has no {part}; give a model folder that has one.")
  if config["format_version"] != FORMAT:
    raise InputError(
      f"{path} has format_version {config['format_version']!r}, but this version of the project "
      f"reads {FORMAT}; install one that fits."
    )
  known = {
    part: {**table, "origin": ORIGIN},
    "format_version": Key(FORMAT),
    "dtype": Key("float32", DTYPES),
    "files": dict.fromkeys((*WEIGHTS.values(), STATISTICS), Key("")),
  }
  names = config.pop("class_names", [])
  if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
    raise InputError(f"{path}: class_names is no list of names.")
  mine = {name: x for name, x in config.items() if name == part or name not in WEIGHTS}
  return keys.complete(known, mine, f"{path}: ") | {"class_names": names}


def load(
  folder: Path,
  name: str,
  table: Mapping[str, Any],
  build: Callable[[FrozenConfigDict], functional.Build],
  step: int | None = None,
  ema: float | None = None,
) -> tuple[Part, dict[str, Any]]:
  """A part of a model folder, and its whole config.json.

  Args:
    table: the part's tree of keys.
    build: makes a module, for `functional`, of the settings.
    step, ema: what the weights must be of; None: of any.

  Raises:
    InputError: the folder is none, damaged, of another step, or does not fit its settings, or
      numbers are not finite.
  """
  config = read_config(folder, table, name)
  settings = config[name]
  origin = settings.pop("origin")
  for key, wanted in (("step", step), ("ema", ema)):
    if wanted not in (None, origin[key]):
      raise InputError(
        f"{folder} has the weights of {key} {origin[key]} alone, and not of {wanted}."
      )
  network = build(FrozenConfigDict(ConfigDict(settings)))
  functional.outline(network, f"{folder / CONFIG}: {name}")
  initial = functools.partial(functional.init, network)
  paths = flatten_dict(jax.eval_shape(initial, jax.random.key(0)))
  shapes = {_name(path): x.shape for path, x in paths.items()}
  path = folder / WEIGHTS[name]
  tensors = read_tensors(folder, WEIGHTS[name], config["files"])
  if odd := sorted(shapes.keys() ^ tensors.keys()):
    raise InputError(f"{path} has other tensors than its {CONFIG} asks for: {', '.join(odd[:4])}.")
  for key, shape in shapes.items():
    if tensors[key].shape != shape:
      raise InputError(f"{path}: {key} is {tensors[key].shape}, but {CONFIG} asks for {shape}.")
  params = unflatten_dict({x: np.asarray(tensors[_name(x)], np.float32) for x in paths})
  functional.check_finite(params, str(path))
  return Part(settings, params, origin), config


def workdir_config(workdir: Path, task: str) -> FrozenConfigDict:
  """The configuration that a workdir of a task notes; InputError if it is no such workdir."""
  path = workdir / CONFIG
  if not path.is_file():
    raise InputError(f"{workdir} is neither a model folder nor a workdir: it has no {CONFIG}.")
  noted = read_note(path, task=str, model=dict, optimizer=dict)
  if noted["task"] != task:
    raise InputError(f"{workdir} is the workdir of a {noted['task']}, but a {task} is needed.")
  return FrozenConfigDict(ConfigDict(noted))


def read_tensors(folder: Path, name: str, files: Mapping[str, str]) -> dict[str, np.ndarray]:
  """The arrays of a file; InputError where it is missing or not the one that config.json names."""
  path = folder / name
  if not path.is_file():
    raise InputError(f"{folder} was not copied whole: it has no {name}. Copy it again.")
  if sha256_of(path) != files.get(name):
    raise InputError(f"{path} is not the file that {CONFIG} names: copy the folder again.")
  try:
    return load_file(path)
  except (SafetensorError, OSError, ValueError, LookupError, AttributeError) as error:
    raise InputError(f"{path} is no safetensors file of numbers ({error}).") from error
