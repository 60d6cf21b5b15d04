"""Configurations: known keys only, frozen, and one workdir belongs to one configuration."""

from __future__ import annotations

import difflib
import importlib.machinery
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
from absl import flags
from ml_collections import config_flags

from vavae_jax.common import keys
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, read_note, write_json
from vavae_jax.common.keys import Key

# A flag that is defined here belongs to the command that asks for it.
flags.disclaim_key_flags()
NAME = "config.json"
# May change without being asked for where it is the last step, before and after.
DECAY = "optimizer.decay_steps"
CHANGES = "changes.jsonl"  # of the configuration while the training went on
# What may change when a run goes on: how long, how often and by what means, not what is computed.
# The answer to a step that is not finite may change too, so that a run can get past one. A model's
# own options of this kind are the task's to name; see `check_workdir`.
MAY_CHANGE = (
  "num_steps",
  "report_waits_after",
  "log_every_steps",
  "log_to",
  "save_every_steps",
  "evaluate_every_steps",
  "keep_checkpoints",
  "keep_every_steps",
  "keep_best",
  "export",
  "non_finite",
  "max_skipped_steps",
  "accumulate_steps",
  "teacher.cache",
  "evaluate_samples",
  "evaluate_probe",
  "latents.valid_path",
  "latents.valid_samples",
  "sample.batch_size",
  "published.num_samples",
  "published.labels",
  "loader.threads",
  "loader.workers",
  "data.max_corrupt",
  "data.changed",
  "stages.begins",  # which follows from epochs, pictures and batches
  "latents.cache",
  "mesh.data",
  "mesh.fsdp",
  # Where things are. Latents are identified by their contents.
  "latents.path",
  "tokenizer",
)
# Keys that came later, by task and section, and what a training did that has none of them.
_PICTURES = {"data": {"split": "position", "changed": "refuse"}}
LATER: dict[str, dict[str, dict[str, Any]]] = {
  "tokenizer": {
    **_PICTURES,
    "model": {"final_norm": True},
    "teacher": {"centre": False},
    "equivariance": {"share": 0.0, "low_share": 0.0, "scales": [0.25, 0.5, 0.75]},
  },
  "classifier": {"data": {**_PICTURES["data"], "pad": 0}, "model": {"standardised": False}},
  "diffusion": {
    "model": {"early_head": 0, "dmf_depth": 0, "position_scale": 1.0},
    "transport": {
      "early_weight": 0.5,
      "map_mu": -0.4,
      "map_end_mu": 1.2,
      "map_guidance": 0.6,
      "map_guidance_start": 0.3,
    },
    "optimizer": {"muon": False},
    "sample": {
      "internal_scale": 1.0,
      "internal_until": 1.0,
      "routed": 0.0,
      "guide_routed": 0.0,
    },
    "route": {"share": 0.0, "until": 0, "first": 2, "last": -4},
  },
}


def define_flag(text: str) -> None:
  """Defines --config and --config.KEY; `resolve` refuses unknown keys."""
  config_flags.DEFINE_config_file(
    "config", None, text, lock_config=False, accept_new_attributes=True
  )
  flags.FLAGS["config"].parser = File()
  flags.declare_key_flag("config")  # else --help leaves it out


class File(flags.ArgumentParser):
  """Reads --config=FILE or FILE:ARGUMENT; InputError, in one line, for whatever is wrong there."""

  def parse(self, argument: str) -> ml_collections.ConfigDict:
    """The configuration that the file's `get_config` returns."""
    file, *argument_of_file = argument.split(":", 1)
    try:
      loader = importlib.machinery.SourceFileLoader("config_file", file)
      spec = importlib.util.spec_from_loader(loader.name, loader)
      module = sys.modules[loader.name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
      loader.exec_module(module)
      config = module.get_config(*argument_of_file)
    except Exception as error:  # the file is anybody's program
      plain = isinstance(error, ValueError | OSError) and str(error)
      text = plain or f"{type(error).__name__}: {error}".removesuffix(": ")
      lines = [x.lineno for x in traceback.extract_tb(error.__traceback__) if x.filename == file]
      where = f" (line {lines[-1]})" if lines and not plain else ""
      raise InputError(" ".join(text.split()) + where) from error
    if not isinstance(config, ml_collections.ConfigDict):
      raise InputError(
        f"get_config of {file} returns {type(config).__name__}; let it return a ConfigDict of "
        "ml_collections."
      )
    config = ml_collections.ConfigDict(config)  # which can be changed
    _check_names(config)
    return config


def _check_names(config: ml_collections.ConfigDict) -> None:
  """Raises InputError where a --config.SECTION.KEY is no name, or the section is not there."""
  known = [name for name, _ in flat(config.to_dict())]
  given = (re.match(r"--?(?:no)?config\.([^=]*)", word) for word in sys.argv[1:])
  for name in (found[1] for found in given if found):
    *sections, last = name.split(".")
    node: Any = config
    for section in sections:
      node = node.get(section) if isinstance(node, ml_collections.ConfigDict) else None
    if not (isinstance(node, ml_collections.ConfigDict) and last.isidentifier()):
      near = difflib.get_close_matches(name, known, n=1)
      hint = f"did you mean config.{near[0]}?" if near else f"there are: {', '.join(config)}"
      raise InputError(f"config.{name} is not a configuration key; {hint}")


def resolve(config: ml_collections.ConfigDict, schema: Mapping[str, Any]) -> Any:
  """Checks every key and value against a tree of all keys, and freezes the result.

  Leaves of `schema` are `Key`s, or default values, which say no more than a type.

  Raises:
    InputError: unknown or missing keys, or values that are not possible, by full names.
  """
  given, known = dict(flat(config.to_dict())), dict(flat(schema))
  for key in given.keys() - known.keys():
    near = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean config.{near[0]}?" if near else f"known are: {', '.join(sorted(known))}"
    raise InputError(f"config.{key} is not a configuration key; {hint}")
  if missing := sorted(known.keys() - given.keys()):
    raise InputError(f"The configuration lacks {', '.join(missing)}.")
  keys.check({k: x if isinstance(x, Key) else Key(x) for k, x in known.items()}, given, "config.")
  return ml_collections.FrozenConfigDict(config)


def check_workdir(
  workdir: Path,
  config: ml_collections.FrozenConfigDict,
  may_change: Iterable[str] = (),
  *,
  with_changes: bool = False,
) -> dict[str, tuple[Any, Any]]:
  """The keys in which a workdir's configuration differs, with the value there and the one now.

  `may_change` are keys that may differ beside those of `MAY_CHANGE`; they are left out.

  Raises:
    InputError: there are any and not `with_changes`, or some say what the weights are; a decay may
      end with the training, wherever that ends.
  """
  path = workdir / NAME
  if not path.exists():
    return {}
  mine = dict(flat(json.loads(json.dumps(config.to_dict()))))
  theirs = dict(flat(read_noted(path)))
  changes = {
    key: (theirs.get(key), mine.get(key))
    for key in sorted(mine.keys() | theirs.keys())
    if mine.get(key) != theirs.get(key) and key not in (*MAY_CHANGE, *may_change)
  }
  follows = all(DECAY in of and of[DECAY] == of["num_steps"] for of in (mine, theirs))
  asked = [key for key in changes if key != DECAY or not follows]
  fixed = [key for key in changes if key.split(".")[0] in ("task", "model")]
  if refused := fixed if with_changes else asked:
    pairs = ((name, *changes[name]) for name in refused)
    listed = "; ".join(f"config.{name}: {there!r} there, {now!r} now" for name, there, now in pairs)
    further = "" if fixed else ", or --resume_with_changes to go on with this one"
    raise InputError(
      f"{workdir} belongs to another configuration ({listed}); give a new --workdir, or the "
      f"configuration it was begun with{further}."
    )
  return changes


def read_noted(path: Path, **kinds: Any) -> dict[str, Any]:
  """A training's config.json with the values `kinds`, as of `read_note`."""
  sections = {name for later in LATER.values() for name in later}
  note = read_note(path, **dict.fromkeys(sections, dict | None) | kinds)
  later = LATER.get(str(note.get("task")), {})
  return note | {name: keys | note.get(name, {}) for name, keys in later.items()}


def check_begun(output: Path, begun: Mapping[str, Any], noted: Mapping[str, Any]) -> None:
  """Raises InputError where a piece of work was begun with other settings than `noted`."""
  if differing := [key for key in noted if begun.get(key) != noted[key]]:
    raise InputError(
      f"{output} was begun with another {', '.join(differing)}; give another output, or the "
      "settings it was begun with, or delete it."
    )


def claim_folder(folder: Path, name: str, noted: Mapping[str, Any]) -> None:
  """Notes in the file `name` of a folder what its contents depend on.

  Raises:
    InputError: the folder holds other files, or was begun with other settings.
  """
  path = folder / name
  if path.is_file():
    check_begun(folder, read_note(path), noted)
  elif folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
    raise InputError(f"{folder} holds other files; give a new --output, or empty it.")
  else:
    write_json(path, noted)


def claim_workdir(
  workdir: Path,
  config: ml_collections.FrozenConfigDict,
  notes: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
  """Writes the configuration into a workdir, and beside it JSON files by their names in `notes`;
  raises InputError where that is not possible.
  """
  if jax.process_index() == 0:
    try:
      for name, note in {**(notes or {}), NAME: config.to_dict()}.items():
        mine, path = json.loads(json.dumps(note)), workdir / name
        if not path.exists() or read_note(path) != mine:
          write_json(path, mine)
    except OSError as error:
      raise InputError(f"The workdir {workdir} cannot be written: {error.strerror}.") from error


def note_changes(workdir: Path, step: int, changes: Mapping[str, tuple[Any, Any]]) -> None:
  """Writes down in a workdir what changes in its configuration, as `check_workdir` gives it."""
  if changes and jax.process_index() == 0:
    path = workdir / CHANGES
    before = path.read_bytes() if path.exists() else b""  # nothing can be appended in a bucket
    with atomic_file(path) as file:
      file.write(before)
      for key, (old, new) in changes.items():
        line = {"step": step, "key": f"config.{key}", "old": old, "new": new}
        file.write(json.dumps(line).encode() + b"\n")


def changes_of(workdir: Path, key: str) -> list[tuple[int, Any, Any]]:
  """(step, old, new) of each change of a key that is noted; InputError: the notes are damaged."""
  path = workdir / CHANGES
  found = []
  for number, line in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
    try:
      note = json.loads(line)
      if note["key"] == f"config.{key}":
        found.append((int(note["step"]), note["old"], note["new"]))
    except (ValueError, LookupError, TypeError) as error:
      raise InputError(
        f"{path} is damaged in line {number} ({error}); bring back the file as it was."
      ) from error
  return found


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Pairs of full name, "optimizer.b1", and value; tuples as lists, as JSON has them."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from flat(value, f"{prefix}{key}.")
    else:
      yield prefix + key, list(value) if isinstance(value, tuple) else value
