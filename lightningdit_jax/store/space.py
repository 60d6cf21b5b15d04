"""What a diffusion model must know of the latents that it was trained on, wherever they are now."""

from __future__ import annotations

import csv
import dataclasses
import difflib
import io
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from lightningdit_jax.store.latents import LatentStore, mean_and_std
from vavae_jax import folder
from vavae_jax.common.addresses import HUB
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place, read_note
from vavae_jax.tokenizer import SETTINGS as TOKENIZER

NOTE = "latents.json"  # in a training's workdir


@dataclasses.dataclass(frozen=True)
class Space:
  """The latent space of a model.

  Attributes:
    mean, std: of each channel, float32 [Z].
    class_names: of the labels; empty where nobody named them.
    tokenizer: "workdir", "step" and "sha256" of what made the latents; empty if that is not known.
    records: how many latents there were; 0 if that is not known.
  """

  mean: np.ndarray
  std: np.ndarray
  class_names: tuple[str, ...] = ()
  tokenizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  records: int = 0

  @classmethod
  def of(cls, store: LatentStore) -> Space:
    """That of stored latents."""
    about = store.manifest
    names, made = tuple(about.get("class_names", ())), about.get("tokenizer", {})
    return cls(store.mean, store.std, names, made, len(store))

  @classmethod
  def read(cls, path: Path) -> Space:
    """From what `note` gave, as JSON; InputError if the file is damaged."""
    note = read_note(path, mean=list, std=list, class_names=list, tokenizer=dict)
    try:
      numbers = {name: np.array(note[name], np.float32) for name in ("mean", "std")}
      mean, std = mean_and_std(numbers)
      names, made = tuple(note["class_names"]), dict(note["tokenizer"])
      return cls(mean, std, names, made, int(note.get("records", 0)))
    except (TypeError, ValueError) as error:
      raise InputError(f"{path} is damaged ({error}); bring back the file as it was.") from error

  @classmethod
  def of_folder(cls, path: Path, config: Mapping[str, Any]) -> Space:
    """That of a model folder, whose config.json is given; InputError if its file is damaged."""
    mean, std = mean_and_std(folder.read_tensors(path, folder.STATISTICS, config["files"]))
    made = {}
    if "tokenizer" in folder.parts_of(path):
      origin = folder.read_config(path, TOKENIZER, "tokenizer")["tokenizer"]["origin"]
      made = {name: origin[name] for name in ("step", "sha256")}
    return cls(mean, std, tuple(config["class_names"]), made)

  def note(self) -> dict[str, Any]:
    """For JSON, which keeps float32 as it is."""
    return {
      "mean": self.mean.tolist(),
      "std": self.std.tolist(),
      "class_names": list(self.class_names),
      "tokenizer": dict(self.tokenizer),
      "records": self.records,
    }


def check_classes(names: Sequence[str], count: int, where: str) -> None:
  """Raises InputError where the classes of latents are named and not `count`, as a model has."""
  if names and len(names) != count:
    raise InputError(
      f"{where} has {len(names)} classes, but config.model.num_classes is {count}: a class that "
      "nothing is trained on gives noise, and one more than the model has cannot be learned. Train "
      f"with config.model.num_classes={len(names)}."
    )


def label_of(given: str | int, names: Sequence[str], count: int) -> int:
  """The label of a class by its name, or by its number among `count`; InputError for another."""
  if isinstance(given, str):
    if given not in names:
      near = difflib.get_close_matches(given, names, 3) or names[:20]
      known = ", ".join(near) or f"no names; give 0 to {count - 1}"
      raise InputError(f"There is no class {given!r}; there are {known}.")
    return list(names).index(given)
  number: Any = None if isinstance(given, bool) else given
  try:
    label = operator.index(number)
  except TypeError as error:
    message = f"There is no class {given!r}; give a name, or a number below {count}."
    raise InputError(message) from error
  if not 0 <= label < count:
    raise InputError(f"There is no class {label}; they are 0 to {count - 1}.")
  return label


def labels_for(
  kind: str, num_samples: int, num_classes: int, seed: int, names: Sequence[str] = ()
) -> np.ndarray:
  """The label of each sample, int32 [num_samples] below `num_classes`.

  `kind` is "balanced" (every class as often), "uniform" (random, by `seed`), or labels and names of
  classes, as in '3,7,"cat, wild"', repeated; a class that is called 7 comes before the number 7,
  and a name alone needs no quotes. InputError where there is no such class, or the model has
  other classes than its latents had.
  """
  check_classes(names, num_classes, "What the model was trained on")
  if kind == "balanced":
    return np.arange(num_samples, dtype=np.int32) % num_classes
  if kind == "uniform":
    return np.random.default_rng(seed).integers(num_classes, size=num_samples, dtype=np.int32)
  try:
    words = [kind] if kind in names else next(csv.reader([kind], skipinitialspace=True)) or [kind]
    given = [label_of(_word(word, names), names, num_classes) for word in words]
  except (InputError, csv.Error) as error:
    raise InputError(
      f'--labels is {kind!r}: {error} "balanced" and "uniform" are for all of them.'
    ) from error
  return np.resize(np.asarray(given, np.int32), num_samples)


def as_labels(classes: Sequence[str | int]) -> str:
  """Names and numbers of classes as `labels_for` reads them; a name is quoted, whatever it is."""
  text = io.StringIO()
  csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="").writerow(classes)
  return text.getvalue()


def _word(word: str, names: Sequence[str]) -> str | int:
  """The number of a class where nothing is called so."""
  return int(word) if word not in names and re.fullmatch(r"-?[0-9]{1,9}", word) else word


class Identified(Protocol):
  """A model that is known by a hash of its weights."""

  @property
  def sha256(self) -> str: ...


T = TypeVar("T", bound=Identified)


def find_tokenizer(
  noted: Mapping[str, Any],
  load: Callable[[Path, int | None], T],
  *,
  of: str,
  given: str = "",
  workdir: Path | None = None,
) -> T:
  """The tokenizer of a latent space, by its note.

  `load` reads that of a workdir or model folder, by the step if that is not None; the others are as
  for `place_of_tokenizer`. InputError if the tokenizer is unknown, gone, or another one.
  """
  there = place_of_tokenizer(noted, of=of, given=given, workdir=workdir)
  found = load(there, None if folder.is_model(there) else noted.get("step"))
  if noted and noted.get("sha256") != found.sha256:
    raise InputError(
      f"The tokenizer in {there} is not the one that made the latents of {of} (sha256 "
      f"{found.sha256[:12]} and {str(noted.get('sha256'))[:12]}): samples would decode to noise. "
      "Give --tokenizer=WORKDIR of the right one, or encode and train again."
    )
  return found


def place_of_tokenizer(
  noted: Mapping[str, Any], *, of: str, given: str = "", workdir: Path | None = None
) -> Path:
  """The workdir or model folder of a latent space's tokenizer.

  Args:
    noted: as `Space.tokenizer`.
    of: whose latents they are, for messages.
    given: where a person named it; else it is looked for where it was, and then beside `workdir`.
    workdir: of the model that was trained on the latents.

  Raises:
    InputError: the tokenizer is unknown or gone.
  """
  was = noted.get("workdir", "")
  beside = workdir.parent / Path(was).name if was and workdir else ""
  places = (given,) if given else (was, str(beside))
  is_named = bool(given)
  paths = [folder.find(x) if is_named or x.startswith(HUB) else place(x) for x in places if x]
  if not paths:
    raise InputError(
      f"{of} does not say which tokenizer made its latents; give --tokenizer=WORKDIR."
    )
  there = next((path for path in paths if (path / folder.CONFIG).exists()), paths[0])
  if not given and not (there / folder.CONFIG).exists():
    raise InputError(
      f"The tokenizer that made the latents of {of} was in {there} and is gone; give "
      "--tokenizer=WORKDIR, or a model folder that has it."
    )
  return there
