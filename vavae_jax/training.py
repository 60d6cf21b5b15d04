"""The tokenizer's task: VA-VAE training as one pure step; paper section 3, reference `vavae/`.

Notable: the adaptive weights need the gradient of each loss at one layer. The step runs the
networks piece by piece through `jax.vjp`, so that what the losses share is computed once: one
backward through the encoder, one through the discriminator for its input, and two through the
decoder while the GAN is on.

DEVIATION: the adaptive weights are norms of the global batch's gradients; in the reference each GPU
has its own, of its 8 images. The discriminator learns from the reconstruction that the generator's
update used; the reference computes it anew after that update.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from vavae_jax import functional, images, losses
from vavae_jax.autoencoder import Autoencoder
from vavae_jax.discriminator import PatchDiscriminator
from vavae_jax.errors import InputError
from vavae_jax.metrics import pixels
from vavae_jax.optimizer import averaged, check_optimizer, make_optimizer, start_emas, update_emas
from vavae_jax.teachers import Teacher, load_teacher

# Stages of the teacher whose features stand in for LPIPS; later ones see too little of a texture.
PERCEPTUAL_STAGES = ("stride2", "stride4", "stride8")
EVALUATION_IMAGES = 64
PICTURE_IMAGES = 8

Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class State:
  """All that training changes.

  Attributes:
    step: int32 scalar, updates done.
    params: {"autoencoder": ..., "projection": kernel [Z, F], where there is a teacher}.
    ema: moving averages of params by `optimizer.ema_name`; empty without `ema_decays`.
    optimizer: of params.
    discriminator: the PatchGAN's parameters.
    discriminator_statistics: the running statistics of its BatchNorm.
    discriminator_optimizer: of its parameters.
  """

  step: jax.Array
  params: Any
  ema: Any
  optimizer: Any
  discriminator: Any
  discriminator_statistics: Any
  discriminator_optimizer: Any


def build_autoencoder(config: FrozenConfigDict) -> Callable[[nnx.Rngs], Autoencoder]:
  """The autoencoder of a configuration, for `functional`."""
  return functools.partial(_autoencoder, config)


def _autoencoder(config: FrozenConfigDict, rngs: nnx.Rngs) -> Autoencoder:
  return Autoencoder(**config.model, dtype=jnp.dtype(config.dtype), rngs=rngs)


def _build_discriminator(config: FrozenConfigDict) -> Callable[[nnx.Rngs], PatchDiscriminator]:
  return functools.partial(_discriminator, config)


def _discriminator(config: FrozenConfigDict, rngs: nnx.Rngs) -> PatchDiscriminator:
  return PatchDiscriminator(**config.discriminator, dtype=jnp.dtype(config.dtype), rngs=rngs)


@functools.lru_cache
def _source(spec: str) -> images.Source:
  return images.open_source(spec)


@functools.lru_cache
def _teacher(name: str, weights: str) -> Teacher:
  return load_teacher(name, weights or None)


def check(config: FrozenConfigDict) -> None:
  """Checks everything that can be checked before anything compiles.

  Raises:
    InputError: model, image size, teacher or data do not fit.
  """
  model = functional.outline(build_autoencoder(config), "config.model")
  judge = functional.outline(_build_discriminator(config), "config.discriminator")
  check_optimizer(config.optimizer)
  size, factor = config.data.image_size, model.downsampling
  if size < factor or size % factor:
    raise InputError(
      f"config.data.image_size is {size}, but this model needs a multiple of its downsampling "
      f"{factor}, such as {max(round(size / factor), 1) * factor}."
    )
  if config.loss.disc_weight > 0:
    picture = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    nnx.eval_shape(lambda network, x: network(x, train=True), judge, picture)
  if config.teacher.name:
    teacher = _teacher(config.teacher.name, config.teacher.weights)
    if teacher.stride != factor:
      raise InputError(
        f"The teacher {config.teacher.name} has stride {teacher.stride}, the model downsamples by "
        f"{factor}; alignment compares them position by position, so make them equal."
      )
  elif config.loss.perceptual_weight:
    raise InputError(
      "config.loss.perceptual_weight needs the features of a teacher; set config.teacher.name or "
      "set the weight to 0."
    )
  if not 0 <= config.data.held_out < 1:
    raise InputError(f"config.data.held_out is {config.data.held_out}; it must be in [0, 1).")
  source = _source(config.data.source)
  images.check_readable(source)
  train, _ = images.split(len(source), config.data.held_out, config.data.split_seed)
  if len(train) < config.batch_size:
    raise InputError(
      f"{config.data.source} has {len(train)} pictures for training, fewer than one batch of "
      f"{config.batch_size}; add pictures or lower config.batch_size."
    )


def latent_shape(config: FrozenConfigDict) -> tuple[int, int, int]:
  """Height, width and channels of the latents of a configuration that `check` has passed."""
  model = functional.outline(build_autoencoder(config), "config.model")
  side = config.data.image_size // model.downsampling
  return side, side, model.embed_dim


def init_state(config: FrozenConfigDict, key: jax.Array) -> State:
  """Fresh networks and optimizers."""
  key_model, key_projection, key_discriminator = jax.random.split(key, 3)
  params = {"autoencoder": functional.init(build_autoencoder(config), key_model)}
  if config.teacher.name:
    width = _teacher(config.teacher.name, config.teacher.weights).feature_size
    shape = (config.model.embed_dim, width)
    # PyTorch's default for a 1x1 convolution without bias: uniform within 1 / sqrt(fan in).
    params["projection"] = jax.random.uniform(key_projection, shape, minval=-1.0) / shape[0] ** 0.5
  optimizer = make_optimizer(config.optimizer)
  discriminator, statistics = functional.init(
    _build_discriminator(config), key_discriminator, nnx.Param, nnx.BatchStat
  )
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=start_emas(params, config.optimizer.ema_decays),
    optimizer=optimizer.init(params),
    discriminator=discriminator,
    discriminator_statistics=statistics,
    discriminator_optimizer=optimizer.init(discriminator),
  )


def load_frozen(config: FrozenConfigDict) -> Any:
  """The teacher's weights, or nothing."""
  if not config.teacher.name:
    return {}
  teacher = _teacher(config.teacher.name, config.teacher.weights)
  return {"teacher": nnx.to_pure_dict(nnx.state(teacher))}


def phase(config: FrozenConfigDict, step: int) -> str:
  """Which of two compiled steps `step` is: before the GAN starts nothing of it is computed.

  A `lax.cond` on the step would do as well, but its branches run ten times slower on CPUs.
  """
  on = config.loss.disc_weight > 0 and step > config.loss.disc_start
  return "adversarial" if on else "reconstruction"


def flops_per_step(config: FrozenConfigDict) -> float:
  """Not counted yet."""
  del config
  return 0.0


def train_step(
  config: FrozenConfigDict, phase: str, state: State, frozen: Any, batch: Any, key: jax.Array
) -> tuple[State, Metrics]:
  """One update of the autoencoder and, in the adversarial phase, of the discriminator.

  Args:
    config: the whole configuration.
    phase: from `phase`.
    state: from `init_state`.
    frozen: from `load_frozen`.
    batch: {"image": uint8 [B, H, W, 3], ...}.
    key: of the posterior's noise.

  Returns:
    (new state, scalar metrics).
  """
  image = images.to_float(batch["image"])
  teacher = _merge_teacher(config, frozen)
  forward = _Forward(config, state.params["autoencoder"], image, key)
  nll, pull_nll = jax.vjp(functools.partial(_nll, config, teacher, image), forward.recon)
  nll_grads, z_cotangent = forward.pull_decoder(*pull_nll(jnp.ones_like(nll)))
  grads = {"autoencoder": nll_grads}
  loss = nll + config.loss.kl_weight * forward.kl
  metrics = {"nll": nll, "kl": forward.kl, "l1": jnp.mean(jnp.abs(image - forward.recon))}

  if config.teacher.name:
    features = jax.lax.stop_gradient(teacher(image))
    part = _alignment(config, state.params["projection"], features, forward, z_cotangent)
    grads["projection"] = part["projection_grad"]
    z_cotangent = z_cotangent + part["z_cotangent"]
    loss, metrics = loss + part["loss"], metrics | part["metrics"]

  if phase == "adversarial":
    adversarial = _adversarial(config, state, image, forward, nll_grads)
    grads["autoencoder"] = _add(grads["autoencoder"], adversarial["grads"])
    z_cotangent = z_cotangent + adversarial["z_cotangent"]
    loss, metrics = loss + adversarial["loss"], metrics | adversarial["metrics"]
    state = _update_discriminator(config, state, adversarial)

  encoder_grads = forward.pull_encoder(z_cotangent, config.loss.kl_weight)
  grads["autoencoder"] = _add(grads["autoencoder"], encoder_grads)
  metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  return _update_autoencoder(config, state, grads), metrics


class _Forward:
  """The autoencoder run on a batch in four pieces, each with its way back.

  Cut before the last layers of encoder and decoder, where the adaptive weights compare gradients.
  """

  def __init__(self, config: FrozenConfigDict, params: Any, image: jax.Array, key: jax.Array):
    graph = functional.graph_of(build_autoencoder(config))

    def latent(params: Any, trunk: jax.Array) -> tuple[jax.Array, jax.Array]:
      posterior = nnx.merge(graph, params).posterior(trunk, image)
      noise = jax.random.normal(key, posterior.mean.shape)
      return posterior.sample(noise), jnp.mean(posterior.kl())

    trunk, self._pull_trunk = jax.vjp(lambda p: nnx.merge(graph, p).encode_trunk(image), params)
    (self.z_BhwZ, self.kl), self._pull_latent = jax.vjp(latent, params, trunk)
    decoded, self._pull_decoded = jax.vjp(
      lambda p, z: nnx.merge(graph, p).decode_trunk(z), params, self.z_BhwZ
    )
    self.recon, self._pull_image = jax.vjp(
      lambda p, d, z: nnx.merge(graph, p).image(d, z), params, decoded, self.z_BhwZ
    )

  def pull_decoder(self, recon_cotangent: jax.Array) -> tuple[Any, jax.Array]:
    """Back from the reconstruction: (gradients of the parameters, cotangent of z)."""
    last_grads, decoded_cotangent, z_direct = self._pull_image(recon_cotangent)
    grads, z_cotangent = self._pull_decoded(decoded_cotangent)
    return _add(grads, last_grads), z_cotangent + z_direct

  def pull_encoder(self, z_cotangent: jax.Array, kl_cotangent: float) -> Any:
    """Back from the latent and the KL: gradients of the parameters."""
    last_grads, trunk_cotangent = self._pull_latent(
      (z_cotangent, jnp.full_like(self.kl, kl_cotangent))
    )
    return _add(last_grads, self._pull_trunk(trunk_cotangent)[0])

  def encoder_last_grad(self, z_cotangent: jax.Array) -> jax.Array:
    """The gradient at the kernel of the encoder's last layer."""
    grads, _ = self._pull_latent((z_cotangent, jnp.zeros_like(self.kl)))
    return grads["encoder"]["conv_out"]["kernel"]


def _merge_teacher(config: FrozenConfigDict, frozen: Any) -> Any:
  """The teacher around weights that are arguments: as constants they would be compiled in."""
  if not config.teacher.name:
    return None
  graph, _ = nnx.split(_teacher(config.teacher.name, config.teacher.weights))
  return nnx.merge(graph, frozen["teacher"])


def _nll(config: FrozenConfigDict, teacher: Any, image: jax.Array, recon: jax.Array) -> jax.Array:
  if not config.loss.perceptual_weight:
    return losses.reconstruction(image, recon)
  there, here = teacher.endpoints(image), teacher.endpoints(recon)
  distance_B = losses.feature_distance(
    [there[stage] for stage in PERCEPTUAL_STAGES], [here[stage] for stage in PERCEPTUAL_STAGES]
  )
  return losses.reconstruction(image, recon, config.loss.perceptual_weight * distance_B)


def _alignment(
  config: FrozenConfigDict,
  projection_ZF: jax.Array,
  features_BhwF: jax.Array,
  forward: _Forward,
  nll_cotangent: jax.Array,
) -> dict[str, Any]:
  """The alignment loss, weighted to pull at the encoder's last layer as the reconstruction does."""

  def loss_of(projection_ZF: jax.Array, z_BhwZ: jax.Array) -> tuple[jax.Array, Metrics]:
    projected_BhwF = z_BhwZ @ projection_ZF
    cosine = losses.marginal_cosine(projected_BhwF, features_BhwF, config.loss.cos_margin)
    distances = losses.marginal_distance_matrix(
      projected_BhwF, features_BhwF, config.loss.distmat_margin
    )
    return cosine + distances, {"vf_cos": cosine, "vf_distmat": distances}

  loss, pull, parts = jax.vjp(loss_of, projection_ZF, forward.z_BhwZ, has_aux=True)
  projection_grad, z_cotangent = pull(jnp.ones_like(loss))
  weight = jnp.float32(config.loss.vf_weight)
  if config.loss.adaptive_vf:
    weight *= losses.adaptive_weight(
      forward.encoder_last_grad(nll_cotangent),
      forward.encoder_last_grad(z_cotangent),
      losses.MAX_ALIGNMENT_WEIGHT,
    )
  return {
    "loss": weight * loss,
    "projection_grad": weight * projection_grad,
    "z_cotangent": weight * z_cotangent,
    "metrics": {"vf": loss, "vf_weight": weight, **parts},
  }


def _adversarial(
  config: FrozenConfigDict, state: State, image: jax.Array, forward: _Forward, nll_grads: Any
) -> dict[str, Any]:
  """The generator's adversarial gradients and the discriminator's own, from one pass each."""
  graph = functional.graph_of(_build_discriminator(config))

  def judge(params: Any, statistics: Any, picture: jax.Array) -> tuple[jax.Array, Any]:
    network = nnx.merge(graph, params, statistics)
    logits = network(picture, train=True)
    return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

  logits_real, pull_real, statistics = jax.vjp(
    lambda p: judge(p, state.discriminator_statistics, image), state.discriminator, has_aux=True
  )
  logits_fake, pull_fake, statistics = jax.vjp(
    lambda p, r: judge(p, statistics, r), state.discriminator, forward.recon, has_aux=True
  )
  g_loss, g_cotangent = jax.value_and_grad(losses.generator_hinge)(logits_fake)
  grads, z_cotangent = forward.pull_decoder(pull_fake(g_cotangent)[1])
  weight = config.loss.disc_weight * losses.adaptive_weight(
    nll_grads["decoder"]["conv_out"]["kernel"],
    grads["decoder"]["conv_out"]["kernel"],
    losses.MAX_GAN_WEIGHT,
  )
  d_loss, (real_cotangent, fake_cotangent) = jax.value_and_grad(
    losses.discriminator_hinge, argnums=(0, 1)
  )(logits_real, logits_fake)
  return {
    "loss": weight * g_loss,
    "grads": jax.tree.map(lambda g: weight * g, grads),
    "z_cotangent": weight * z_cotangent,
    "discriminator_grads": _add(pull_real(real_cotangent)[0], pull_fake(fake_cotangent)[0]),
    "statistics": statistics,
    "metrics": {"g_loss": g_loss, "d_loss": d_loss, "disc_weight": weight},
  }


def _update_autoencoder(config: FrozenConfigDict, state: State, grads: Any) -> State:
  updates, optimizer = make_optimizer(config.optimizer).update(grads, state.optimizer, state.params)
  params = optax.apply_updates(state.params, updates)
  return dataclasses.replace(
    state,
    step=state.step + 1,
    params=params,
    ema=update_emas(state.ema, params),
    optimizer=optimizer,
  )


def _update_discriminator(
  config: FrozenConfigDict, state: State, adversarial: dict[str, Any]
) -> State:
  # Its count of updates starts with the GAN, the schedule with the training.
  transformation = make_optimizer(config.optimizer, start=config.loss.disc_start)
  updates, optimizer = transformation.update(
    adversarial["discriminator_grads"], state.discriminator_optimizer, state.discriminator
  )
  return dataclasses.replace(
    state,
    discriminator=optax.apply_updates(state.discriminator, updates),
    discriminator_statistics=adversarial["statistics"],
    discriminator_optimizer=optimizer,
  )


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)


def train_data(
  config: FrozenConfigDict, process_index: int, process_count: int
) -> grain.IterDataset:
  """This process's endless batches of random crops."""
  source = _source(config.data.source)
  train, _ = images.split(len(source), config.data.held_out, config.data.split_seed)
  return images.training_batches(
    source,
    train[process_index::process_count],
    size=config.data.image_size,
    batch_size=config.batch_size // process_count,
    seed=config.seed,
  )


def evaluators(config: FrozenConfigDict) -> dict[str, Any]:
  """Reconstructions of fixed held-out pictures (of training ones where none are held out)."""
  source = _source(config.data.source)
  train, held_out = images.split(len(source), config.data.held_out, config.data.split_seed)
  chosen = (held_out if len(held_out) else train)[:EVALUATION_IMAGES]
  crops = jnp.asarray(images.load_crops(source, chosen, config.data.image_size))
  graph = functional.graph_of(build_autoencoder(config))

  @jax.jit
  def reconstruct(params: Any, image_BHWC: jax.Array) -> jax.Array:
    model = nnx.merge(graph, params["autoencoder"])
    return model.decode(model.encode(images.to_float(image_BHWC)).mode())

  def evaluate(state: State) -> dict[str, Any]:
    recon = reconstruct(averaged(config.optimizer, state), crops)
    recon = images.to_uint8(recon)
    rows = [
      np.concatenate(list(x[:PICTURE_IMAGES]), axis=1) for x in jax.device_get((crops, recon))
    ]
    psnr = pixels.psnr(images.to_float(crops), images.to_float(recon))
    return {"psnr": float(jnp.mean(psnr)), "pictures": np.concatenate(rows)}

  return {"reconstruction": (config.evaluate_every_steps, evaluate)}
