"""Files on the Hugging Face hub, and short names of those that the paper's authors released."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vavae_jax import folder
from vavae_jax.common.addresses import HUB
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url
from vavae_jax.weights.state_dicts import SUFFIXES


class Released(NamedTuple):
  """A released file and the module of its training's configuration."""

  file: str
  config: str = ""


RELEASED = {
  "vavae-f16d32-dinov2": Released(
    "hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt",
    "configs.vavae_f16d32",
  ),
  "lightningdit-xl-64ep": Released(
    "hustvl/lightningdit-xl-imagenet256-64ep/lightningdit-xl-imagenet256-64ep.pt",
    "configs.lightningdit_xl_64ep",
  ),
  "lightningdit-xl-800ep": Released(
    "hustvl/lightningdit-xl-imagenet256-800ep/lightningdit-xl-imagenet256-800ep.pt",
    "configs.lightningdit_xl_800ep",
  ),
  "latents-stats": Released("hustvl/vavae-imagenet256-f16d32-dinov2/latents_stats.pt"),
}


def config_of(source: str) -> str:
  """The module of the configuration of a released file, by short name or file name; "" if none."""
  for name, released in RELEASED.items():
    if source == name or Path(source).name == Path(released.file).name:
      return released.config
  return ""


def find(source: str) -> Path:
  """The path of weights: a key of `RELEASED`, or whatever `folder.find` takes, a file too.

  A path that exists comes first. InputError, which says what to put where, if there is none.
  """
  if source in RELEASED and not Path(source).exists():
    source = HUB + RELEASED[source].file
  try:
    path = folder.find(source, files=SUFFIXES)
  except InputError as error:
    raise InputError(f"{error} Or give one of {', '.join(RELEASED)}.") from error
  if is_url(path) and path.is_file():
    raise InputError(f"{source} is a file in a bucket; copy it here, and give its path.")
  return path
