"""PyTorch names <-> ours for the tokenizer, its discriminator, LPIPS and the teachers.

The published tokenizer, hustvl/vavae-imagenet256-f16d32-dinov2, loads with the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from vavae_jax import torch_weights
from vavae_jax.autoencoder import Autoencoder
from vavae_jax.discriminator import PatchDiscriminator
from vavae_jax.perceptual import lpips_from_torch
from vavae_jax.teachers import teacher_from_torch
from vavae_jax.torch_weights import StateDict

__all__ = [
  "autoencoder_from_torch",
  "autoencoder_to_torch",
  "discriminator_from_torch",
  "discriminator_to_torch",
  "lpips_from_torch",
  "teacher_from_torch",
]

# What a tokenizer's training checkpoint holds beside the tokenizer: LPIPS and the discriminator,
# the teacher, and the projection onto the teacher's features.
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.")
COUNTER = "num_batches_tracked"


def autoencoder_from_torch(state_dict: Mapping[str, Any], **kwargs: Any) -> Autoencoder:
  """The tokenizer with the weights of an AutoencoderKL.

  Args:
    state_dict: PyTorch name -> array. What only training uses (names that begin with `loss.`,
      `foundation_model.` or `linear_proj.`) is left aside.
    **kwargs: `Autoencoder`'s arguments.

  Returns:
    The module, its weights float32.

  Raises:
    InputError: unknown, missing, misshapen or non-finite tensors, listed.
  """
  own = {name: v for name, v in state_dict.items() if not name.startswith(TRAINING_ONLY)}
  return torch_weights.load(nnx.eval_shape(lambda: Autoencoder(**kwargs, rngs=nnx.Rngs(0))), own)


def autoencoder_to_torch(model: Autoencoder) -> StateDict:
  """The tokenizer's weights as AutoencoderKL names and lays them out, float32."""
  return torch_weights.dump(model)


def discriminator_from_torch(state_dict: Mapping[str, Any], **kwargs: Any) -> PatchDiscriminator:
  """The discriminator with the weights and statistics of taming-transformers' NLayerDiscriminator.

  Args:
    state_dict: PyTorch name -> array. `num_batches_tracked` is left aside: with a fixed momentum
      nothing depends on it.
    **kwargs: `PatchDiscriminator`'s arguments.

  Returns:
    The module, its weights and running statistics float32.

  Raises:
    InputError: unknown, missing, misshapen or non-finite tensors, listed.
  """
  model = nnx.eval_shape(lambda: PatchDiscriminator(**kwargs, rngs=nnx.Rngs(0)))
  own = {name: value for name, value in state_dict.items() if not name.endswith(COUNTER)}
  return torch_weights.load(model, own, renamed=_discriminator_names(model))


def discriminator_to_torch(model: PatchDiscriminator) -> StateDict:
  """The discriminator as NLayerDiscriminator names and lays it out, float32, its counters 0."""
  state_dict = torch_weights.dump(model, renamed=_discriminator_names(model))
  norms = [name.removesuffix("running_var") for name in state_dict if name.endswith("running_var")]
  return state_dict | {name + COUNTER: np.zeros((), np.int64) for name in norms}


def _discriminator_names(model: PatchDiscriminator) -> dict[str, str]:
  """PyTorch's sequence also counts the activations: convolution, norm, activation, and so on."""
  last = model.n_layers + 1
  names = {"layers.0.conv.": "main.0.", "conv_out.": f"main.{3 * last - 1}."}
  for i in range(1, last):
    names |= {f"layers.{i}.conv.": f"main.{3 * i - 1}.", f"layers.{i}.norm.": f"main.{3 * i}."}
  return names
