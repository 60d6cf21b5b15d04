"""The tokenizer's task: what the training loop asks for; the update itself is in `update.py`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from vavae_jax import equivariance, frozen, losses, stages, teachers
from vavae_jax.common import functional, mesh, optimizer
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import averaged, learning_rate, make_optimizer
from vavae_jax.common.sharding import whole
from vavae_jax.data import feature_cache, images, selection
from vavae_jax.metrics import pixels
from vavae_jax.stages import Phase
from vavae_jax.update import (
  Metrics,
  State,
  build_autoencoder,
  build_discriminator,
  project,
  update,
)

if TYPE_CHECKING:
  import grain  # which takes half a second

PICTURE_IMAGES = 8
TRAINED_PARTS = ("all", "decoder")


def check(config: FrozenConfigDict) -> None:
  """Checks what can be checked before anything compiles; InputError if something does not fit."""
  model = functional.outline(build_autoencoder(config), "config.model")
  judge = functional.outline(build_discriminator(config), "config.discriminator")
  learning_rate(config.optimizer)
  _check_losses(config)
  feature_cache.check(config)
  size, factor = config.data.image_size, model.downsampling
  if size < factor or size % factor:
    raise InputError(
      f"config.data.image_size is {size}, but this model needs a multiple of its downsampling "
      f"{factor}, such as {max(round(size / factor), 1) * factor}."
    )
  equivariance.check(config, size // factor)
  if config.loss.disc_weight > 0 or config.loss.disc_idle:
    least = round(size * equivariance.least(config))
    if least < judge.smallest:
      raise InputError(
        f"Pictures are too small for the discriminator; it needs {judge.smallest} pixels a side: "
        f"config.data.image_size={size}"
        f"{f', shrunk by config.equivariance.scales to {least}' if least < size else ''}. Give "
        "larger ones, or fewer config.discriminator.n_layers."
      )
  frozen.check(config)
  selection.check_pictures(config)


def _check_losses(config: FrozenConfigDict) -> None:
  if config.train == "decoder" and not config.init_from:
    raise InputError(
      'config.train is "decoder", which trains on latents of config.init_from; name the weights.'
    )
  group = config.loss.disc_bn_group
  if group and config.batch_size % group:
    raise InputError(
      f"config.loss.disc_bn_group is {group}, but it must divide config.batch_size "
      f"{config.batch_size}; 0 takes the whole batch."
    )


@functools.lru_cache(64)
def latent_shape(config: FrozenConfigDict) -> tuple[int, int, int]:
  """Height, width and channels of the latents of a configuration that `check` has passed."""
  model = functional.outline(build_autoencoder(config), "config.model")
  side = config.data.image_size // model.downsampling
  return side, side, model.embed_dim


def init_state(config: FrozenConfigDict, key: jax.Array) -> State:
  """Fresh networks and optimizers; no file is read."""
  key_model, key_projection, key_discriminator = jax.random.split(key, 3)
  params = {"autoencoder": functional.init(build_autoencoder(config), key_model)}
  if frozen.uses_teacher(config):
    params["projection"] = _init_projection(config, key_projection)
  discriminator, statistics = functional.init(
    build_discriminator(config), key_discriminator, nnx.Param, nnx.BatchStat
  )
  own = optimizer.start(config.optimizer, params)
  moments = make_optimizer(config.optimizer).init(discriminator)
  return State(own.step, own.params, own.ema, own.optimizer, discriminator, statistics, moments)


def _init_projection(config: FrozenConfigDict, key: jax.Array) -> dict[str, jax.Array] | None:
  """PyTorch's default for a 1x1 convolution: all uniform within 1 / sqrt(fan in).

  None for somebody's own teacher that is not registered here: inference does without it.
  """
  if config.teacher.name not in teachers.NAMES:
    return None
  shape = (config.model.embed_dim, teachers.feature_size(config.teacher.name))
  if config.teacher.reverse_proj:
    bound = shape[0] ** -0.5
    return {"kernel": jax.random.uniform(key, shape, minval=-bound, maxval=bound)}
  bound = shape[1] ** -0.5
  both = jax.random.uniform(key, (shape[1] + 1, shape[0]), minval=-bound, maxval=bound)
  return {"kernel": both[:-1], "bias": both[-1]}


load_frozen = feature_cache.frozen_weights


def phase(config: FrozenConfigDict, step: int) -> Phase:
  """The stage, and whether the GAN is on: before it starts nothing of it is computed.

  A `lax.cond` on the step would do as well, but its branches run ten times slower on CPUs.
  """
  return stages.phase_of(config, step)


def train_step(
  config: FrozenConfigDict,
  phase: Phase,
  state: State,
  weights: Any,
  batch: Any,
  key: jax.Array,
  *,
  merge: Callable[[FrozenConfigDict, Any], dict[str, Any]] = frozen.merge,
) -> tuple[State, Metrics]:
  """One update of both networks; `key` draws the noise that picks latents, and how these turn.

  `merge` makes the frozen networks of their weights.
  """
  shape = equivariance.encoded(phase.size, latent_shape(config))
  noise = jax.random.normal(key, (len(batch["image"]), *shape))
  change = equivariance.change(phase.size, key)
  return update(config, phase, state, merge(config, weights), batch, noise, change)


data_source = selection.data_source


def train_data(config: FrozenConfigDict, rows: np.ndarray | None, start: int) -> grain.IterDataset:
  """This process's endless batches of crops, with the teacher's features where they are kept."""
  features = None
  if frozen.uses_teacher(config) and config.teacher.cache:
    features = feature_cache.open_cache(config, *selection.training_pictures(config))
  return selection.training_batches(config, rows, start, features)


def evaluators(config: FrozenConfigDict) -> dict[str, Any]:
  """Figures of how fixed pictures are rebuilt, and the pictures.

  They are those of `data.valid_source`, else held-out ones, else some that are trained on; each
  process loads those of its devices.
  """
  source, chosen = selection.evaluation_pictures(config)
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  count = len(chosen)
  rows = mesh.own_rows(mesh.round_up(count, devices), devices) % count  # filled up
  crops = images.load_crops(source, chosen[rows], config.data.image_size)
  graph = functional.graph_of(build_autoencoder(config))

  @functools.cache
  def on_devices() -> tuple[Any, jax.Array]:
    weights = jax.device_put(load_frozen(config), mesh.replicated(devices))
    return weights, mesh.to_global(crops, devices)

  @jax.jit
  def rebuild(params: Any, weights: Any, image_BHWC: jax.Array) -> tuple[jax.Array, Metrics]:
    networks = frozen.merge(config, weights)
    model = nnx.merge(graph, params["autoencoder"])
    image = images.to_float(image_BHWC)
    z_BhwZ = model.encode(image).mode()
    recon = model.decode_uint8(z_BhwZ)
    image, z_BhwZ, recon = (x[:count] for x in (image, z_BhwZ, recon))
    seen = images.to_float(recon)
    figures = {
      "l1": jnp.mean(jnp.abs(image - seen)),
      "psnr": jnp.mean(pixels.psnr(image, seen)),
      "ssim": jnp.mean(pixels.ssim(image, seen)),
    }
    if "perceptual" in networks:
      pair = [networks["perceptual"].features(x) for x in (image, seen)]
      figures["perceptual"] = jnp.mean(networks["perceptual"].distance(*pair))
    if "projection" in params:
      features = networks["teacher"](image)
      aligned = project(params["projection"], z_BhwZ, features, config.teacher.reverse_proj)
      figures["teacher_cosine"] = jnp.mean(losses.cosine(*aligned))
    shown = [x[: min(PICTURE_IMAGES, count)] for x in (image_BHWC, recon)]
    return whole(jnp.stack(shown)), figures

  def evaluate(state: State) -> dict[str, Any]:
    params = averaged(config.optimizer, state)
    with jax.set_mesh(devices):
      shown, figures = jax.device_get(rebuild(params, *on_devices()))
    rows = [np.concatenate(list(pictures), axis=1) for pictures in shown]
    return {name: float(x) for name, x in figures.items()} | {"pictures": np.concatenate(rows)}

  return {"reconstruction": (config.evaluate_every_steps, evaluate)}


def figures(config: FrozenConfigDict) -> list[str]:
  """The names of all numbers that `evaluators` give."""
  names = ["l1", "psnr", "ssim"]
  names += ["perceptual"] if config.loss.perceptual_weight else []
  names += ["teacher_cosine"] if frozen.uses_teacher(config) else []
  return [f"reconstruction/{name}" for name in names]
