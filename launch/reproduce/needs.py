"""What a number needs, where that is, and where it is published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from ml_collections import ConfigDict

from launch.engine import console
from launch.evaluation.features import CACHES, EFFICIENTNET
from launch.reproduce.given import Given
from launch.reproduce.recipes import config_of
from launch.reproduce.records import File, Record
from vavae_jax import folder, teachers
from vavae_jax.common.addresses import HUB, local_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import at_home
from vavae_jax.metrics import inception
from vavae_jax.weights.state_dicts import SUFFIXES

LPIPS_VGG = File(f"{HUB}timm/vgg16.tv_in1k/model.safetensors")
LPIPS_HEADS = File("https://github.com/richzhang/PerceptualSimilarity")


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


def reads(record: Record, given: Given) -> dict[str, bool]:
  """Of each flag that names a file or a source, whether anything reads it."""
  sampled, train = bool(record.recipe), given.train
  aligned = train and not sampled and bool(_tokenizer(record).teacher.name)
  encoded = train and not (sampled and given.latents)
  # A workdir knows them; and the latents that are encoded have their own.
  fixed = not given.diffusion or given.diffusion.endswith(SUFFIXES)
  wanted = bool(record.statistics.address or given.statistics) if train else fixed
  return {
    "tokenizer": sampled or not train,
    "diffusion": sampled and not train,
    "latents": sampled and train,
    "statistics": sampled and wanted and not (train and given.latents),
    "reference": sampled,
    "inception": record.protocol != EFFICIENTNET,  # which is installed
    "pictures": encoded,
    "validation": not sampled,
    **dict.fromkeys(("lpips_vgg", "lpips_heads"), not sampled),
    "teacher": aligned,
  }


def _tokenizer(record: Record) -> ConfigDict:
  """The configuration by which a number's tokenizer is trained."""
  return config_of(record.tokenizer.recipe, {})


def check_read(record: Record, given: Given) -> None:
  """Raises InputError for flags that would change nothing."""

  def unread(given: Given) -> list[str]:
    read = reads(record, given)
    files = [flag for flag in read if getattr(given, flag) and not read[flag]]
    # Of weights that are there only the sampler can be set.
    words = [x for x in given.set if not record.recipe or not x.startswith("sample.")]
    return [*files, *(f"set={word}" for word in words if not given.train)]

  if found := unread(given):
    leave = "leave out what nothing reads"
    if not unread(dataclasses.replace(given, train=not given.train)):
      leave += ", or --train" if given.train else ", or give --train"
    named = " and ".join(f"--{flag}" for flag in found)
    raise InputError(f"{named} would not be read for this number as it is asked for; {leave}.")


def needs(record: Record, given: Given) -> dict[str, Need]:
  """What a number needs, by the flag that takes it."""
  read = reads(record, given)
  places = {
    "inception": CACHES if record.protocol in inception.PROTOCOLS else (),
    "reference": (f"data/{record.reference.name}",),
  }
  found: dict[str, Need] = {}
  for flag, what, file in (
    ("inception", "FID's Inception", record.network),
    ("tokenizer", f"tokenizer {record.tokenizer.name}", record.tokenizer.file),
    ("reference", "FID's reference", record.reference),
    ("diffusion", "the model's weights", record.weights),
    ("statistics", "statistics of the latents", record.statistics),
  ):
    if read[flag]:
      found[flag] = Need(what, getattr(given, flag), file, tuple(places.get(flag, ())))
  for flag, wanted in (("validation", record.validation), ("pictures", record.pictures)):
    if read[flag] and not getattr(given, flag):  # else whoever opens them says what is wrong
      source = wanted.source.partition(":")[2]
      found[flag] = Need(wanted.name, "", File(wanted.address), (source,))
  if given.train and not record.recipe:
    found |= _to_train(_tokenizer(record), given)
  return found


def _to_train(config: ConfigDict, given: Given) -> dict[str, Need]:
  """The frozen networks of a tokenizer's training, but for those that are installed."""
  found: dict[str, Need] = {}
  name, files = config.teacher.name, config.perceptual
  if name and (published := teachers.find(name)[1].published):
    address = File(published.partition(", ")[0])
    found["teacher"] = Need(f"the teacher {name}", given.teacher, address, ())
  learnt = files.network == "lpips" and config.loss.perceptual_weight > 0
  if learnt and not given.lpips_vgg:  # else whoever reads it says what is wrong
    found["lpips_vgg"] = Need("LPIPS' VGG16", "", LPIPS_VGG, (files.vgg,))
    if not given.lpips_heads:
      found["lpips_heads"] = Need("LPIPS' heads", "", LPIPS_HEADS, (files.heads,))
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
