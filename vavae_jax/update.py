"""One update of the tokenizer and its discriminator; paper section 3, reference `vavae/`.

`LOSSES` is all that the generator pays for. The adaptive weights need the gradient of each group of
losses at one layer. The reference takes them by six partial backward passes before the two full
ones; here the networks run piece by piece through `jax.vjp` and everything is computed once: one
backward pass through the perceptual network, one through the discriminator for its input, one
through the encoder, one through the decoder, and a second through its activations alone if both
adaptive weights are wanted.

DEVIATION: the adaptive weights are norms of the global batch's gradients; in the reference each GPU
has its own, of its 8 images. The discriminator learns from the reconstruction that the generator's
update used, as there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from vavae_jax import equivariance, losses
from vavae_jax.autoencoder import Autoencoder, Posterior
from vavae_jax.common import functional, optimizer
from vavae_jax.common.optimizer import make_optimizer
from vavae_jax.data import images
from vavae_jax.discriminator import BatchNorm, PatchDiscriminator
from vavae_jax.stages import COLUMNS, Phase

Metrics = dict[str, jax.Array]
# What `config.train` = "decoder" leaves as it is.
ENCODER = ("encoder", "quant_conv", "shortcut_in")


class Term(NamedTuple):
  """A loss of the generator."""

  name: str  # of its metric
  weight: str  # the key of its weight in `config.loss`; "" for a weight of 1
  of: Callable[..., jax.Array]  # what its group gives -> a scalar, or an array: its mean
  always: bool = False  # compute it for its metric even if its weight is 0


def _perceptual(image: jax.Array, recon: jax.Array, network: Any) -> jax.Array:
  real = jax.lax.stop_gradient(network.features(image))
  return network.distance(real, network.features(recon))


def _kl(posterior: Posterior, pp_style: bool) -> jax.Array:
  # The reference's mean, of `pp_style`, lacks the half that its sum has.
  return jnp.mean(posterior.kl()) / (posterior.mean[0].size / 2 if pp_style else 1)


LOSSES: dict[str, tuple[Term, ...]] = {
  # Of (image, reconstruction, perceptual network), per pixel and channel: their sum, unless
  # `loss.pp_style` times pixels and channels, is the negative log likelihood. Adaptive weights make
  # the other groups pull as hard as it does.
  "reconstruction": (
    Term("l1", "", lambda image, recon, _: jnp.abs(image - recon)),
    Term("perceptual", "perceptual_weight", _perceptual),
  ),
  # Of (posterior, `loss.pp_style`).
  "latent": (Term("kl", "kl_weight", _kl, always=True),),
  # Of (projected latents, features, the columns of `stages`). Their sum has the stage's `vf_weight`
  # and, if `loss.adaptive_vf`, an adaptive weight.
  "alignment": (
    Term(
      "vf_cos",
      "cos_weight",
      lambda z, f, stage: losses.marginal_cosine(z, f, stage["cos_margin"]),
      always=True,
    ),
    Term(
      "vf_distmat",
      "distmat_weight",
      lambda z, f, stage: losses.marginal_distance_matrix(z, f, stage["distmat_margin"]),
      always=True,
    ),
  ),
  # Of the discriminator's logits of reconstructions. Their sum has `loss.disc_weight` and an
  # adaptive weight.
  "adversarial": (Term("g_loss", "", losses.generator),),
}


def _total(group: str, config: FrozenConfigDict, *given: Any) -> tuple[jax.Array, Metrics]:
  """The weighted sum of a group's losses, and each loss without its weight."""
  total, metrics = jnp.zeros(()), {}
  for term in LOSSES[group]:
    weight = config.loss[term.weight] if term.weight else 1.0
    if weight or term.always:
      value = term.of(*given)
      total += jnp.mean(weight * value)
      metrics[term.name] = jnp.mean(value)
  return total, metrics


@flax.struct.dataclass
class State(optimizer.State):
  """All that training changes.

  `params` has the "autoencoder" and, with a teacher, a "projection" {"kernel", "bias"}.
  """

  discriminator: Any  # parameters of the PatchGAN
  discriminator_statistics: Any  # running ones, of its BatchNorm
  discriminator_optimizer: Any


@functools.lru_cache(64)  # one function for a configuration, by which graphs are cached
def build_autoencoder(config: FrozenConfigDict) -> Callable[[nnx.Rngs], Autoencoder]:
  """The autoencoder of a configuration, for `functional`."""
  return lambda rngs: Autoencoder(**config.model, dtype=jnp.dtype(config.dtype), rngs=rngs)


@functools.lru_cache(64)
def build_discriminator(config: FrozenConfigDict) -> Callable[[nnx.Rngs], PatchDiscriminator]:
  """The discriminator of a configuration, for `functional`."""
  options = {"bn_group": config.loss.disc_bn_group, "dtype": jnp.dtype(config.dtype)}
  return lambda rngs: PatchDiscriminator(**config.discriminator, **options, rngs=rngs)


def update(
  config: FrozenConfigDict,
  phase: Phase,
  state: State,
  networks: Mapping[str, Any],
  batch: Any,
  noise: jax.Array,
  change: equivariance.Change = lambda x: x,
) -> tuple[State, Metrics]:
  """One update of the autoencoder and, once the GAN has started, of the discriminator.

  `networks` are the frozen ones, by name, from `frozen.merge`; `batch` is {"image": uint8
  [B, H, W, 3], and "features" [B, h, w, F] where they are kept}; `noise`, standard normal
  [B, h, w, Z], picks the latents; `change` is done to these, and to the picture that they should be
  decoded to. Metrics are scalars.
  """
  image = equivariance.before(phase.size, images.to_float(batch["image"]))
  chex.assert_rank([image, noise], 4)
  forward = _Forward(config, state.params["autoencoder"], image, noise, change)
  target = change(image)

  def nll_of(recon: jax.Array) -> tuple[jax.Array, Metrics]:
    chex.assert_equal_shape([target, recon])
    loss, parts = _total("reconstruction", config, target, recon, networks.get("perceptual"))
    return loss * (1 if config.loss.pp_style else target[0].size), parts

  nll, pull_nll, parts = jax.vjp(nll_of, forward.recon, has_aux=True)
  (nll_cotangent,) = pull_nll(jnp.ones_like(nll))
  recon_cotangent = nll_cotangent
  loss = nll + forward.loss
  metrics = {**forward.metrics, "nll": nll, **parts}

  # Without a discriminator's weight in the loss it may still watch, as the reference's does.
  if phase.gan or config.loss.disc_idle:
    gan = _Adversary(config, state, target, forward.recon)
    weight = gan.weight(forward, nll_cotangent)
    if phase.gan:
      recon_cotangent = recon_cotangent + weight * gan.recon_cotangent
      loss = loss + weight * gan.loss
    state, gan_metrics = gan.learn(state, phase)
    metrics |= {"disc_weight": weight, **gan_metrics}

  autoencoder_grads, z_cotangent = forward.pull_decoder(recon_cotangent)
  grads = {"autoencoder": autoencoder_grads}
  if "projection" in state.params:
    features = batch.get("features")
    features = networks["teacher"](image) if features is None else features
    align = functools.partial(_alignment, config, phase.stage, features)
    vf, pull_vf, parts = jax.vjp(align, state.params["projection"], forward.z_BhwZ, has_aux=True)
    projection_grads, vf_cotangent = pull_vf(jnp.ones_like(vf))
    weight = jnp.float32(config.stages.vf_weight[phase.stage])
    if config.loss.adaptive_vf:
      from_nll = z_cotangent if not phase.gan else forward.pull_decoder(nll_cotangent)[1]
      weight *= losses.adaptive_weight(
        forward.encoder_last_grad(from_nll),
        forward.encoder_last_grad(vf_cotangent),
        losses.MAX_ALIGNMENT_WEIGHT,
      )
    grads["projection"] = jax.tree.map(lambda g: weight * g, projection_grads)
    z_cotangent = z_cotangent + weight * vf_cotangent
    loss = loss + weight * vf
    metrics |= {"vf": vf, "vf_weight": weight, **parts}

  if config.train == "all":
    grads["autoencoder"] = _add(grads["autoencoder"], forward.pull_encoder(z_cotangent))
  metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
  return _update_autoencoder(config, state, grads), metrics


class _Forward:
  """The autoencoder run on a batch in four pieces, each with its way back.

  Cut before the last layers of encoder and decoder, where the adaptive weights compare gradients.
  XLA drops what nobody uses, such as the parameters' part of a `pull_decoder` for z alone.
  """

  def __init__(
    self,
    config: FrozenConfigDict,
    params: Any,
    image: jax.Array,
    noise_BhwZ: jax.Array,
    change: equivariance.Change,
  ):
    graph = functional.graph_of(build_autoencoder(config))

    def latent(params: Any, trunk: jax.Array) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
      posterior = nnx.merge(graph, params).posterior(trunk, image)
      z_BhwZ = posterior.sample(noise_BhwZ)  # first: the order decides how gradients round
      loss, parts = _total("latent", config, posterior, config.loss.pp_style)
      return (z_BhwZ, loss), parts

    trunk, self._pull_trunk = jax.vjp(lambda p: nnx.merge(graph, p).encode_trunk(image), params)
    (self.z_BhwZ, self.loss), self._pull_latent, parts = jax.vjp(
      latent, params, trunk, has_aux=True
    )
    changed, self._pull_changed = jax.vjp(change, self.z_BhwZ)
    decoded, self._pull_decoded = jax.vjp(
      lambda p, z: nnx.merge(graph, p).decode_trunk(z), params, changed
    )
    self.recon, self._pull_image = jax.vjp(
      lambda p, d, z: nnx.merge(graph, p).image(d, z), params, decoded, changed
    )
    z_BhwZ = self.z_BhwZ
    self.metrics = {"latent_mean": jnp.mean(z_BhwZ), "latent_std": jnp.std(z_BhwZ), **parts}

  def pull_decoder(self, recon_cotangent: jax.Array) -> tuple[Any, jax.Array]:
    """Back from the reconstruction: (gradients of the parameters, cotangent of z)."""
    last_grads, decoded_cotangent, z_direct = self._pull_image(recon_cotangent)
    grads, z_cotangent = self._pull_decoded(decoded_cotangent)
    return _add(grads, last_grads), self._pull_changed(z_cotangent + z_direct)[0]

  def decoder_last_grad(self, recon_cotangent: jax.Array) -> jax.Array:
    """The gradient at the kernel of the decoder's last layer."""
    return self._pull_image(recon_cotangent)[0]["decoder"]["conv_out"]["kernel"]

  def pull_encoder(self, z_cotangent: jax.Array) -> Any:
    """Back from the latent and its own losses: gradients of the parameters."""
    last_grads, trunk_cotangent = self._pull_latent((z_cotangent, jnp.ones_like(self.loss)))
    return _add(last_grads, self._pull_trunk(trunk_cotangent)[0])

  def encoder_last_grad(self, z_cotangent: jax.Array) -> jax.Array:
    """The gradient at the kernel of the encoder's last layer."""
    grads, _ = self._pull_latent((z_cotangent, jnp.zeros_like(self.loss)))
    return grads["encoder"]["conv_out"]["kernel"]


def _alignment(
  config: FrozenConfigDict, stage: int, features_BhwF: jax.Array, projection: Any, z_BhwZ: jax.Array
) -> tuple[jax.Array, Metrics]:
  pair = project(projection, z_BhwZ, features_BhwF, config.teacher.reverse_proj)
  columns = {name: config.stages[name][stage] for name in COLUMNS}
  loss, metrics = _total("alignment", config, *pair, columns)
  return loss, metrics | {"teacher_cosine": jnp.mean(losses.cosine(*pair))}


def project(
  projection: Any, z_BhwZ: jax.Array, features_BhwF: jax.Array, reverse: bool
) -> tuple[jax.Array, jax.Array]:
  """Latents and features in one width: the projected latents and the features, as published, or
  (`reverse` False) the latents and the projected features.
  """
  chex.assert_equal_shape_prefix([z_BhwZ, features_BhwF], 3)
  features_BhwF = jax.lax.stop_gradient(features_BhwF.astype(jnp.float32))
  if reverse:
    return z_BhwZ @ projection["kernel"], features_BhwF
  return z_BhwZ, features_BhwF @ projection["kernel"] + projection["bias"]


class _Adversary:
  """The discriminator's judgement of a batch and all gradients by it, from one pass each."""

  def __init__(self, config: FrozenConfigDict, state: State, image: jax.Array, recon: jax.Array):
    self._config = config
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
    (self.loss, self._metrics), cotangent = jax.value_and_grad(
      functools.partial(_total, "adversarial", config), has_aux=True
    )(self._logits_fake)
    _, self.recon_cotangent = self._pull_fake(cotangent)

  def weight(self, forward: _Forward, nll_cotangent: jax.Array) -> jax.Array:
    """The factor of the generator's adversarial losses."""
    return self._config.loss.disc_weight * losses.adaptive_weight(
      forward.decoder_last_grad(nll_cotangent),
      forward.decoder_last_grad(self.recon_cotangent),
      losses.MAX_GAN_WEIGHT,
    )

  def learn(self, state: State, phase: Phase) -> tuple[State, Metrics]:
    """The discriminator's own step: (state with it, metrics)."""
    config = self._config
    loss_of = functools.partial(losses.discriminator, kind=config.loss.disc_loss)
    d_loss, (real_cotangent, fake_cotangent) = jax.value_and_grad(loss_of, argnums=(0, 1))(
      self._logits_real, self._logits_fake
    )
    grads = _add(self._pull_real(real_cotangent)[0], self._pull_fake(fake_cotangent)[0])
    grads = jax.tree.map(lambda g: phase.gan * g, grads)
    # Its count of updates starts with the GAN, the schedule with the training.
    updates, moments = make_optimizer(config.optimizer, state.step).update(
      grads, state.discriminator_optimizer, state.discriminator
    )
    metrics = {
      **self._metrics,
      "d_loss": phase.gan * d_loss,
      "logits_real": jnp.mean(self._logits_real),
      "logits_fake": jnp.mean(self._logits_fake),
      "disc_grad_norm": optax.tree.norm(grads),
    }
    state = dataclasses.replace(
      state,
      discriminator=optax.apply_updates(state.discriminator, updates),
      discriminator_statistics=self._statistics,
      discriminator_optimizer=moments,
    )
    return state, metrics


def _repeated_update(before: jax.Array, after: jax.Array, later: jax.Array) -> jax.Array:
  """`later` updated by what once made `after` of `before`: later + 0.1 (x - later)."""
  return later + (after - before) + BatchNorm.MOMENTUM * (before - later)


def _update_autoencoder(config: FrozenConfigDict, state: State, grads: Any) -> State:
  def mask(updates: Any) -> Any:  # weight decay would move what has no gradient
    own = updates["autoencoder"]
    zeros = jax.tree.map(jnp.zeros_like, {name: own[name] for name in ENCODER if name in own})
    return updates | {"autoencoder": own | zeros}

  options = {"mask": mask} if config.train == "decoder" else {}
  return optimizer.step(config.optimizer, state, grads, **options)


def _add(a: Any, b: Any) -> Any:
  return jax.tree.map(jnp.add, a, b)
