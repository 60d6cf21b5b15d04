"""What a number needs, where that is, and where it is published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub

from launch.engine import console
from launch.evaluation.features import CACHES, EFFICIENTNET
from launch.reproduce.records import File, Pictures, Record
from vavae_jax import folder
from vavae_jax.common.addresses import HUB, local_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import at_home
from vavae_jax.metrics import inception
from vavae_jax.weights.state_dicts import SUFFIXES


def _flag(text: str, default: Any = "") -> Any:
  """A field of `Given`, and its flag."""
  return dataclasses.field(default=default, metadata={"text": text})


_EITHER = f"{folder.TAKEN}, or a file of weights, also hf:OWNER/NAME/FILE; the published one if not"


@dataclasses.dataclass(frozen=True)
class Given:
  """What a person gave, by the flags of the command; "" where nothing."""

  tokenizer: str = _flag(f"The tokenizer: {_EITHER} given.")
  diffusion: str = _flag(f"The diffusion model: {_EITHER} given.")
  latents: str = _flag("Latents to train on.")
  statistics: str = _flag("Statistics of the latents, a file, or latents that have them.")
  reference: str = _flag("FID's reference, ADM's npz.")
  inception: str = _flag("FID's Inception, as pytorch-fid publishes it.")
  pictures: str = _flag("ImageNet's training pictures, any source of docs/data.md.")
  validation: str = _flag("ImageNet's validation pictures, for rFID.")
  teacher: str = _flag("The teacher's file, to train a tokenizer.")
  lpips_vgg: str = _flag("LPIPS' VGG16, config.perceptual.vgg if not given.")
  lpips_heads: str = _flag("LPIPS' heads, config.perceptual.heads if not given.")
  train: bool = _flag("Train the model, whatever weights are published.", False)
  seed: int = _flag("Of training, noise and labels.", 0)
  set: tuple[str, ...] = _flag("KEY=VALUE of a key that changes no number.", ())
  allow: tuple[str, ...] = _flag("A cause of docs/reproduce.md to go on in spite of.", ())


class Need(NamedTuple):
  """A file or folder: what is given for it, what is published, and paths where it may be."""

  what: str
  given: str
  file: File
  places: tuple[str, ...]

  def find(self, fetch: bool = True) -> Path | None:
    """Where it is, or None; the hub is asked if `fetch`. InputError: it cannot be had there."""
    if self.given:
      return folder.find(self.given, files=SUFFIXES)
    there = [Path(at_home(place)) for place in self.places if Path(at_home(place)).exists()]
    if there or not self.file.address.startswith(HUB):
      return there[0] if there else None
    if fetch:
      return local_file(self.file.address)
    owner, name, file = self.file.address.removeprefix(HUB).split("/", 2)
    cached = huggingface_hub.try_to_load_from_cache(f"{owner}/{name}", file)
    return Path(cached) if isinstance(cached, str) else None


def needs(record: Record, given: Given) -> dict[str, Need]:
  """What a number needs, by the flag that takes it."""
  found: dict[str, Need] = {}

  def need(what: str, flag: str, file: File, *places: str) -> None:
    found[flag] = Need(what, getattr(given, flag), file, places)

  def pictures(wanted: Pictures, flag: str) -> None:
    if not getattr(given, flag):  # else whoever opens them says what is wrong
      need(wanted.name, flag, File(wanted.address), wanted.source.partition(":")[2])

  if record.protocol != EFFICIENTNET:  # which is installed
    places = CACHES if record.protocol in inception.PROTOCOLS else ()
    need("FID's Inception", "inception", record.network, *places)
  if record.recipe or not given.train:
    need(f"tokenizer {record.tokenizer.name}", "tokenizer", record.tokenizer.file)
  if record.recipe:
    need("FID's reference", "reference", record.reference, f"data/{record.reference.name}")
  else:
    pictures(record.validation, "validation")
  if given.train and not given.latents:
    pictures(record.pictures, "pictures")
    if record.statistics.address or given.statistics:
      need("statistics of the latents", "statistics", record.statistics)
  if record.recipe and not given.train:
    need("the model's weights", "diffusion", record.weights)
    if not given.diffusion or given.diffusion.endswith(SUFFIXES):  # others know them
      need("statistics of the latents", "statistics", record.statistics)
  return found


def find_all(record: Record, given: Given) -> dict[str, Path]:
  """Where the needs are, by flag; InputError that names all that are nowhere."""
  paths, missing = {}, []
  for flag, need in needs(record, given).items():
    reason = f"published at {need.file.address}" if need.file.address else "published nowhere"
    try:
      path = need.find()
    except InputError as error:
      why = str(error).partition(". ")[0].removeprefix(f"{need.file.address} ").rstrip(".")
      path, reason = None, f"{reason}; {why}"
    if flag == "tokenizer":
      reason += f"; python -m launch.train --config={record.tokenizer.recipe} makes one"
    elif flag == "diffusion":
      reason += "; --train makes them"
    if path:
      paths[flag] = path
    else:
      missing.append(f"--{flag}")
      place = f", or put it at {need.places[0]}" if need.places else ""
      console.say(f"missing: {need.what}, {reason}; --{flag} takes it{place}")
  if missing:
    raise InputError(f"Give {', '.join(missing)}: what they take is missing, and named above.")
  return paths
