"""Pictures -> what a latent store keeps of them, by seed and index alone: see `store.shards`."""

from __future__ import annotations

import jax

from lightningdit_jax.store import shards
from vavae_jax.autoencoder import Autoencoder
from vavae_jax.data import images


def columns(
  model: Autoencoder, batch: dict[str, jax.Array], *, seed: int, dtype: str, moments: bool
) -> dict[str, jax.Array]:
  """The latents of pictures and of their mirror images; pure and jittable.

  A batch is {"image": uint8 [B, H, W, 3], "index": int32 [B], of the records}. The result is arrays
  [B, h, w, Z] of `dtype` by the names of `shards.SAMPLES` or, with `moments`, `shards.POSTERIORS`.
  The posterior's noise is a function of the seed, the index and the mirroring.
  """
  picture = images.to_float(batch["image"])
  posteriors = model.encode(picture), model.encode(picture[:, :, ::-1])
  if moments:
    found = [x for posterior in posteriors for x in (posterior.mean, posterior.std)]
    return {n: x.astype(dtype) for n, x in zip(shards.POSTERIORS, found, strict=True)}
  key = jax.random.key(seed)

  def noise(flip: int, shape: tuple[int, ...]) -> jax.Array:
    def one(i: jax.Array) -> jax.Array:
      return jax.random.normal(jax.random.fold_in(key, 2 * i + flip), shape[1:])

    return jax.vmap(one)(batch["index"])

  return {
    name: posterior.sample(noise(flip, posterior.mean.shape)).astype(dtype)
    for flip, (name, posterior) in enumerate(zip(shards.SAMPLES, posteriors, strict=True))
  }
