"""VA-VAE in JAX and Flax: image -> latent -> image, with latents aligned to a vision model.

The last letters of an array's name are its axes, here and in `lightningdit_jax`:

  B batch             H, W pixels           h, w latent grid
  C image channels    Z latent channels     F teacher features
  N tokens (= h w)    D width               L layers
  K heads             E head size

`image_BHWC` is a batch of images, `z_BhwZ` their latents, `tokens_BND` what a transformer sees.
Arrays are channels-last everywhere; channels-first exists only where PyTorch's files do.

Source: Yao et al., "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion
Models", arXiv 2501.01423.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from vavae_jax.tokenizer import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
  if name != "Tokenizer":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from vavae_jax.tokenizer import Tokenizer  # with all its networks, which few modules need

  return Tokenizer
