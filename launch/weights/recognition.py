"""Recognises the model of a file of weights by the names and shapes of its tensors.

A model counts as recognised only once its own module has taken every tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lightningdit_jax import convert as dit
from lightningdit_jax.model import PRESETS
from vavae_jax import convert as vae
from vavae_jax import teachers
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import inception
from vavae_jax.perceptual import LEFT_ASIDE
from vavae_jax.weights.torch_weights import StateDict

# Parts under which checkpoints keep weights, the average first, as published numbers use averages.
PARTS = ("ema", "model_ema", "state_dict", "model")
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
    part: one of `PARTS` or `ITSELF`.
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
  """The model whose weights a file has.

  Args:
    content: from `state_dicts.read_content`.
    part: one of `PARTS`; "": the first one in the file, or the file itself.
    more: tensors of a second file that belong to the same model, such as LPIPS' heads.

  Raises:
    InputError: no such part, no known model, or a known one with unknown, missing, misshapen or
      non-finite tensors, which are listed.
  """
  part, tensors, aside = _choose(content, part)
  if twice := sorted(tensors.keys() & (more or {}).keys()):
    raise InputError(f"Both files have {twice[0]}; give only one that has it.")
  tensors |= more or {}
  for kind, (is_it, read) in _KINDS.items():
    if is_it(tensors):
      found = read(tensors)
      return found._replace(kind=kind, part=part, aside=aside + Counter(found.aside))
  shown = ", ".join(sorted(tensors)[:6]) or "no tensor"
  raise InputError(
    f"No model is known by these tensors: {shown}. Known are: {', '.join(_KINDS)}. --inspect lists "
    "what a file holds."
  )


def _choose(content: Mapping[str, Any], part: str) -> tuple[str, StateDict, Counter[str]]:
  there = [name for name in PARTS if isinstance(content.get(name), Mapping)]
  if part and part not in there:
    raise InputError(f"The file has no part {part!r}; it has {', '.join(there) or 'none'}.")
  part = part or (there[0] if there else ITSELF)
  whole = content if part == ITSELF else content[part]
  others = [str(name) for name, value in whole.items() if not isinstance(value, np.ndarray)]
  if others:
    raise InputError(f"The weights have entries that are not tensors: {', '.join(others[:8])}.")
  aside = Counter(
    {
      str(name): len(value) if isinstance(value, Mapping) else 1
      for name, value in content.items()
      if part not in (ITSELF, name)
    }
  )
  tensors = {str(name): value for name, value in whole.items()}
  if tensors and all(name.startswith("module.") for name in tensors):
    tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
  return part, tensors, aside


def _read_statistics(tensors: StateDict) -> Weights:
  mean, std = (np.asarray(tensors[name], np.float32) for name in ("mean", "std"))
  if not mean.size or mean.shape != std.shape or mean.size != max(mean.shape, default=0):
    raise InputError(f"Mean {mean.shape} and std {std.shape} are not one number a channel.")
  if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std > 0).all()):
    raise InputError("The statistics are not finite, or a deviation is not above 0.")
  return Weights(tensors, None)


def _read_lightningdit(tensors: StateDict) -> Weights:
  arguments = dit.arguments_of(tensors)
  names = [name for name, sizes in PRESETS.items() if sizes.items() <= arguments.items()]
  module = dit.from_torch(tensors, **arguments)
  return Weights(tensors, module, names[0] if names else "", arguments)


def _read_autoencoder(tensors: StateDict) -> Weights:
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


def _has(*names: str) -> Callable[[StateDict], bool]:
  return lambda tensors: any(name in tensors for name in names)


STATISTICS = "latent statistics"
SD_VAE = "tokenizer (diffusers)"
LPIPS = "LPIPS"
# Kind -> (whether the tensors are of it, how they are read).
_KINDS: dict[str, tuple[Callable[[StateDict], bool], Callable[[StateDict], Weights]]] = {
  STATISTICS: (lambda tensors: set(tensors) == {"mean", "std"}, _read_statistics),
  "LightningDiT": (_has("x_embedder.proj.weight"), _read_lightningdit),
  "tokenizer": (_has("encoder.down.0.block.0.conv1.weight"), _read_autoencoder),
  SD_VAE: (
    _has("encoder.down_blocks.0.resnets.0.conv1.weight"),
    lambda tensors: _read_autoencoder(vae.autoencoder_from_diffusers(tensors)),
  ),
  LPIPS: (_has("features.0.weight", "lin0.model.1.weight", "net.slice1.0.weight"), _read_lpips),
  "FID's Inception": (
    _has("Mixed_7c.branch_pool.conv.weight"),
    lambda tensors: Weights(tensors, inception.from_torch(tensors)),
  ),
  "teacher": (lambda tensors: bool(teachers.recognise(tensors)), _read_teacher),
}
