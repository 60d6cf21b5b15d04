"""The tokenizer's losses as pure functions; paper section 3.2, reference `contperceptual.py`.

The two alignment losses compare projected latents with a teacher's features on the same grid; no
gradient flows into the teacher, all of it into the latents. All results are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

MAX_ALIGNMENT_WEIGHT = 1e8
MAX_GAN_WEIGHT = 1e4
ADVERSARIAL = ("hinge", "vanilla")


def feature_distance(features_a: Sequence[jax.Array], features_b: Sequence[jax.Array]) -> jax.Array:
  """Distance [B] of pictures in the unit-normalised feature maps of a frozen network.

  LPIPS (Zhang et al. 2018) without its learned channel weights: of each map [B, h, w, F] the mean
  over positions of the squared distance, averaged over the maps.
  """
  chex.assert_trees_all_equal_shapes(list(features_a), list(features_b))
  stages = [
    jnp.sum((_unit(a) - _unit(b)) ** 2, -1).mean((1, 2))
    for a, b in zip(features_a, features_b, strict=True)
  ]
  return jnp.mean(jnp.stack(stages), axis=0)


def cosine(projected_BhwF: jax.Array, features_BhwF: jax.Array) -> jax.Array:
  """Cosine similarity at each position, [B, h, w]."""
  chex.assert_equal_shape([projected_BhwF, features_BhwF])
  return jnp.sum(_unit(projected_BhwF) * _unit(features_BhwF), -1)


def marginal_cosine(
  projected_BhwF: jax.Array, features_BhwF: jax.Array, margin: float = 0.0
) -> jax.Array:
  """Mean over positions of relu(1 - margin - cos(projected latent, feature)), the paper's L_mcos.

  Both are [B, h, w, F]; a similarity above 1 - margin costs nothing.
  """
  return jnp.mean(jax.nn.relu(1 - margin - cosine(projected_BhwF, features_BhwF)))


def marginal_distance_matrix(
  projected_BhwF: jax.Array, features_BhwF: jax.Array, margin: float = 0.0
) -> jax.Array:
  """Mean over position pairs of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin), L_mdms.

  Pairs are within one image; both arrays lie on one grid [B, h, w], their widths may differ.
  """

  chex.assert_equal_shape_prefix([projected_BhwF, features_BhwF], 3)

  def similarities(x_BhwF: jax.Array) -> jax.Array:
    x_BNF = _unit(x_BhwF).reshape(x_BhwF.shape[0], -1, x_BhwF.shape[-1])
    return jnp.einsum("bif,bjf->bij", x_BNF, x_BNF)

  difference_BNN = jnp.abs(similarities(projected_BhwF) - similarities(features_BhwF))
  return jnp.mean(jax.nn.relu(difference_BNN - margin))


def generator(logits_fake: jax.Array) -> jax.Array:
  """The generator's adversarial loss: minus the mean logit of its reconstructions."""
  return -jnp.mean(logits_fake)


def discriminator(logits_real: jax.Array, logits_fake: jax.Array, kind: str) -> jax.Array:
  """The discriminator's loss, a mean of its real and its fake half, by logits of any shape.

  Of kind "hinge" logits beyond +-1 cost nothing; "vanilla" is the cross-entropy.
  """
  chex.assert_equal_shape([logits_real, logits_fake])
  cost = {"hinge": lambda x: jax.nn.relu(1 - x), "vanilla": lambda x: jax.nn.softplus(-x)}[kind]
  return 0.5 * (jnp.mean(cost(logits_real)) + jnp.mean(cost(-logits_fake)))


def adaptive_weight(nll_grad: jax.Array, other_grad: jax.Array, limit: float) -> jax.Array:
  """The factor with which another loss pulls at a layer's kernel as hard as the reconstruction.

  |nll_grad| / (|other_grad| + 1e-4), at most `limit`; no gradient flows through it.
  """
  ratio = jnp.linalg.norm(nll_grad) / (jnp.linalg.norm(other_grad) + 1e-4)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, limit))


def _unit(x: jax.Array) -> jax.Array:
  """Unit vectors along the last axis; the norm is clamped, since it has no gradient at zero."""
  x = x.astype(jnp.float32)
  square = jnp.sum(x * x, -1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))
