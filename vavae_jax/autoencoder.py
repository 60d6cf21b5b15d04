"""The tokenizer's network: latent diffusion's KL autoencoder, image -> posterior -> image.

Module names follow the published checkpoints (`encoder.down.0.block.1.conv1`). Attention stands
where the feature map of an image of the nominal `resolution` has a size in `attn_resolutions`, and
always in the middle; other image sizes run through the same network. Convolutions run in `dtype`;
GroupNorm, attention's softmax and the posterior are float32.

Source: Rombach et al., arXiv 2112.10752; hustvl/LightningDiT
vavae/ldm/modules/diffusionmodules/model.py, vavae/ldm/models/autoencoder.py, and for MAR-VAE
tokenizer/autoencoder.py; CompVis/latent-diffusion models/first_stage_models/kl-f8 for the SD-VAE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import chex
import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from vavae_jax.blocks import Layers, Level, Middle
from vavae_jax.common import keys
from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import field
from vavae_jax.common.sharding import pin_batch
from vavae_jax.data.images import to_uint8
from vavae_jax.normalization import normalized

# Name -> arguments, beside the defaults. "fN" is the factor between image and latent, "dN" the
# latent's channels. The three without a prefix are the paper's.
PRESETS: dict[str, dict[str, Any]] = {
  "f16d16": {"embed_dim": 16},
  "f16d32": {"embed_dim": 32},
  "f16d64": {"embed_dim": 64},
  "sd_f8d4": {"embed_dim": 4, "ch_mult": (1, 2, 4, 4), "attn_resolutions": ()},
  "mar_f16d16": {"embed_dim": 16, "decoder_attn_resolutions": ()},
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
  """A diagonal Gaussian over latents, float32."""

  mean: jax.Array
  logvar: jax.Array

  @classmethod
  def from_moments(cls, moments_BhwM: jax.Array) -> Posterior:
    """Means and log variances stacked on the channel axis, M = 2 Z; the latter are clipped."""
    mean, logvar = jnp.split(moments_BhwM.astype(jnp.float32), 2, axis=-1)
    return cls(mean, jnp.clip(logvar, -30.0, 20.0))

  def sample(self, noise_BhwZ: jax.Array) -> jax.Array:
    """The latent that standard normal noise picks: mean + std * noise."""
    chex.assert_equal_shape([self.mean, noise_BhwZ])
    return self.mean + self.std * noise_BhwZ

  @property
  def std(self) -> jax.Array:
    """Standard deviations, like `mean`."""
    return jnp.exp(0.5 * self.logvar)

  def mode(self) -> jax.Array:
    """The most likely latent."""
    return self.mean

  def kl(self) -> jax.Array:
    """Divergence from the standard normal in nats, summed over each image: [B]."""
    kl_BhwZ = 0.5 * (self.mean**2 + jnp.exp(self.logvar) - 1.0 - self.logvar)
    return kl_BhwZ.sum(axis=(1, 2, 3))


def downsampling(ch_mult: Sequence[int], patch_size: int) -> int:
  """Pixels per latent along each axis."""
  return patch_size * 2 ** (len(ch_mult) - 1)


class Encoder(nnx.Module):
  """Image [B,H,W,in_channels] -> features [B,h,w,out_channels]; `down[0]` is the finest level.

  `widths` are those of the first convolution and of each level; `attention` is per level.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    widths: Sequence[int],
    num_blocks: int,
    attention: Sequence[bool],
    layers: Layers,
  ):
    self.conv_in = layers.conv(in_channels, widths[0])
    last = len(attention) - 1
    self.down = nnx.List(
      [
        Level(*pair, num_blocks, layers, attention=attention[i], downsample=i < last)
        for i, pair in enumerate(pairwise(widths))
      ]
    )
    self.mid = Middle(widths[-1], layers)
    self.norm_out = layers.norm(widths[-1]) if layers.final_norm else None
    self.conv_out = layers.conv(widths[-1], out_channels)

  def trunk(self, image_BHWC: jax.Array) -> jax.Array:
    """What the last layer sees: adaptive loss weights take gradients there."""
    x = self.conv_in(image_BHWC)
    for level in self.down:
      x = level(x)
    return normalized(self.norm_out, self.mid(x), swish=True)


class Decoder(nnx.Module):
  """Features [B,h,w,in_channels] -> image [B,H,W,out_channels]; `up[0]` is the finest level."""

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    widths: Sequence[int],
    num_blocks: int,
    attention: Sequence[bool],
    layers: Layers,
  ):
    self.conv_in = layers.conv(in_channels, widths[-1])
    self.mid = Middle(widths[-1], layers)
    self.up = nnx.List(
      [
        Level(below, width, num_blocks, layers, attention=attention[i], upsample=i > 0)
        for i, (width, below) in enumerate(pairwise([*widths, widths[-1]]))
      ]
    )
    self.norm_out = layers.norm(widths[0]) if layers.final_norm else None
    self.conv_out = layers.conv(widths[0], out_channels)

  def trunk(self, z_BhwZ: jax.Array) -> jax.Array:
    """As the encoder's."""
    x = self.mid(self.conv_in(z_BhwZ))
    for level in reversed(self.up):
      x = level(x)
    return normalized(self.norm_out, x, swish=True)


def fold(image_BHWC: jax.Array, size: int) -> jax.Array:
  """Every size x size pixels become the channels of one position."""
  return rearrange(image_BHWC, "B (h p) (w q) C -> B h w (p q C)", p=size, q=size)


def unfold(x_BhwP: jax.Array, size: int) -> jax.Array:
  """The inverse of `fold`."""
  return rearrange(x_BhwP, "B h w (p q C) -> B (h p) (w q) C", p=size, q=size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """The arguments of `Autoencoder`; the defaults are the published f16d32 tokenizer."""

  embed_dim: int = field(32, "[1, 65536]", "Latent channels Z.")
  z_channels: int | None = field(
    None, "[1, 65536]", "Channels between encoder and bottleneck; None: embed_dim.", kind=int
  )
  ch: int = field(128, "[1, 8192]", "Base width.")
  ch_mult: Sequence[int] = field(
    (1, 1, 2, 2, 4),
    "[1, 64]",
    "Width of each level in units of `ch`; every level but the last halves the image.",
  )
  num_res_blocks: int = field(2, "[1, 64]", "Of an encoder level; the decoder's have one more.")
  attn_resolutions: Sequence[int] = field(
    (16,),
    "[1, 65536]",
    "Sizes of the feature map, for an image of size `resolution`, with attention; the middle has "
    "it in any case.",
  )
  decoder_attn_resolutions: Sequence[int] | None = field(
    None, "[1, 65536]", "None: attn_resolutions; MAR-VAE: ().", kind=int, is_list=True
  )
  resolution: int = field(
    256, "[1, 65536]", "Nominal image size in pixels; it places attention and limits no input."
  )
  in_channels: int = field(3, "[1, 4096]", "Of the image that is read.")
  out_ch: int = field(3, "[1, 4096]", "Of the one that is written.")
  double_z: bool = field(True, text="As in every published configuration, also the next.")
  dropout: float = field(0.0, "[0, 1)")
  patch_size: int = field(
    1,
    "[1, 4096]",
    "Ours: every patch_size x patch_size pixels are folded into channels before the first "
    "convolution and unfolded after the last, so that small runs are cheap. 1 is as published.",
  )
  norm_groups: int = field(
    32, "[1, 8192]", "Ours: of every GroupNorm, so that widths below 32 are possible."
  )
  linear_shortcut: bool = field(
    False,
    text="Ours: a linear map beside the encoder, from the pixels of a latent cell to its moments, "
    "and one back beside the decoder. They learn a principal component analysis in seconds and the "
    "networks add the rest; without them the norm before each last layer hinders anything linear. "
    "Short trainings gain decibels. False is as published.",
  )
  final_norm: bool = field(
    True,
    text="Ours: False: neither norm nor swish before the last layers of encoder and decoder.",
  )
  use_checkpoint: bool = field(
    False,
    text="Ours: compute every block again in the backward pass: less memory, up to a third more "
    "work, the same numbers.",
  )

  def __post_init__(self) -> None:
    keys.check(keys.of(self), vars(self))
    if not self.double_z:
      raise InputError(
        "double_z=False has no posterior to sample; only double_z=True is supported."
      )
    if self.dropout:
      raise InputError(
        f"dropout={self.dropout} is not supported, nor used by the paper; set it to 0."
      )


class Autoencoder(nnx.Module):
  """Image <-> latent.

  Keyword arguments are the fields of `Options`; InputError for a value that cannot be built.
  `PRESETS` has the known tokenizers. Convolutions run in `dtype`, weights are float32.
  """

  def __init__(self, *, dtype: jax.typing.DTypeLike = jnp.float32, rngs: nnx.Rngs, **options: Any):
    o = Options(**options)
    self.embed_dim, self.in_channels, self.patch_size = o.embed_dim, o.in_channels, o.patch_size
    self.downsampling = downsampling(o.ch_mult, o.patch_size)
    self.dtype = dtype
    z_channels = o.embed_dim if o.z_channels is None else o.z_channels
    layers = Layers(o.norm_groups, o.use_checkpoint, o.final_norm, dtype, rngs)
    widths = [o.ch * mult for mult in o.ch_mult]
    sizes = [o.resolution // o.patch_size // 2**i for i in range(len(o.ch_mult))]
    attention = [size in o.attn_resolutions for size in sizes]
    pixels, blocks = o.in_channels * o.patch_size**2, o.num_res_blocks
    self.encoder = Encoder(pixels, 2 * z_channels, [o.ch, *widths], blocks, attention, layers)
    if o.decoder_attn_resolutions is not None:
      attention = [size in o.decoder_attn_resolutions for size in sizes]
    pixels = o.out_ch * o.patch_size**2
    self.decoder = Decoder(z_channels, pixels, widths, blocks + 1, attention, layers)
    self.quant_conv = layers.conv(2 * z_channels, 2 * o.embed_dim, 1)
    self.post_quant_conv = layers.conv(o.embed_dim, z_channels, 1)
    cell = self.downsampling**2 if o.linear_shortcut else 0
    self.shortcut_in = layers.conv(o.in_channels * cell, 2 * o.embed_dim, 1) if cell else None
    self.shortcut_out = layers.conv(o.embed_dim, o.out_ch * cell, 1) if cell else None

  def encode(self, image_BHWC: jax.Array) -> Posterior:
    """Image [B,H,W,in_channels] in [-1, 1] -> posterior over z [B,h,w,Z], h = H/downsampling.

    InputError if the channels do not fit, or H or W is no multiple of `downsampling`.
    """
    if image_BHWC.ndim != 4 or image_BHWC.shape[-1] != self.in_channels:
      raise InputError(
        f"encode needs images [B,H,W,{self.in_channels}], channels last, but got "
        f"{image_BHWC.shape}."
      )
    height, width = image_BHWC.shape[1:3]
    if height % self.downsampling or width % self.downsampling:
      raise InputError(
        f"An image of {height} x {width} pixels does not divide into latent cells of "
        f"{self.downsampling} x {self.downsampling}; resize or crop it to multiples of "
        f"{self.downsampling}."
      )
    return self.posterior(self.encode_trunk(image_BHWC), image_BHWC)

  def encode_trunk(self, image_BHWC: jax.Array) -> jax.Array:
    """The encoder but for its last layer."""
    return self.encoder.trunk(pin_batch(fold(image_BHWC, self.patch_size)))

  def posterior(self, trunk_BhwD: jax.Array, image_BHWC: jax.Array) -> Posterior:
    """From the encoder's last layer on: `encode(x)` is `posterior(encode_trunk(x), x)`."""
    moments_BhwM = self.quant_conv(self.encoder.conv_out(trunk_BhwD))
    if self.shortcut_in is not None:
      moments_BhwM += self.shortcut_in(fold(image_BHWC, self.downsampling))
    return Posterior.from_moments(moments_BhwM)

  def decode(self, z_BhwZ: jax.Array) -> jax.Array:
    """Latent [B,h,w,embed_dim] as `encode` gives it, not normalised -> image [B,H,W,out_ch].

    The image is float32, about [-1, 1], not clipped. InputError if the channels do not fit.
    """
    if z_BhwZ.ndim != 4 or z_BhwZ.shape[-1] != self.embed_dim:
      raise InputError(
        f"decode needs latents [B,h,w,{self.embed_dim}], channels last, but got {z_BhwZ.shape}."
      )
    return self.image(self.decode_trunk(z_BhwZ), z_BhwZ)

  def decode_uint8(self, z_BhwZ: jax.Array) -> jax.Array:
    """`decode` as pictures: uint8, rounded as `images.to_uint8` does."""
    return to_uint8(self.decode(z_BhwZ))

  def decode_trunk(self, z_BhwZ: jax.Array) -> jax.Array:
    """The decoder but for its last layer."""
    return self.decoder.trunk(self.post_quant_conv(pin_batch(z_BhwZ)))

  def image(self, trunk_BhwD: jax.Array, z_BhwZ: jax.Array) -> jax.Array:
    """From the decoder's last layer on: `decode(z)` is `image(decode_trunk(z), z)`."""
    image_BHWC = unfold(self.decoder.conv_out(trunk_BhwD), self.patch_size)
    if self.shortcut_out is not None:
      image_BHWC += unfold(self.shortcut_out(z_BhwZ), self.downsampling)
    return image_BHWC.astype(jnp.float32)


def preset(name: str) -> dict[str, Any]:
  """The arguments of a known tokenizer; InputError, listing them, for an unknown name."""
  if name not in PRESETS:
    raise InputError(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
  return dict(PRESETS[name])
