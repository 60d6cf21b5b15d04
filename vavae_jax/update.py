"""One update of the tokenizer and its discriminator; paper section 3, reference `vavae/`.

The adaptive weights need the gradient of each loss at one layer. The reference takes them by six
partial backward passes before the two full ones; here the networks are run piece by piece through
`jax.vjp` and everything is computed once: one backward pass through the perceptual network, one
through the discriminator for its input, one through the encoder, one through the decoder, and a
second through its activations alone where both adaptive weights are wanted.

DEVIATION: the adaptive weights are norms of the global batch's gradients; in the reference each GPU
has its own, of its 8 images. The discriminator learns from the reconstruction that the generator's
update used, as there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from vavae_jax import losses
from vavae_jax.autoencoder import Autoencoder
from vavae_jax.common import functional
from vavae_jax.common.optimizer import make_optimizer, update_emas
from vavae_jax.data import images
from vavae_jax.discriminator import BatchNorm, PatchDiscriminator
from vavae_jax.stages import Phase

Metrics = dict[str, jax.Array]
# What `config.train` = "decoder" leaves as it is.
ENCODER = ("encoder", "quant_conv", "shortcut_in")


@flax.struct.dataclass
class State:
  """All that training changes.

  Attributes:
    step: int32 scalar, updates done.
    params: {"autoencoder": ..., "projection": {"kernel", "bias"}, where there is a teacher}.
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


def build_discriminator(config: FrozenConfigDict) -> Callable[[nnx.Rngs], PatchDiscriminator]:
  """The discriminator of a configuration, for `functional`."""
  return functools.partial(_discriminator, config)


def _discriminator(config: FrozenConfigDict, rngs: nnx.Rngs) -> PatchDiscriminator:
  group = config.loss.disc_bn_group
  dtype = jnp.dtype(config.dtype)
  return PatchDiscriminator(**config.discriminator, bn_group=group, dtype=dtype, rngs=rngs)


def update(
  config: FrozenConfigDict,
  phase: Phase,
  state: State,
  networks: Mapping[str, Any],
  batch: Any,
  noise: jax.Array,
) -> tuple[State, Metrics]:
  """One update of the autoencoder and, once the GAN has started, of the discriminator.

  Args:
    config: the whole configuration.
    phase: of this step.
    state: before it.
    networks: the frozen ones, by name, from `frozen.merge`.
    batch: {"image": uint8 [B, H, W, 3], and "features" [B, h, w, F] where they are kept}.
    noise: standard normal [B, h, w, Z], which picks the latents.

  Returns:
    (new state, scalar metrics).
  """
  image = images.to_float(batch["image"])
  forward = _Forward(config, state.params["autoencoder"], image, noise)
  metrics = forward.metrics()

  nll, pull_nll, parts = jax.vjp(
    functools.partial(_nll, config, networks.get("perceptual"), image),
    forward.recon,
    has_aux=True,
  )
  (nll_cotangent,) = pull_nll(jnp.ones_like(nll))
  recon_cotangent = nll_cotangent
  loss = nll + config.loss.kl_weight * forward.kl
  metrics |= {"nll": nll, "kl": forward.kl, **parts}

  # Without a discriminator's weight in the loss it may still watch, as the reference's does.
  if phase.gan or config.loss.disc_idle:
    gan = _Adversary(config, state, image, forward.recon)
    weight = gan.weight(config, forward, nll_cotangent)
    if phase.gan:
      recon_cotangent = recon_cotangent + weight * gan.recon_cotangent
      loss = loss + weight * gan.g_loss
    state, gan_metrics = gan.learn(config, state, phase)
    metrics |= {"disc_weight": weight, **gan_metrics}

  grads, z_cotangent = forward.pull_decoder(recon_cotangent)
  grads = {"autoencoder": grads}
  if "projection" in state.params:
    features = batch.get("features")
    features = networks["teacher"](image) if features is None else features
    alignment = _Alignment(config, phase, state.params["projection"], features, forward.z_BhwZ)
    weight = jnp.float32(config.stages.vf_weight[phase.stage])
    if config.loss.adaptive_vf:
      from_nll = z_cotangent if not phase.gan else forward.pull_z(nll_cotangent)
      weight *= losses.adaptive_weight(
        forward.encoder_last_grad(from_nll),
        forward.encoder_last_grad(alignment.z_cotangent),
        losses.MAX_ALIGNMENT_WEIGHT,
      )
    grads["projection"] = jax.tree.map(lambda g: weight * g, alignment.projection_grads)
    z_cotangent = z_cotangent + weight * alignment.z_cotangent
    loss = loss + weight * alignment.loss
    metrics |= {"vf": alignment.loss, "vf_weight": weight, **alignment.metrics}

  if config.train == "all":
    encoder_grads = forward.pull_encoder(z_cotangent, config.loss.kl_weight)
    grads["autoencoder"] = _add(grads["autoencoder"], encoder_grads)
  metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  return _update_autoencoder(config, state, grads), metrics


class _Forward:
  """The autoencoder run on a batch in four pieces, each with its way back.

  Cut before the last layers of encoder and decoder, where the adaptive weights compare gradients.
  What a way back gives and nobody uses, such as the parameters' part of `pull_z`, is not computed.
  """

  def __init__(
    self, config: FrozenConfigDict, params: Any, image: jax.Array, noise_BhwZ: jax.Array
  ):
    graph = functional.graph_of(build_autoencoder(config))
    # The reference's mean, of `pp_style`, lacks the half that its sum has.
    unit = noise_BhwZ[0].size / 2 if config.loss.pp_style else 1

    def latent(params: Any, trunk: jax.Array) -> tuple[jax.Array, jax.Array]:
      posterior = nnx.merge(graph, params).posterior(trunk, image)
      return posterior.sample(noise_BhwZ), jnp.mean(posterior.kl()) / unit

    trunk, self._pull_trunk = jax.vjp(lambda p: nnx.merge(graph, p).encode_trunk(image), params)
    (self.z_BhwZ, self.kl), self._pull_latent = jax.vjp(latent, params, trunk)
    decoded, self._pull_decoded = jax.vjp(
      lambda p, z: nnx.merge(graph, p).decode_trunk(z), params, self.z_BhwZ
    )
    self.recon, self._pull_image = jax.vjp(
      lambda p, d, z: nnx.merge(graph, p).image(d, z), params, decoded, self.z_BhwZ
    )

  def metrics(self) -> Metrics:
    """What the latents look like."""
    return {"latent_mean": jnp.mean(self.z_BhwZ), "latent_std": jnp.std(self.z_BhwZ)}

  def pull_decoder(self, recon_cotangent: jax.Array) -> tuple[Any, jax.Array]:
    """Back from the reconstruction: (gradients of the parameters, cotangent of z)."""
    last_grads, decoded_cotangent, z_direct = self._pull_image(recon_cotangent)
    grads, z_cotangent = self._pull_decoded(decoded_cotangent)
    return _add(grads, last_grads), z_cotangent + z_direct

  def pull_z(self, recon_cotangent: jax.Array) -> jax.Array:
    """Back from the reconstruction to z alone."""
    return self.pull_decoder(recon_cotangent)[1]

  def decoder_last_grad(self, recon_cotangent: jax.Array) -> jax.Array:
    """The gradient at the kernel of the decoder's last layer."""
    return self._pull_image(recon_cotangent)[0]["decoder"]["conv_out"]["kernel"]

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


def _nll(
  config: FrozenConfigDict, perceptual: Any, image: jax.Array, recon: jax.Array
) -> tuple[jax.Array, Metrics]:
  """The reconstruction's loss, and its parts per pixel and channel."""
  parts = {"l1": jnp.mean(jnp.abs(image - recon))}
  distance_B: jax.Array | float = 0.0
  if perceptual is not None:
    there = jax.lax.stop_gradient(perceptual.features(image))
    distance_B = perceptual.distance(there, perceptual.features(recon))
    parts["perceptual"] = jnp.mean(distance_B)
    distance_B *= config.loss.perceptual_weight
  loss = losses.reconstruction(image, recon, distance_B)
  return loss * (1 if config.loss.pp_style else image[0].size), parts


class _Alignment:
  """The alignment loss of a batch and its gradients, not yet weighted."""

  def __init__(
    self,
    config: FrozenConfigDict,
    phase: Phase,
    projection: Any,
    features_BhwF: jax.Array,
    z_BhwZ: jax.Array,
  ):
    stages = config.stages

    def loss_of(projection: Any, z_BhwZ: jax.Array) -> tuple[jax.Array, Metrics]:
      pair = project(projection, z_BhwZ, features_BhwF, config.teacher.reverse_proj)
      near = losses.marginal_cosine(*pair, stages.cos_margin[phase.stage])
      alike = losses.marginal_distance_matrix(*pair, stages.distmat_margin[phase.stage])
      metrics = {
        "vf_cos": near,
        "vf_distmat": alike,
        "teacher_cosine": jnp.mean(losses.cosine(*pair)),
      }
      return config.loss.cos_weight * near + config.loss.distmat_weight * alike, metrics

    self.loss, pull, self.metrics = jax.vjp(loss_of, projection, z_BhwZ, has_aux=True)
    self.projection_grads, self.z_cotangent = pull(jnp.ones_like(self.loss))


def project(
  projection: Any, z_BhwZ: jax.Array, features_BhwF: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """Latents and features in one width: the projected latents and the features, as published, or
  (`reverse` False) the latents and the projected features.
  """
  features_BhwF = jax.lax.stop_gradient(features_BhwF.astype(jnp.float32))
  if reverse:
    return z_BhwZ @ projection["kernel"], features_BhwF
  return z_BhwZ, features_BhwF @ projection["kernel"] + projection["bias"]


class _Adversary:
  """The discriminator's judgement of a batch and all gradients by it, from one pass each."""

  def __init__(self, config: FrozenConfigDict, state: State, image: jax.Array, recon: jax.Array):
    graph = functional.graph_of(build_discriminator(config))

    def judge(params: Any, statistics: Any, picture: jax.Array) -> tuple[jax.Array, Any]:
      network = nnx.merge(graph, params, statistics)
      logits = network(picture, train=True)
      return logits, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

    before = state.discriminator_statistics
    self._logits_fake, self._pull_fake, after_fake = jax.vjp(
      lambda p, r: judge(p, before, r), state.discriminator, recon, has_aux=True
    )
    self._logits_real, self._pull_real, after_real = jax.vjp(
      lambda p: judge(p, after_fake, image), state.discriminator, has_aux=True
    )
    # The reference judges the reconstruction for the generator, then the picture, then the
    # reconstruction again: a third update, whose statistics are the first one's.
    self._statistics = jax.tree.map(_repeated_update, before, after_fake, after_real)
    self.g_loss, g_cotangent = jax.value_and_grad(losses.generator)(self._logits_fake)
    _, self.recon_cotangent = self._pull_fake(g_cotangent)

  def weight(
    self, config: FrozenConfigDict, forward: _Forward, nll_cotangent: jax.Array
  ) -> jax.Array:
    """The factor of the generator's loss."""
    return config.loss.disc_weight * losses.adaptive_weight(
      forward.decoder_last_grad(nll_cotangent),
      forward.decoder_last_grad(self.recon_cotangent),
      losses.MAX_GAN_WEIGHT,
    )

  def learn(self, config: FrozenConfigDict, state: State, phase: Phase) -> tuple[State, Metrics]:
    """The discriminator's own step: (state with it, metrics)."""
    loss_of = functools.partial(losses.discriminator, kind=config.loss.disc_loss)
    d_loss, (real_cotangent, fake_cotangent) = jax.value_and_grad(loss_of, argnums=(0, 1))(
      self._logits_real, self._logits_fake
    )
    grads = _add(self._pull_real(real_cotangent)[0], self._pull_fake(fake_cotangent)[0])
    grads = jax.tree.map(lambda g: phase.gan * g, grads)
    # Its count of updates starts with the GAN, the schedule with the training.
    updates, optimizer = make_optimizer(config.optimizer, state.step).update(
      grads, state.discriminator_optimizer, state.discriminator
    )
    metrics = {
      "g_loss": self.g_loss,
      "d_loss": phase.gan * d_loss,
      "logits_real": jnp.mean(self._logits_real),
      "logits_fake": jnp.mean(self._logits_fake),
      "disc_grad_norm": optax.tree.norm(grads),
    }
    state = dataclasses.replace(
      state,
      discriminator=optax.apply_updates(state.discriminator, updates),
      discriminator_statistics=self._statistics,
      discriminator_optimizer=optimizer,
    )
    return state, metrics


def _repeated_update(before: jax.Array, after: jax.Array, later: jax.Array) -> jax.Array:
  """`later` updated by what once made `after` of `before`: later + 0.1 (x - later)."""
  return later + (after - before) + BatchNorm.MOMENTUM * (before - later)


def _update_autoencoder(config: FrozenConfigDict, state: State, grads: Any) -> State:
  updates, optimizer = make_optimizer(config.optimizer).update(grads, state.optimizer, state.params)
  if config.train == "decoder":  # weight decay would move what has no gradient
    updates["autoencoder"] |= {
      name: jax.tree.map(jnp.zeros_like, updates["autoencoder"][name])
      for name in ENCODER
      if name in updates["autoencoder"]
    }
  params = optax.apply_updates(state.params, updates)
  return dataclasses.replace(
    state,
    step=state.step + 1,
    params=params,
    ema=update_emas(state.ema, params),
    optimizer=optimizer,
  )


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)
