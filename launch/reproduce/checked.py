"""The causes for which a published number does not come out, and what was found of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from launch.engine import console
from launch.evaluation.features import Network
from launch.reproduce.records import RECORDS, File
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import sha256_of
from vavae_jax.perceptual import Lpips

# Why a number does not come out; docs/reproduce.md says how each is noticed.
CAUSES = ("inception", "reference", "tokenizer", "latents", "model", "pictures", "labels")
# Files that are easily taken for one another, as no hash of them is known.
_NAMES = {file.name for record in RECORDS.values() for file in record.files} - {""}


@dataclasses.dataclass
class Checked:
  """What was found, for the stages, and a line of each check."""

  allow: tuple[str, ...]
  network: Network
  reference: str = ""
  config: Any = None  # of what is trained, or of the diffusion model that is sampled
  tokenizer: Any = None  # `restore.Trained`, where it need not be trained first
  diffusion: Any = None
  lpips: Lpips | None = None  # of rFID's tokenizers, where its files are there
  rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  refused: list[str] = dataclasses.field(default_factory=list)
  causes: set[str] = dataclasses.field(default_factory=set)  # of which there was a check

  def tell(self, cause: str, what: str, found: str, wrong: str = "") -> None:
    """Notes a check; `wrong` says what is wrong, "" if nothing."""
    self.causes.add(cause)
    if wrong and cause not in self.allow:
      self.refused.append(f"{what}: {wrong} ({cause})")
    verdict = "ALLOWED" if cause in self.allow else f"WRONG ({cause})"
    self.rows.append((what, found, f"{verdict}: {wrong}" if wrong else "as it should be"))

  def file(self, cause: str, what: str, path: Path, wanted: File) -> str:
    """Notes a file with its hash, which it returns; without a known hash its name may tell it."""
    sha256, wrong = sha256_of(path), ""
    self.causes.add(cause)
    if not sha256.startswith(wanted.sha256):
      wrong = f"the published one's sha256 begins {wanted.sha256}"
    elif not wanted.sha256 and path.name in _NAMES - {wanted.name}:
      wrong = f"its name is another published file's; needed is {wanted.name or 'none of them'}"
    found = f"{path}, sha256 {sha256}"
    if wrong or wanted.sha256:
      self.tell(cause, what, found, wrong)
    else:
      self.rows.append((what, found, "the published one's hash is not publicly known"))
    return sha256

  def end(self) -> None:
    """Shows all checks; InputError if one refuses."""
    for what, found, verdict in self.rows:
      console.say(f"{what}: {found}; {verdict}")
    if self.refused:
      raise InputError(
        f"The number would not come out: {'; '.join(self.refused)}. docs/reproduce.md explains "
        "them; --allow=CAUSE goes on in spite of one in brackets, and the result says so."
      )
    if unread := sorted({*self.allow} - self.causes):
      checked = ", ".join(cause for cause in CAUSES if cause in self.causes)
      raise InputError(
        f"--allow={unread[0]}: no check of this number is for that cause; leave it out. Its checks "
        f"are for {checked}."
      )
