"""PyTorch names <-> ours for LightningDiT.

PyTorch's files also hold the positions (`pos_embed`, `feat_rope.*`), which are constants here:
they are checked on the way in and computed on the way out, so that the reference loads our files
with `strict=True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flax import nnx

from lightningdit_jax.model import LightningDiT
from lightningdit_jax.positions import position_embedding, rope_tables
from vavae_jax import torch_weights
from vavae_jax.torch_weights import StateDict

RENAMED = {
  "x_embedder.": "x_embedder.proj.",
  "t_embedder.fc1.": "t_embedder.mlp.0.",
  "t_embedder.fc2.": "t_embedder.mlp.2.",
  "y_embedder.": "y_embedder.embedding_table.",
  "adaLN_modulation.": "adaLN_modulation.1.",
}


def from_torch(state_dict: Mapping[str, Any], **kwargs: Any) -> LightningDiT:
  """LightningDiT with the weights of the reference.

  Args:
    state_dict: PyTorch name -> array, the EMA's or the raw ones, with or without the prefix
      "module."; positions may be absent.
    **kwargs: `LightningDiT`'s arguments.

  Returns:
    The module, its weights float32.

  Raises:
    InputError: unknown, missing, misshapen or non-finite tensors, or positions of another grid,
      listed.
  """
  model = nnx.eval_shape(lambda: LightningDiT(**kwargs, rngs=nnx.Rngs(0)))
  return torch_weights.load(model, state_dict, renamed=RENAMED, fixed=_positions(model))


def to_torch(model: LightningDiT) -> StateDict:
  """The weights as the reference names and lays them out, float32, with the positions."""
  return torch_weights.dump(model, renamed=RENAMED) | _positions(model)


def _positions(model: LightningDiT) -> StateDict:
  """The positions of the nominal grid, under PyTorch's names."""
  size = model.input_size // model.patch_size
  positions = {"pos_embed": position_embedding(size, size, model.hidden_size)[None]}
  if model.use_rope:
    cos_NE, sin_NE = rope_tables(size, size, model.hidden_size // model.num_heads)
    positions |= {"feat_rope.freqs_cos": cos_NE, "feat_rope.freqs_sin": sin_NE}
  return positions
