"""EQ-VAE: latents that turn and shrink as their pictures do.

In a share of the batches the latents are shrunk and turned before they are decoded, and all losses
of reconstructions compare with the picture that was shrunk and turned likewise. Some other batches
are of pictures that were shrunk before they were encoded, so that these stay good. Which batch is
what, and its scale, is a function of seed and step; each scale compiles a program of its own.

Source: Kouzelis et al., EQ-VAE, arXiv 2502.09509; zelaki/eqvae ldm/models/autoencoder.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import Key
from vavae_jax.perceptual import SMALLEST

# The keys of `config.equivariance`.
EQUIVARIANCE: dict[str, Key] = {
  "share": Key(0.0, "[0, 1]", "Of batches whose latents are shrunk and turned; docs/beyond.md."),
  "low_share": Key(0.0, "[0, 1]", "Of the others, those of pictures that are shrunk before."),
  "scales": Key(
    (0.25, 0.5, 0.75), "(0, 1)", "One of them each time; grids of latents stay whole.", kind=float
  ),
}
_STREAM = 1  # of numbers by seed and step

Change = Callable[[jax.Array], jax.Array]


class Size(NamedTuple):
  """What a batch is shrunk to, static."""

  scale: float = 1.0
  before: bool = False  # it is encoded; else its latents are shrunk, and turned


def drawn(config: FrozenConfigDict, step: int) -> Size:
  """That of a step."""
  wanted = config.equivariance
  if not (wanted.share or wanted.low_share):
    return Size()
  numbers = np.random.default_rng((config.seed, step, _STREAM))
  is_changed, is_low = numbers.random(2) < (wanted.share, wanted.low_share)
  scale = float(numbers.choice(wanted.scales))
  return Size(scale, not is_changed) if is_changed or is_low else Size()


def check(config: FrozenConfigDict, grid: int) -> None:
  """Raises InputError where latents of `grid` x `grid` cells cannot be shrunk so."""
  wanted = config.equivariance
  if not (wanted.share or wanted.low_share):
    return
  if not wanted.scales or any((grid * scale) % 1 for scale in wanted.scales):
    raise InputError(
      f"config.equivariance.scales are {tuple(wanted.scales)}; give some that make whole cells of "
      f"the {grid} along a side of the latents."
    )
  side = round(config.data.image_size * min(wanted.scales))
  if config.loss.perceptual_weight and config.perceptual.network == "lpips" and side < SMALLEST:
    raise InputError(
      f"config.equivariance.scales shrink pictures to {side} pixels a side, and LPIPS needs "
      f"{SMALLEST}; give larger scales, or config.perceptual.network another one."
    )
  if wanted.low_share and config.teacher.name:
    raise InputError(
      f"config.equivariance.low_share is {wanted.low_share}, but the features of "
      f"{config.teacher.name} are of pictures of full size; set one to 0, or teacher.name to ''."
    )


def least(config: FrozenConfigDict) -> float:
  """The smallest side of what is decoded, as a part of the pictures' side."""
  wanted = config.equivariance
  return min(wanted.scales) if wanted.share or wanted.low_share else 1.0


def encoded(size: Size, latent_hwZ: tuple[int, int, int]) -> tuple[int, int, int]:
  """The shape of the latents of a batch, from that of whole pictures."""
  height, width, channels = latent_hwZ
  scale = size.scale if size.before else 1
  return round(height * scale), round(width * scale), channels


def change(size: Size, key: jax.Array) -> Change:
  """What is done to latents, and to the picture that they are decoded to; nothing by default."""
  if size.scale == 1 or size.before:
    return lambda x: x
  quarters = jax.random.randint(jax.random.fold_in(key, 1), (), 0, 3)

  def changed(x_BHWC: jax.Array) -> jax.Array:
    small = shrunk(x_BHWC, size.scale)
    turns = [lambda x, k=k: turned(x, k) for k in (1, 2, 3)]
    return jax.lax.switch(quarters, turns, small)

  return changed


def before(size: Size, image_BHWC: jax.Array) -> jax.Array:
  """The picture that is encoded."""
  return shrunk(image_BHWC, size.scale) if size.before else image_BHWC


def shrunk(x_BHWC: jax.Array, scale: float) -> jax.Array:
  """Bilinear at half-pixel centres, without antialiasing, as PyTorch's `interpolate`."""
  batch, height, width, channels = x_BHWC.shape
  shape = (batch, round(height * scale), round(width * scale), channels)
  return jax.image.resize(x_BHWC, shape, "linear", antialias=False)


def turned(x_BHWC: jax.Array, quarters: int) -> jax.Array:
  """By quarters of a turn from the width's axis to the height's, as `torch.rot90` by [-1, -2]."""
  return jnp.rot90(x_BHWC, quarters, axes=(2, 1))
