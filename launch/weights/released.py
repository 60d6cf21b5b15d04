"""Files on the Hugging Face hub, and short names of those that the paper's authors released."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vavae_jax.common.addresses import HUB, local_file
from vavae_jax.common.errors import InputError


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
  """The path of a file or folder, downloaded from the hub if it is not yet in the cache.

  `source` is a path, "hf:OWNER/NAME/FILE", or a key of `RELEASED`; a path that exists comes first.

  Raises:
    InputError: it does not exist, or the hub cannot be reached; the message says what to put where.
  """
  if Path(source).exists():
    return Path(source)
  if source in RELEASED:
    source = HUB + RELEASED[source].file
  if not source.startswith(HUB):
    raise InputError(
      f"{source} does not exist; give a file or folder, {HUB}OWNER/NAME/FILE, or one of "
      f"{', '.join(RELEASED)}."
    )
  return local_file(source)
