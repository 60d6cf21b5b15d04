"""PyTorch names <-> ours for LightningDiT.

PyTorch's files also hold the positions (`pos_embed`, `feat_rope.*`), which are constants here:
they are checked on the way in and computed on the way out, so that the reference loads our files
with `strict=True`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightningdit_jax.model import LightningDiT
from lightningdit_jax.options import SIZES, TENSORS
from lightningdit_jax.positions import position_embedding, rope_tables
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.weights import torch_weights
from vavae_jax.weights.torch_weights import StateDict

# A tensor by which a LightningDiT is found in a file.
MARKS = ("x_embedder.proj.weight",)
RENAMED = {
  "x_embedder.": "x_embedder.proj.",
  "t_embedder.fc1.": "t_embedder.mlp.0.",
  "t_embedder.fc2.": "t_embedder.mlp.2.",
  "y_embedder.": "y_embedder.embedding_table.",
  "adaLN_modulation.": "adaLN_modulation.1.",
  "early_layer.": "final_layer_xr.",  # of CVL-UESTC/Internal-Guidance
  "logvar.": "logvar_linear.",  # of kyungmnlee/dmf
}
# Tensors that models with an option have; at which block it is no file says.
AT_A_BLOCK = {"early_head": "final_layer_xr.linear.weight", "dmf_depth": "logvar_linear.weight"}
RELEASED_EARLY_HEAD = 8


def from_torch(state_dict: Mapping[str, Any], **kwargs: Any) -> LightningDiT:
  """LightningDiT with these arguments and the weights of the reference, float32.

  Names may have what PyTorch's wrappers put into them; positions may be absent. InputError lists
  unknown, missing, misshapen or non-finite tensors, and positions of another grid.
  """
  model = functional.abstract(lambda rngs: LightningDiT(**kwargs, rngs=rngs))
  return torch_weights.load(model, state_dict, renamed=RENAMED, fixed=_positions(model))


def to_torch(model: LightningDiT) -> StateDict:
  """The weights as the reference names and lays them out, float32, with the positions."""
  return torch_weights.dump(model, renamed=RENAMED) | _positions(model)


def arguments_of(state_dict: Mapping[str, Any]) -> dict[str, Any]:
  """`LightningDiT`'s arguments, from the names, without prefix, and shapes of a state dict.

  Only arguments that matter to the weights. No tensor shows the share of dropped labels (taken to
  be above 0, as in every published model). Without RoPE and normed queries none shows the number of
  heads, which is then that of the preset of this width. InputError if the tensors fit none.
  """
  shapes = {name: np.shape(value) for name, value in state_dict.items()}
  options = {name: tensor in shapes for name, tensor in TENSORS.items()}
  try:
    hidden_size, in_channels, patch_size, _ = shapes["x_embedder.proj.weight"]
    rows = shapes["y_embedder.embedding_table.weight"][0]
    outputs = shapes["final_layer.linear.weight"][0]
    modulation = shapes["blocks.0.adaLN_modulation.1.weight"][0]
    inner = shapes[f"blocks.0.mlp.{'w3' if options['use_swiglu'] else 'fc2'}.weight"][1]
    known = {size["hidden_size"]: size["num_heads"] for size in SIZES.values()}
    heads = {
      **{name: hidden_size // size[-1] for name, size in shapes.items() if "q_norm" in name},
      **{name: hidden_size // size[1] for name, size in shapes.items() if "freqs_cos" in name},
    }
    num_heads = next(iter(heads.values())) if heads else known.get(hidden_size)
    cells = math.isqrt(shapes["pos_embed"][1]) if "pos_embed" in shapes else 16 // patch_size
    if min(hidden_size, in_channels, patch_size, rows, inner, cells, *heads.values()) < 1:
      raise ValueError("a size that is not above 0")
  except (LookupError, ValueError, ZeroDivisionError) as error:
    raise InputError(
      f"The tensors are not those of a LightningDiT: {error!r} is missing or of another shape."
    ) from error
  if num_heads is None:
    raise InputError(
      "The number of heads is unknown: the file has neither feat_rope.freqs_cos nor q_norm, and no "
      f"published size is {hidden_size} wide."
    )
  depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
  there = [option for option, mark in AT_A_BLOCK.items() if mark in shapes]
  if there and (there != ["early_head"] or depth <= RELEASED_EARLY_HEAD):
    raise InputError(
      f"The file has {depth} blocks and {AT_A_BLOCK[there[-1]]}, of a model with {there[-1]}, but "
      "does not say at which block; give it to a training as config.init_from, with "
      f"config.model.{there[-1]}."
    )
  return options | {
    "input_size": cells * patch_size,
    "patch_size": patch_size,
    "in_channels": in_channels,
    "hidden_size": hidden_size,
    "depth": depth,
    "early_head": RELEASED_EARLY_HEAD * ("early_head" in there),
    "num_heads": num_heads,
    "mlp_ratio": _mlp_ratio(inner, hidden_size, options["use_swiglu"]),
    "num_classes": rows - 1,
    "learn_sigma": outputs == 2 * in_channels * patch_size**2,
    "wo_shift": modulation == 4 * hidden_size,
    "position_scale": _position_scale(state_dict, cells, hidden_size),
  }


def _position_scale(state_dict: Mapping[str, Any], cells: int, hidden_size: int) -> float:
  """The share that a file's positions are of the fixed ones; 1 where rounding may explain it."""
  fixed = position_embedding(cells, cells, hidden_size)
  given = np.asarray(state_dict.get("pos_embed", fixed), np.float32)
  if given.size != fixed.size:
    return 1.0
  scale = float(np.vdot(given, fixed) / np.vdot(fixed, fixed))
  return scale if 0 <= scale < 0.9995 else 1.0


def _mlp_ratio(inner: int, hidden_size: int, use_swiglu: bool) -> float:
  """The ratio that gives an MLP of this inner width: 4 where it does, else the smallest."""
  widths = range(inner, 2 * inner + 2)
  if use_swiglu:
    widths = range(3 * inner // 2, 3 * inner // 2 + 3)
  for ratio in (4.0, *(width / hidden_size for width in widths)):
    width = int(hidden_size * ratio)
    if inner == (int(2 / 3 * width) if use_swiglu else width):
      return ratio
  raise InputError(f"No mlp_ratio gives an MLP of {inner} for a width of {hidden_size}.")


def _positions(model: LightningDiT) -> StateDict:
  """The positions of the nominal grid, under PyTorch's names."""
  o = model.options
  size = o.input_size // o.patch_size
  fixed = position_embedding(size, size, o.hidden_size) * o.position_scale
  positions = {"pos_embed": fixed[None]}
  if o.use_rope:
    cos_NE, sin_NE = rope_tables(size, size, o.hidden_size // o.num_heads)
    positions |= {"feat_rope.freqs_cos": cos_NE, "feat_rope.freqs_sin": sin_NE}
  return positions
