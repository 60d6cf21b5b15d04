"""Recognises the model of a file of weights by the names and shapes of its tensors.

A model counts as recognised only once its own module has taken every tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from lightningdit_jax import convert as dit
from lightningdit_jax.options import PRESETS
from lightningdit_jax.store import latents
from vavae_jax import convert as vae
from vavae_jax import teachers
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import inception
from vavae_jax.perceptual import LEFT_ASIDE
from vavae_jax.weights.state_dicts import Place, choose, dictionaries, places
from vavae_jax.weights.torch_weights import StateDict

ITSELF = "the file itself"


class Weights(NamedTuple):
  """The weights of one model.

  Attributes:
    tensors: PyTorch name -> array, without prefixes; all of the model's and no other. Teachers'
      files are kept whole, with heads and text towers that publishers ship with them.
    module: ours with these weights; None for statistics.
    name: of the preset or teacher, such as "dinov2_vitl14"; "" where there is none.
    arguments: the constructor's, where tensors determine them.
    aside: other contents of the file -> how many tensors or values.
    kind: one of the names in `_KINDS`, such as "LightningDiT".
    part: where they are in the file, as `Place.where` says, or `ITSELF`.
  """

  tensors: StateDict
  module: Any
  name: str = ""
  arguments: Mapping[str, Any] = MappingProxyType({})
  aside: Mapping[str, int] = MappingProxyType({})
  kind: str = ""
  part: str = ""

  @property
  def what(self) -> str:
    """Kind and name, for people."""
    return f"{self.kind} {self.name}".strip()


def recognise(
  content: Mapping[str, Any], part: str = "", more: Mapping[str, Any] | None = None
) -> Weights:
  """The model whose weights a file has, wherever in it and under whatever prefix they are.

  Args:
    content: from `state_dicts.read_content`.
    part: where, as `Place.where` says; "": the place nearest to the file's top, and the average, as
      published numbers use averages.
    more: tensors of a second file, LPIPS' heads, where this one has VGG16.

  Raises:
    InputError: no such part, no known model, several, or a known one with unknown, missing,
      misshapen or non-finite tensors, which are listed.
  """
  kind, place = _find(content, part)
  if more and kind != LPIPS:
    raise InputError(f"LPIPS' heads (--heads) are for VGG16, and the file is of a {kind}.")
  tensors = place.tensors
  if twice := sorted(tensors.keys() & (more or {}).keys()):
    raise InputError(f"Both files have {twice[0]}; give only one that has it.")
  found = _KINDS[kind][1]({**tensors, **(more or {})})
  aside = place.aside(content) + Counter(found.aside)
  return found._replace(kind=kind, part=place.where or ITSELF, aside=aside)


def _find(content: Mapping[str, Any], part: str) -> tuple[str, Place]:
  """(kind of model, its place), of the kinds first in `_KINDS` at each place."""
  found: dict[str, tuple[str, Place]] = {}
  everywhere = dictionaries(content)
  for kind, (marks, _) in _KINDS.items():
    for place in _marked(everywhere, marks):
      found.setdefault(place.where, (kind, place))
  if part and part not in found:
    known = ", ".join(where or ITSELF for where in found)[:500] or "none"
    raise InputError(f"The file has no part {part!r} with a known model; it has {known}.")
  if part:
    return found[part]
  if not found:
    odd = (f"{name} ({kind})" for place in everywhere for name, kind in place.odd.items())
    names = [*odd, *sorted(name for place in everywhere for name in place.all)]
    raise InputError(
      f"No model is known by these tensors: {', '.join(names[:6]) or 'no tensor'}. Known are: "
      f"{', '.join(_KINDS)}. --inspect lists what a file holds."
    )
  # Any vision transformer passes for a teacher, such as the one that a tokenizer was trained with.
  others = [place for kind, place in found.values() if kind != TEACHER]
  return found[choose(others or [place for _, place in found.values()], average=True).where]


def _marked(everywhere: list[Place], marks: Marks) -> list[Place]:
  if not callable(marks):
    return places(everywhere, marks)
  return [place for place in everywhere if marks(place.all)]


def _read_statistics(tensors: StateDict) -> Weights:
  mean, std = latents.mean_and_std(tensors)
  return Weights({"mean": mean, "std": std}, None)


def _read_lightningdit(tensors: StateDict) -> Weights:
  arguments = dit.arguments_of(tensors)
  names = [name for name, sizes in PRESETS.items() if sizes.items() <= arguments.items()]
  module = dit.from_torch(tensors, **arguments)
  return Weights(tensors, module, names[0] if names else "", arguments)


def _read_autoencoder(tensors: StateDict) -> Weights:
  tensors = vae.autoencoder_names(tensors)
  arguments = vae.autoencoder_arguments(tensors)
  module = vae.autoencoder_from_torch(tensors, **arguments)
  own, aside = _split(tensors, vae.TRAINING_ONLY)
  factor = 2 ** (len(arguments["ch_mult"]) - 1)
  return Weights(own, module, f"f{factor}d{arguments['embed_dim']}", arguments, aside)


def _read_lpips(tensors: StateDict) -> Weights:
  own, aside = _split(tensors, LEFT_ASIDE)
  try:
    return Weights(own, vae.lpips_from_torch(own), aside=aside)
  except InputError as error:
    raise InputError(
      f"{error} LPIPS is VGG16 and heads: give the one as SOURCE, the other as --heads."
    ) from error


def _read_teacher(tensors: StateDict) -> Weights:
  name = teachers.recognise(tensors)
  return Weights(tensors, teachers.teacher_from_torch(name, tensors), name)


def _split(tensors: StateDict, others: str | tuple[str, ...]) -> tuple[StateDict, Counter[str]]:
  """(the model's tensors, how many others there are, whose names begin with one of `others`).

  Others are counted by their first name, `loss.discriminator.main.0.weight` by two.
  """
  left = [name for name in tensors if name.startswith(others)]
  groups = (".".join(x.split(".")[: 2 if x.startswith("loss.") else 1]) for x in left)
  return {name: x for name, x in tensors.items() if name not in left}, Counter(groups)


# Names of which a model has one, or what tells its tensors.
Marks = tuple[str, ...] | Callable[[StateDict], bool]
STATISTICS = "latent statistics"
LPIPS = "LPIPS"
TEACHER = "teacher"
_STATISTICS_NAMES = [set(names) for names in latents.STATISTICS_NAMES]
# Kind -> (its marks, how its tensors are read).
_KINDS: dict[str, tuple[Marks, Callable[[StateDict], Weights]]] = {
  STATISTICS: (lambda tensors: set(tensors) in _STATISTICS_NAMES, _read_statistics),
  "LightningDiT": (dit.MARKS, _read_lightningdit),
  "tokenizer": (vae.MARKS, _read_autoencoder),
  LPIPS: (("features.0.weight", "lin0.model.1.weight", "net.slice1.0.weight"), _read_lpips),
  "FID's Inception": (
    ("Mixed_7c.branch_pool.conv.weight",),
    lambda tensors: Weights(tensors, inception.from_torch(tensors)),
  ),
  TEACHER: (lambda tensors: bool(teachers.recognise(tensors)), _read_teacher),
}
