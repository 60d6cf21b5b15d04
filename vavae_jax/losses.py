"""The tokenizer's losses as pure functions; paper section 3.2, reference `contperceptual.py`.

The reconstruction is a sum over pixels and channels divided by the batch: that scale decides what
the KL weight of 1e-6 means (`pp_style` makes means of both). The two alignment losses compare
projected latents with a teacher's features on the same grid; no gradient flows into the teacher,
all of it into the latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

MAX_ALIGNMENT_WEIGHT = 1e8
MAX_GAN_WEIGHT = 1e4
ADVERSARIAL = ("hinge", "vanilla")


def reconstruction(
  image_BHWC: jax.Array, reconstruction_BHWC: jax.Array, perceptual_B: jax.Array | float = 0.0
) -> jax.Array:
  """What a pixel and channel of a batch costs on average: L1 and a perceptual distance.

  Args:
    image_BHWC: in [-1, 1].
    reconstruction_BHWC: likewise.
    perceptual_B: a distance per image, added to every pixel and channel.

  Returns:
    float32 scalar. Times the number of pixels and channels of one image it is the negative log
    likelihood of a Laplace with unit scale, a mean over the batch.
  """
  return jnp.mean(jnp.abs(image_BHWC - reconstruction_BHWC)) + jnp.mean(perceptual_B)


def feature_distance(features_a: Sequence[jax.Array], features_b: Sequence[jax.Array]) -> jax.Array:
  """Distance of two pictures in the unit-normalised feature maps of a frozen network.

  LPIPS (Zhang et al. 2018) without its learned channel weights.

  Args:
    features_a: maps [B, h, w, F], each stage with its own h, w, F.
    features_b: likewise.

  Returns:
    float32 [B]: the mean over positions of the squared distance, averaged over stages.
  """
  stages = [
    jnp.sum((_unit(a) - _unit(b)) ** 2, -1).mean((1, 2))
    for a, b in zip(features_a, features_b, strict=True)
  ]
  return jnp.mean(jnp.stack(stages), axis=0)


def cosine(projected_BhwF: jax.Array, features_BhwF: jax.Array) -> jax.Array:
  """Cosine similarity at each position, float32 [B, h, w]; arguments as `marginal_cosine`'s."""
  return jnp.sum(_unit(projected_BhwF) * _unit(features_BhwF), -1)


def marginal_cosine(
  projected_BhwF: jax.Array, features_BhwF: jax.Array, margin: float = 0.0
) -> jax.Array:
  """Mean over positions of relu(1 - margin - cos(projected latent, feature)).

  Args:
    projected_BhwF: latents after the projection to the teacher's width.
    features_BhwF: the teacher's.
    margin: similarity above 1 - margin costs nothing.

  Returns:
    float32 scalar.
  """
  return jnp.mean(jax.nn.relu(1 - margin - cosine(projected_BhwF, features_BhwF)))


def marginal_distance_matrix(
  projected_BhwF: jax.Array, features_BhwF: jax.Array, margin: float = 0.0
) -> jax.Array:
  """Mean over pairs of positions of one image of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

  Args:
    projected_BhwF: latents after the projection; the width may differ from the teacher's.
    features_BhwF: the teacher's, on the same grid.
    margin: differences below it cost nothing.

  Returns:
    float32 scalar.
  """

  def similarities(x_BhwF: jax.Array) -> jax.Array:
    x_BNF = _unit(x_BhwF).reshape(x_BhwF.shape[0], -1, x_BhwF.shape[-1])
    return jnp.einsum("bif,bjf->bij", x_BNF, x_BNF)

  difference_BNN = jnp.abs(similarities(projected_BhwF) - similarities(features_BhwF))
  return jnp.mean(jax.nn.relu(difference_BNN - margin))


def generator(logits_fake: jax.Array) -> jax.Array:
  """The generator's adversarial loss: minus the mean logit of its reconstructions."""
  return -jnp.mean(logits_fake)


def discriminator(logits_real: jax.Array, logits_fake: jax.Array, kind: str) -> jax.Array:
  """The discriminator's loss, a mean of its real and its fake half.

  Args:
    logits_real: of pictures, any shape.
    logits_fake: of reconstructions.
    kind: one of `ADVERSARIAL`: "hinge" is content with logits beyond +-1, "vanilla" is the
      cross-entropy.

  Returns:
    float32 scalar.
  """
  cost = {"hinge": lambda x: jax.nn.relu(1 - x), "vanilla": lambda x: jax.nn.softplus(-x)}[kind]
  return 0.5 * (jnp.mean(cost(logits_real)) + jnp.mean(cost(-logits_fake)))


def adaptive_weight(nll_grad: jax.Array, other_grad: jax.Array, limit: float) -> jax.Array:
  """The factor that makes another loss pull at one layer as hard as the reconstruction does.

  Args:
    nll_grad: gradient of the reconstruction at that layer's kernel.
    other_grad: gradient of the other loss there.
    limit: the largest factor.

  Returns:
    float32 scalar |nll_grad| / (|other_grad| + 1e-4), through which no gradient flows.
  """
  ratio = jnp.linalg.norm(nll_grad) / (jnp.linalg.norm(other_grad) + 1e-4)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, limit))


def _unit(x: jax.Array) -> jax.Array:
  """Unit vectors along the last axis; the norm is clamped, since it has no gradient at zero."""
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, -1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))
