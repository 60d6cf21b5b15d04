"""Who publishes a teacher names its tensors: state dicts of several publishers -> one module.

A naming is a table of the names that differ, as `torch_weights.load` takes it, and the few things
that a table cannot say. Which publisher's a state dict is, is found out: the naming that knows most
of its tensors. Reading stays strict: beside the network's own tensors only those may be there that
a publisher is known to ship with them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from flax import nnx

from vavae_jax.weights import torch_weights
from vavae_jax.weights.state_dicts import weights_in

M = TypeVar("M", bound=nnx.Module)


class Naming(NamedTuple):
  """How one publisher names a network's tensors."""

  renamed: Mapping[str, str]  # parts of names, ours -> theirs, replaced one after the other
  prefix: str = ""  # what may stand before every name of the network
  # Regular expressions: tensors whose names begin so belong to other parts of the model.
  aside: tuple[str, ...] = ()
  # Parts of names of three tensors, queries, keys and values, that are one tensor here. It is
  # called by the names of all three, joined by "+".
  fused: tuple[str, str, str] | None = None
  # Our names -> rank, of tensors that lack leading axes of size 1.
  ranks: Mapping[str, int] = torch_weights.NOTHING
  # The module's, in which this publisher's tensors differ from the others'.
  arguments: Mapping[str, Any] = torch_weights.NOTHING


def load(
  outline: Callable[[Naming], M], state_dict: Mapping[str, Any], namings: Iterable[Naming]
) -> M:
  """A module with the weights of a state dict, or a checkpoint that has one, by any of the namings.

  `outline` makes the abstract module for a naming. InputError lists unknown, missing, misshapen or
  non-finite tensors.
  """
  given = _unprefixed(weights_in(state_dict))
  candidates = [(naming, _prepared(tensors, naming)) for tensors in given for naming in namings]
  first = candidates[0][0]
  model = outline(first)

  def known(candidate: tuple[Naming, dict[str, Any]]) -> int:
    naming, tensors = candidate
    return sum(name in tensors for name in torch_weights.names_of(model, naming.renamed))

  naming, tensors = max(candidates, key=known)
  if naming.arguments != first.arguments:
    model = outline(naming)
  return torch_weights.load(model, tensors, renamed=naming.renamed)


def _prepared(state_dict: Mapping[str, Any], naming: Naming) -> dict[str, Any]:
  """The network's own tensors, without prefix, fused, and of the rank they have here."""
  aside = re.compile("|".join(naming.aside) or "$^")
  own = {name: value for name, value in state_dict.items() if not aside.match(name)}
  tensors = _without(own, naming.prefix)
  if naming.fused is not None:
    tensors = _fuse(tensors, naming.fused)
  for ours, rank in naming.ranks.items():
    name = _translate(ours, naming.renamed)
    if name in tensors and np.ndim(tensors[name]) < rank:
      array = np.asarray(tensors[name])
      tensors[name] = array.reshape((1,) * (rank - array.ndim) + array.shape)
  return tensors


def _unprefixed(tensors: dict[str, Any]) -> list[dict[str, Any]]:
  """The tensors as they are, and without each part that all their names begin with."""
  found = [tensors]
  while (
    tensors
    and len({name.partition(".")[0] for name in tensors}) == 1
    and min(name.count(".") for name in tensors)
  ):
    tensors = {name.partition(".")[2]: value for name, value in tensors.items()}
    found.append(tensors)
  return found


def _without(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """The same tensors without a prefix, but where that would hide another."""
  short = {name: name.removeprefix(prefix) for name in tensors}
  return {name if short[name] in tensors else short[name]: v for name, v in tensors.items()}


def _fuse(tensors: dict[str, Any], parts: tuple[str, str, str]) -> dict[str, Any]:
  """Puts three tensors of one shape together; others stay, and the strict loader lists them."""
  fused = dict(tensors)
  for name in tensors:
    if parts[0] not in name:
      continue
    names = [name.replace(parts[0], part) for part in parts]
    arrays = [np.asarray(tensors[part]) for part in names if part in tensors]
    if len(arrays) == len(names) and len({array.shape for array in arrays}) == 1:
      whole = np.concatenate(arrays)
      for part in names:
        del fused[part]
      fused[name.replace(parts[0], "+".join(parts))] = whole
  return fused


def _translate(name: str, renamed: Mapping[str, str]) -> str:
  for ours, theirs in renamed.items():
    name = name.replace(ours, theirs)
  return name


# The convolution over patches by any publisher's name: [hidden size, 3, patch, patch].
_PATCHES = (
  "patch_embed.proj.weight",
  "patch_embed.projection.weight",
  "patch_embeddings.projection.weight",
  "patch_embedding.weight",
  ".conv1.weight",
)
_REGISTERS = ("register_tokens", "reg_token")


def by_patches(
  variants: Mapping[str, Any], marks: tuple[str, ...] = ()
) -> Callable[[Mapping[str, Any]], str]:
  """A family's `recognise`: by width, patch size and registers, if a tensor's name has a mark.

  `marks` are parts of names by any publisher, which no other family's names have; without any,
  every state dict may be of this family.
  """

  def recognise(state_dict: Mapping[str, Any]) -> str:
    if marks and not any(mark in name for name in state_dict for mark in marks):
      return ""
    patches = [np.shape(state_dict[name]) for name in state_dict if f".{name}".endswith(_PATCHES)]
    of_pixels = [shape for shape in patches if len(shape) == 4 and shape[1] == 3]
    if len(of_pixels) != 1:
      return ""
    hidden_size, _, patch_size, _ = of_pixels[0]
    found = hidden_size, patch_size, any(name.endswith(_REGISTERS) for name in state_dict)
    for name, (size, *_) in variants.items():
      registers = bool(size.get("num_registers", 0))
      if (size["hidden_size"], size.get("patch_size", 16), registers) == found:
        return name
    return ""

  return recognise
