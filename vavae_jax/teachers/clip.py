"""CLIP's image tower, frozen: the vision transformer of vit.py with a norm before its blocks.

Features are the patch tokens of the last layer after the final norm. CLIP itself norms the class
token alone; that all tokens are normed is how timm gives features.

Notable: the activation is x * sigmoid(1.702 x), with which OpenAI trained its weights. timm's model
of the plain name runs the same weights with GELU, which gives slightly other features; its variant
with "quickgelu" in its name agrees with ours.

Source: Radford et al. 2021, arXiv 2103.00020; openai/CLIP clip/model.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vavae_jax.teachers import vit
from vavae_jax.teachers.layers import OPENAI
from vavae_jax.teachers.names import Naming

CLIP: dict[str, dict[str, Any]] = {
  "clip_vitb16": {
    "patch_size": 16,
    "hidden_size": 768,
    "depth": 12,
    "num_heads": 12,
    "grid_size": 14,
  },
  "clip_vitl14": {
    "patch_size": 14,
    "hidden_size": 1024,
    "depth": 24,
    "num_heads": 16,
    "grid_size": 16,
  },
}

_RANKS = {"embedding.cls_token": 3, "embedding.pos_embed": 3}
_OPENAI = Naming(
  renamed={
    "embedding.patch.": "conv1.",
    "embedding.cls_token": "class_embedding",
    "embedding.pos_embed": "positional_embedding",
    "blocks.": "transformer.resblocks.",
    "norm.": "ln_post.",
    "norm_pre.": "ln_pre.",
    "norm1.": "ln_1.",
    "norm2.": "ln_2.",
    "attn.qkv.": "attn.in_proj_",
    "attn.proj.": "attn.out_proj.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
  },
  prefix="visual.",
  aside=(
    r"transformer\.",
    r"token_embedding\.",
    "positional_embedding$",
    r"ln_final\.",
    "text_projection$",
    "logit_scale$",
    r"visual\.proj$",
    "(input_resolution|context_length|vocab_size)$",
  ),
  ranks=_RANKS,
)
_TRANSFORMERS = Naming(
  renamed={
    "embedding.patch.": "embeddings.patch_embedding.",
    "embedding.cls_token": "embeddings.class_embedding",
    "embedding.pos_embed": "embeddings.position_embedding.weight",
    "blocks.": "encoder.layers.",
    "norm.": "post_layernorm.",
    "norm_pre.": "pre_layrnorm.",  # spelt so in the files
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj.",
    "attn.proj.": "self_attn.out_proj.",
  },
  prefix="vision_model.",
  aside=(
    r"text_model\.",
    r"(text|visual)_projection\.",
    "logit_scale$",
    r"(vision_model\.)?embeddings\.position_ids$",
  ),
  fused=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  ranks=_RANKS,
)
_TIMM = Naming(
  renamed={"embedding.patch.": "patch_embed.proj.", "embedding.": ""},
  aside=(r"head\.",),
)


# What CLIP's towers have beside their sizes, as arguments of `ViT`.
OPTIONS: dict[str, Any] = {"use_pre_norm": True, "activation": "quick_gelu", "epsilon": 1e-5}


def from_torch(
  state_dict: Mapping[str, Any],
  *,
  dtype: jnp.dtype = jnp.float32,
  normalize: bool = False,
  **sizes: Any,
) -> vit.ViT:
  """CLIP's image tower with published weights.

  Args:
    state_dict: PyTorch name -> array, as OpenAI, transformers or timm name them. The text tower and
      the projections onto the common space are left aside.
    dtype: of matrix products and features.
    normalize: by CLIP's mean and deviation.
    **sizes: an entry of `CLIP`, or the same arguments of `ViT`.

  Returns:
    The module, its weights float32.

  Raises:
    InputError: unknown, missing, misshapen or non-finite tensors, listed.
  """
  namings = (_TIMM, _OPENAI, _TRANSFORMERS)
  return vit.load(state_dict, namings, OPENAI if normalize else None, dtype, OPTIONS | sizes)
