"""PyTorch names <-> ours for the tokenizer, its discriminator, LPIPS and the teachers.

The published tokenizer, hustvl/vavae-imagenet256-f16d32-dinov2, loads with the defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vavae_jax.autoencoder import Autoencoder
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.discriminator import PatchDiscriminator
from vavae_jax.perceptual import lpips_from_torch as lpips_from_torch
from vavae_jax.teachers import teacher_from_torch as teacher_from_torch
from vavae_jax.weights import torch_weights
from vavae_jax.weights.torch_weights import StateDict

# Tensors by which an AutoencoderKL is found in a file: latent diffusion's and diffusers' name.
MARKS = ("encoder.down.0.block.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight")
# What a tokenizer's training checkpoint holds beside the tokenizer: LPIPS and the discriminator,
# the teacher, the projection onto the teacher's features, and latent diffusion's average.
TRAINING_ONLY = ("loss.", "foundation_model.", "linear_proj.", "model_ema.")
COUNTER = "num_batches_tracked"


def autoencoder_from_torch(state_dict: Mapping[str, Any], **kwargs: Any) -> Autoencoder:
  """The tokenizer with the weights of an AutoencoderKL, float32; `**kwargs` are `Autoencoder`'s.

  Names are latent diffusion's or diffusers'. What only training uses, `TRAINING_ONLY`, is left
  aside. InputError lists unknown, missing, misshapen or non-finite tensors.
  """
  given = autoencoder_names(state_dict)
  own = {name: value for name, value in given.items() if not name.startswith(TRAINING_ONLY)}
  return torch_weights.load(functional.abstract(lambda rngs: Autoencoder(**kwargs, rngs=rngs)), own)


def autoencoder_arguments(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """`Autoencoder`'s arguments, by names, either's, and shapes of an AutoencoderKL's tensors.

  Attention is placed for a nominal resolution of 256. InputError if a tensor is missing that every
  AutoencoderKL has.
  """
  shapes = {name: np.shape(value) for name, value in autoencoder_names(state_dict).items()}

  def count(prefix: str) -> int:
    return len({name[len(prefix) :].split(".")[0] for name in shapes if name.startswith(prefix)})

  try:
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    out_ch = shapes["decoder.conv_out.weight"][0]
    levels = range(count("encoder.down."))
    widths = [shapes[f"encoder.down.{i}.block.0.conv2.weight"][0] for i in levels]
    attention = {
      side: tuple(256 // 2**i for i in levels if f"{side}.{i}.attn.0.q.weight" in shapes)
      for side in ("encoder.down", "decoder.up")
    }
    same = attention["encoder.down"] == attention["decoder.up"]
    return {
      "embed_dim": shapes["post_quant_conv.weight"][1],
      "z_channels": shapes["decoder.conv_in.weight"][1],
      "ch": ch,
      "ch_mult": tuple(width // ch for width in widths),
      "num_res_blocks": count("encoder.down.0.block."),
      "attn_resolutions": attention["encoder.down"],
      "decoder_attn_resolutions": None if same else attention["decoder.up"],
      **({} if in_channels == out_ch == 3 else {"in_channels": in_channels, "out_ch": out_ch}),
    }
  except (LookupError, ValueError, ZeroDivisionError) as error:
    raise InputError(
      f"The tensors are not those of an AutoencoderKL: {error!r} is missing or of another shape."
    ) from error


def autoencoder_names(state_dict: Mapping[str, Any]) -> StateDict:
  """An AutoencoderKL's tensors by latent diffusion's names, also of those by diffusers', such as
  the SD-VAE's, whose matrices of attention become 1x1 convolutions. Other names stay as they are.
  """
  levels = 1 + max(
    (int(name.split(".")[2]) for name in state_dict if name.startswith("decoder.up_blocks.")),
    default=0,
  )
  renamed: StateDict = {}
  for name, value in state_dict.items():
    new = re.sub(
      r"^decoder\.up_blocks\.(\d+)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name
    )
    for pattern, replacement in _DIFFUSERS:
      new = re.sub(pattern, replacement, new)
    array = np.asarray(value)
    is_matrix = re.search(r"\.attn[._]\d", new) and new.endswith("weight") and array.ndim == 2
    renamed[new] = array[:, :, None, None] if is_matrix else array
  return renamed


# Parts of names, diffusers' -> latent diffusion's. Older files have query, key, value, proj_attn.
_DIFFUSERS = (
  (r"^encoder\.down_blocks\.", "encoder.down."),
  (r"mid_block\.resnets\.0", "mid.block_1"),
  (r"mid_block\.resnets\.1", "mid.block_2"),
  (r"mid_block\.attentions\.0", "mid.attn_1"),
  (r"\.attentions\.", ".attn."),
  (r"\.resnets\.", ".block."),
  (r"\.downsamplers\.0\.", ".downsample."),
  (r"\.upsamplers\.0\.", ".upsample."),
  (r"conv_shortcut", "nin_shortcut"),
  (r"conv_norm_out", "norm_out"),
  (r"(\.attn[._]\d+)\.group_norm\.", r"\1.norm."),
  (r"(\.attn[._]\d+)\.(?:to_q|query)\.", r"\1.q."),
  (r"(\.attn[._]\d+)\.(?:to_k|key)\.", r"\1.k."),
  (r"(\.attn[._]\d+)\.(?:to_v|value)\.", r"\1.v."),
  (r"(\.attn[._]\d+)\.(?:to_out\.0|proj_attn)\.", r"\1.proj_out."),
)


def autoencoder_to_torch(model: Autoencoder) -> StateDict:
  """The tokenizer's weights as AutoencoderKL names and lays them out, float32."""
  return torch_weights.dump(model)


def discriminator_from_torch(state_dict: Mapping[str, Any], **kwargs: Any) -> PatchDiscriminator:
  """The discriminator by the weights and statistics of taming-transformers' NLayerDiscriminator.

  `num_batches_tracked` is left aside: with a fixed momentum nothing depends on it. InputError lists
  unknown, missing, misshapen or non-finite tensors.
  """
  model = functional.abstract(lambda rngs: PatchDiscriminator(**kwargs, rngs=rngs))
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
