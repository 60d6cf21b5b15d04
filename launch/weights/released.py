"""Files on the Hugging Face hub, and short names of those that the paper's authors released."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils import logging as hub_logging

from vavae_jax.common.errors import InputError

PREFIX = "hf:"


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

  `source` is a path, "hf:OWNER/REPO/FILE", or a key of `RELEASED`; a path that exists comes first.

  Raises:
    InputError: it does not exist, or the hub cannot be reached; the message says what to put where.
  """
  if Path(source).exists():
    return Path(source)
  if source in RELEASED:
    source = PREFIX + RELEASED[source].file
  if not source.startswith(PREFIX):
    raise InputError(
      f"{source} does not exist; give a file or folder, {PREFIX}OWNER/REPO/FILE, or one of "
      f"{', '.join(RELEASED)}."
    )
  owner, _, rest = source.removeprefix(PREFIX).partition("/")
  repository, _, file = rest.partition("/")
  if not file:
    raise InputError(f"{source} is not of the form {PREFIX}OWNER/REPO/FILE.")
  hub_logging.set_verbosity_error()  # it logs every retry
  try:
    return Path(huggingface_hub.hf_hub_download(f"{owner}/{repository}", file))
  except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
    reason = str(error).strip().partition("\n")[0].partition(". ")[0]
    raise InputError(
      f"{source} could not be fetched ({reason}). Where there is no network, fetch {file} of "
      f"{owner}/{repository} on the Hugging Face hub elsewhere, and give its path instead."
    ) from error
