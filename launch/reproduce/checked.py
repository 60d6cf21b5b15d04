"""The causes for which a published number does not come out, and what was found of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from launch.engine import console
from launch.evaluation.features import Network
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import sha256_of

# Why a number does not come out: how that is noticed. docs/reproduce.md has this table.
CAUSES = {
  "inception": "Another network than FID's Inception: by its file's hash; and the mean feature of "
  "the reference's own pictures must be the one that the reference states.",
  "reference": "Another reference for FID: by names and shapes of its arrays; its hash is noted.",
  "tokenizer": "Another tokenizer: by its hash and architecture; its latents of the reference's "
  "pictures must have the model's mean and deviation, or for rFID the pictures their PSNR.",
  "latents": "Latents that are normalised already or by others' statistics: by mean and deviation "
  "of stored ones; latents of another tokenizer: by what their manifest says.",
  "model": "Another model, recipe or step, or weights that are no average: by every key of the "
  "configuration; and the loss of the reference's pictures must be about the published log's.",
  "pictures": "Other pictures: by their number.",
  "labels": "Other classes, or another order of them: by their number, and the names of the first "
  "and the last.",
}


@dataclasses.dataclass
class Checked:
  """What was found, for the stages, and a line of each check."""

  allow: tuple[str, ...]
  network: Network
  reference: str = ""
  config: Any = None  # of what is trained, or of the diffusion model that is sampled
  tokenizer: Any = None  # `restore.Trained`, where it need not be trained first
  diffusion: Any = None
  rows: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
  refused: list[str] = dataclasses.field(default_factory=list)

  def tell(self, cause: str, what: str, found: str, wrong: str = "") -> None:
    """Notes a check; `wrong` says what is wrong, "" if nothing."""
    if wrong and cause not in self.allow:
      self.refused.append(f"{what}: {wrong} ({cause})")
    verdict = "ALLOWED" if cause in self.allow else f"WRONG ({cause})"
    self.rows.append((what, found, f"{verdict}: {wrong}" if wrong else "as it should be"))

  def file(self, cause: str, what: str, path: Path, known: str) -> str:
    """Notes a file with its hash, which it returns."""
    sha256 = sha256_of(path)
    found = f"{path}, sha256 {sha256}"
    if known:
      wrong = "" if sha256.startswith(known) else f"the published one's sha256 begins {known}"
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
