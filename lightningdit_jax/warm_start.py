"""Initial weights from another LightningDiT, whose channels, classes or grid may differ.

Reference: `load_weights_with_shape_check` of `train.py`, which skips all that does not fit; here
only the layers that depend on channels or classes may differ, and what an option adds come or go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from lightningdit_jax import convert
from lightningdit_jax.convert import MARKS as MARKS
from vavae_jax.common.errors import InputError
from vavae_jax.weights.torch_weights import without_wrappers

EMBEDDER = ("x_embedder", "kernel")
EARLY = "early_layer"
# What models with an option have beside the others' layers.
OPTIONAL = {EARLY: "early head", "logvar": "flow map's logvar"}
HEADS = ("final_layer", EARLY)
# Layers that start afresh where their shapes differ: labels by the classes, heads by the
# channels. A head that differs alone means another `learn_sigma`, which is refused.
MAY_START_AFRESH = (
  ("y_embedder", "embedding"),
  *((head, "linear", kind) for head in HEADS for kind in ("kernel", "bias")),
)


def adapt(fresh: Any, given: Any) -> tuple[Any, list[str]]:
  """Initial parameters for a new training, from those of another model.

  Returns parameters of the shapes of `fresh`, the new model's randomly initialised ones, and
  sentences on layers that differ. InputError if a layer differs that may not.

  DEVIATION: the patch embedding keeps all channels that both models have, and the others start at
  zero; the reference keeps the first 16. The two agree where one of the models has 16.
  """
  new, old = flatten_dict(fresh), flatten_dict(given)
  same_channels = np.shape(old.get(EMBEDDER)) == np.shape(new[EMBEDDER])
  notes, problems, taken = [], [], {}
  differs = [layer for layer in OPTIONAL if (layer in fresh) != (layer in given)]
  for layer in differs:
    notes.append(f"the {OPTIONAL[layer]} {'starts afresh' if layer in fresh else 'is left out'}")
    old = {path: leaf for path, leaf in old.items() if path[0] != layer}
  for path, leaf in new.items():
    name, shape = "/".join(path), np.shape(old.get(path))
    if path in old and shape == leaf.shape:
      taken[path] = jnp.asarray(old[path])
    elif path[0] in differs:
      taken[path] = leaf
    elif path == EMBEDDER and shape[:2] == leaf.shape[:2] and shape[3:] == leaf.shape[3:]:
      common = min(shape[2], leaf.shape[2])
      taken[path] = jnp.zeros_like(leaf).at[:, :, :common].set(old[path][:, :, :common])
      notes.append(f"{name} keeps {common} of {leaf.shape[2]} channels, the others are zero")
    elif path in old and path in MAY_START_AFRESH and not (same_channels and path[0] in HEADS):
      taken[path] = leaf
      notes.append(f"{name} starts afresh: {shape} there, {leaf.shape} here")
    else:
      there = f"{shape} there" if path in old else "missing there"
      problems.append(f"{name} ({leaf.shape} here, {there})")
  problems += [f"{'/'.join(path)} (only there)" for path in old.keys() - new.keys()]
  if problems:
    shown = ", ".join(sorted(problems)[:8]) + (" and more" if len(problems) > 8 else "")
    raise InputError(
      f"The initial weights are of another architecture: {shown}. Only the number of channels, of "
      "classes and of cells may differ; set config.model to that of the weights."
    )
  return unflatten_dict(taken), notes


def from_state_dict(state_dict: Mapping[str, Any], model: Mapping[str, Any]) -> Any:
  """Parameters for `adapt` from a PyTorch state dict, with its own channels, classes and grid.

  `model` has all other arguments of LightningDiT, those of the model to be trained. InputError if
  the tensors are not those of a LightningDiT with these options.
  """
  state_dict = without_wrappers(state_dict)
  kwargs = dict(model)
  try:
    _, channels, patch, _ = np.shape(state_dict["x_embedder.proj.weight"])
    rows, _ = np.shape(state_dict["y_embedder.embedding_table.weight"])
  except (KeyError, ValueError) as error:
    raise InputError(
      f"The initial weights are not a LightningDiT's: they have no fitting {error}; their names "
      f"begin with {', '.join(sorted(state_dict)[:3])}."
    ) from error
  kwargs |= {"in_channels": channels, "patch_size": patch}
  # At which block concerns no weight.
  for option, mark in convert.AT_A_BLOCK.items():
    kwargs[option] = (kwargs.get(option) or 1) * (mark in state_dict)
  kwargs["num_classes"] = rows - (kwargs["class_dropout_prob"] > 0)
  if "pos_embed" in state_dict:
    kwargs["input_size"] = int(np.shape(state_dict["pos_embed"])[1] ** 0.5) * patch
  return nnx.to_pure_dict(nnx.state(convert.from_torch(state_dict, **kwargs)))
