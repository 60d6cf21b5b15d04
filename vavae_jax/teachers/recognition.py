"""Which teacher's weights a state dict has, by the names and shapes that only its family has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vavae_jax.teachers.clip import CLIP
from vavae_jax.teachers.sam import SAM
from vavae_jax.teachers.vit import DINOV2, MAE

# A part of a tensor's name, by any publisher -> the family that has it. What is left is an MAE's.
_MARKS = {
  "_conv_stem.": "efficientnet",
  "rel_pos_h": "sam",
  "norm_pre.": "clip",
  "ln_pre.": "clip",
  "pre_layrnorm.": "clip",
  "ls1.gamma": "dinov2",
  "layer_scale1.": "dinov2",
}
_REGISTERS = ("register_tokens", "reg_token")
# The convolution over patches: [hidden size, 3, patch, patch].
_PATCHES = (
  "patch_embed.proj.weight",
  "patch_embed.projection.weight",
  "patch_embeddings.projection.weight",
  "patch_embedding.weight",
  ".conv1.weight",
)
_SIZES = {"dinov2": DINOV2, "mae": MAE, "clip": CLIP, "sam": SAM}


def recognise(state_dict: Mapping[str, Any]) -> str:
  """The teacher whose weights these are.

  Args:
    state_dict: PyTorch name -> array, by the names of any publisher.

  Returns:
    One of `teachers.NAMES`; "" if it is none of them. Only loading says whether all is there.
  """
  marks = [mark for mark in _MARKS if any(mark in name for name in state_dict)]
  family = _MARKS[marks[0]] if marks else "mae"
  if family == "efficientnet":
    return _recognise_efficientnet(state_dict)
  patches = [np.shape(state_dict[name]) for name in state_dict if f".{name}".endswith(_PATCHES)]
  of_pixels = [shape for shape in patches if len(shape) == 4 and shape[1] == 3]
  if len(of_pixels) != 1:
    return ""
  hidden_size, _, patch_size, _ = of_pixels[0]
  registers = any(name.endswith(_REGISTERS) for name in state_dict)
  for name, size in _SIZES[family].items():
    known = size["hidden_size"], size.get("patch_size", 16), bool(size.get("num_registers", 0))
    if known == (hidden_size, patch_size, registers):
      return name
  return ""


def _recognise_efficientnet(state_dict: Mapping[str, Any]) -> str:
  """Lite0 is less deep than the others, and Lite2 wider."""
  blocks = sum(name.endswith("_project_conv.weight") for name in state_dict)
  last = np.shape(state_dict.get("_conv_head.weight", np.zeros((0, 0))))
  sizes = {(16, 320): 0, (21, 320): 1, (21, 352): 2}
  found = sizes.get((blocks, last[1]))
  return "" if found is None else f"efficientnet_lite{found}"
