"""DINOv2: the vision transformer of vit.py with layer scale, and SwiGLU in the giant one.

For patches of 14 pixels the image is first resized, 256 -> 224.

Source: Oquab et al. 2023, arXiv 2304.07193; Darcet et al. 2023, arXiv 2309.16588 (registers).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vavae_jax.teachers import names, vit
from vavae_jax.teachers.family import Family, Variant, published
from vavae_jax.teachers.layers import IMAGENET, SIZES
from vavae_jax.teachers.names import Naming

_TRANSFORMERS = Naming(
  renamed=vit.TRANSFORMERS
  | {
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12.": "mlp.weights_in.",
    "mlp.w3.": "mlp.weights_out.",
  },
  fused=vit.TRANSFORMERS_FUSED,
  aside=(r"embeddings\.mask_token$",),
)
_TIMM_SWIGLU = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2."}


def _namings(size: Mapping[str, Any]) -> tuple[Naming, ...]:
  timm = vit.FACEBOOK
  if size.get("num_registers"):
    # timm adds the class token's position to that token where there are registers.
    renamed = {"embedding.register_tokens": "reg_token", **timm.renamed}
    timm = timm._replace(renamed=renamed, arguments={"embed_class": False})
  if size.get("use_swiglu"):
    timm = timm._replace(renamed={**_TIMM_SWIGLU, **timm.renamed})
  return timm, vit.FACEBOOK, _TRANSFORMERS


def _variant(word: str, registers: int) -> Variant:
  size = SIZES[word] | {
    "patch_size": 14,
    "grid_size": 37,  # of 518 pixels
    "use_layer_scale": True,
    "num_registers": registers,
    "use_swiglu": word == "giant",
  }
  timm = f"vit_{word}_patch14_{'reg4_' if registers else ''}dinov2"
  files = published(
    f"{timm}.lvd142m",
    f"facebook/dinov2-{'with-registers-' if registers else ''}{word}",
    f"dinov2_vit{word[0]}14_{'reg4_' if registers else ''}pretrain.pth of facebookresearch/dinov2",
  )
  return Variant(size, size["hidden_size"], files, timm)


_VARIANTS = {
  f"dinov2_vit{word[0]}14{suffix}": _variant(word, registers)
  for suffix, registers in (("", 0), ("_reg", 4))
  for word in ("small", "base", "large", "giant")
}
FAMILY = Family(
  variants=_VARIANTS,
  module=vit.ViT,
  statistics=IMAGENET,
  namings=_namings,
  recognise=names.by_patches(_VARIANTS, ("ls1.gamma", "layer_scale1.")),
  compared=vit.COMPARED,
)
