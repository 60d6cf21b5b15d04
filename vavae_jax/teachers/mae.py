"""MAE's encoder: the plain vision transformer of vit.py.

A decoder, which some of the published files have too, is left aside.

Source: He et al. 2021, arXiv 2111.06377.
"""

from __future__ import annotations

from vavae_jax.teachers import names, vit
from vavae_jax.teachers.family import Family, Variant, published
from vavae_jax.teachers.layers import IMAGENET, SIZES
from vavae_jax.teachers.names import Naming

_FACEBOOK = vit.FACEBOOK._replace(aside=("mask_token$", "decoder_"))
_TRANSFORMERS = Naming(
  renamed=vit.TRANSFORMERS
  | {
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
  },
  prefix="vit.",
  fused=vit.TRANSFORMERS_FUSED,
  aside=(r"decoder\.",),
)


def _variant(word: str, patch: int) -> Variant:
  size = SIZES[word] | {"patch_size": patch, "grid_size": 224 // patch}
  if word == "small":
    own = "the path of your own: nobody publishes this size"
    return Variant(size, size["hidden_size"], own)
  timm = f"vit_{word}_patch{patch}_224"
  files = published(
    f"{timm}.mae",
    f"facebook/vit-mae-{word}",
    f"mae_pretrain_vit_{word}.pth of facebookresearch/mae",
  )
  return Variant(size, size["hidden_size"], files, timm)


_VARIANTS = {
  f"mae_vit{word[0]}{patch}": _variant(word, patch)
  for word, patch in (("small", 16), ("base", 16), ("large", 16), ("huge", 14))
}
FAMILY = Family(
  variants=_VARIANTS,
  module=vit.ViT,
  statistics=IMAGENET,
  namings=lambda size: (_FACEBOOK, _TRANSFORMERS),
  recognise=names.by_patches(_VARIANTS),
  compared=vit.COMPARED,
)
