"""CLIP's image tower, frozen: the vision transformer of vit.py with a norm before its blocks.

Features are the patch tokens of the last layer after the final norm. CLIP itself norms the class
token alone; that all tokens are normed is how timm gives features.

Notable: the activation is x * sigmoid(1.702 x), with which OpenAI trained its weights. timm's model
of the plain name runs the same weights with GELU, which gives slightly other features; its variant
with "quickgelu" in its name agrees with ours.

Source: Radford et al. 2021, arXiv 2103.00020; openai/CLIP clip/model.py.
"""

from __future__ import annotations

import functools

from vavae_jax.teachers import names, vit
from vavae_jax.teachers.family import Family, Variant, published
from vavae_jax.teachers.layers import OPENAI, SIZES
from vavae_jax.teachers.names import Naming

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
_TIMM = vit.FACEBOOK._replace(aside=(r"head\.",))


def _variant(word: str, patch: int) -> Variant:
  size = SIZES[word] | {"patch_size": patch, "grid_size": 224 // patch}
  files = published(
    f"vit_{word}_patch{patch}_clip_224.openai",
    f"openai/clip-vit-{word}-patch{patch}",
    "the state dict of OpenAI's model (not its TorchScript archive)",
  )
  timm = f"vit_{word}_patch{patch}_clip_quickgelu_224"
  return Variant(size, size["hidden_size"], files, timm)


_VARIANTS = {"clip_vitb16": _variant("base", 16), "clip_vitl14": _variant("large", 14)}
FAMILY = Family(
  variants=_VARIANTS,
  module=functools.partial(vit.ViT, use_pre_norm=True, activation="quick_gelu", epsilon=1e-5),
  statistics=OPENAI,
  namings=lambda size: (_TIMM, _OPENAI, _TRANSFORMERS),
  recognise=names.by_patches(_VARIANTS, ("norm_pre.", "ln_pre.", "pre_layrnorm.")),
  compared=vit.COMPARED,
)
