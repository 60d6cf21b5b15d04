"""Addresses of the Hugging Face hub, which every flag and key takes that names weights or latents.

USER/NAME               a model; `vavae_jax.folder.find` also knows those on the disk
hf:OWNER/NAME/FILE      a file of a model
hf:OWNER/NAME           the files of a data set
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
  GatedRepoError,
  LocalEntryNotFoundError,
  OfflineModeIsEnabled,
  RepositoryNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import at_home

HUB = "hf:"
_CLIENTS = ("huggingface_hub", "httpx", "httpx2")  # with errors of their own


def local_file(name: str | os.PathLike[str]) -> Path:
  """The path of a file that a person named by its path or as hf:OWNER/NAME/FILE.

  A file of the hub is downloaded once into the hub's cache. A path need not exist. InputError if
  the hub cannot be reached or lacks the file.
  """
  name = at_home(os.fspath(name))
  if not name.startswith(HUB) or Path(name).exists():
    return Path(name)
  owner, _, rest = name.removeprefix(HUB).partition("/")
  repository, _, file = rest.partition("/")
  if not file:
    raise InputError(f"{name} is not of the form {HUB}OWNER/NAME/FILE.")
  advice = (
    f"Where there is no network, fetch {file} of {owner}/{repository} on the Hugging Face hub "
    "elsewhere, and give its path instead"
  )
  with with_hub(name, "fetched", advice):
    return Path(huggingface_hub.hf_hub_download(f"{owner}/{repository}", file))


@contextlib.contextmanager
def with_hub(name: str, done: str, advice: str) -> Iterator[None]:
  """InputError, in one line, where the hub cannot be reached, lacks something or refuses it."""
  hub_logging.set_verbosity_error()  # it logs every retry
  try:
    yield
  except Exception as error:
    theirs = type(error).__module__.partition(".")[0] in _CLIENTS
    if not theirs and not isinstance(error, OSError | ValueError):
      raise
    raise InputError(f"{name} could not be {done} ({_reason(error)}). {advice}.") from error


def _reason(error: Exception) -> str:
  if isinstance(error, GatedRepoError):
    return "its owner admits people one by one: ask on its page"
  if isinstance(error, RepositoryNotFoundError):
    return "the hub has no such model, or it is private and the token does not open it"
  if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
    return "the hub is not reached, and nothing of it is in the hub's cache"
  return str(error).strip().partition("\n")[0].partition(". ")[0]


def url_of_data(name: str) -> str:
  """hf:OWNER/NAME as the URL by which fsspec opens the data set; other names as they are."""
  if not name.startswith(HUB) or "://" in name or Path(name).exists():
    return name
  return f"hf://datasets/{name.removeprefix(HUB)}"
