"""Weights of one tokenizer as the beginning of another: other pictures, another teacher.

Reference: `init_from_ckpt` of `ldm/models/autoencoder.py`, which skips whatever does not fit; it
reads another key than the documented one, so that trainings silently start anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict

from vavae_jax.common.errors import InputError
from vavae_jax.convert import MARKS as MARKS
from vavae_jax.convert import autoencoder_from_torch
from vavae_jax.weights.torch_weights import without_wrappers

PROJECTION = "linear_proj."


def adapt(fresh: Any, given: Any) -> tuple[Any, list[str]]:
  """Parameters for a new training out of another's, and notes on the projection for the user.

  Both are {"autoencoder": ..., perhaps "projection": ...}. InputError if the autoencoders differ.
  """
  new, old = (_shapes(tree["autoencoder"]) for tree in (fresh, given))
  if differing := sorted(
    path for path in new.keys() | old.keys() if new.get(path) != old.get(path)
  ):
    shown = ", ".join(
      f"{path} ({new.get(path, 'nothing')} here, {old.get(path, 'nothing')} there)"
      for path in differing[:8]
    )
    raise InputError(
      f"The initial weights are of another autoencoder: {shown}"
      f"{' and more' if len(differing) > 8 else ''}. Set config.model to that of the weights."
    )
  taken, notes = {**fresh, "autoencoder": given["autoencoder"]}, []
  if "projection" in fresh:
    same = _shapes(fresh["projection"]) == _shapes(given.get("projection", {}))
    if same:
      taken["projection"] = given["projection"]
      notes.append(
        "the projection to the teacher's features is taken over: it must be the same teacher"
      )
    else:
      notes.append("the projection to the teacher's features starts afresh")
  return jax.tree.map(jax.numpy.asarray, taken), notes


def from_state_dict(state_dict: Mapping[str, Any], model: Mapping[str, Any]) -> Any:
  """Parameters, as `adapt` takes them, out of a state dict of the reference's AutoencoderKL.

  `model` has the autoencoder's arguments. InputError if the tensors do not fit them.
  """
  state_dict = without_wrappers(state_dict)
  module = autoencoder_from_torch(state_dict, **model)
  params = {"autoencoder": nnx.to_pure_dict(nnx.state(module))}
  if f"{PROJECTION}weight" in state_dict:
    weight = np.asarray(state_dict[f"{PROJECTION}weight"], np.float32)
    if weight.ndim != 4 or weight.shape[2:] != (1, 1) or not np.isfinite(weight).all():
      raise InputError(
        f"{PROJECTION}weight {weight.shape} is no finite 1x1 convolution; the file is damaged, or "
        "of another model."
      )
    params["projection"] = {"kernel": weight[:, :, 0, 0].T}
    if f"{PROJECTION}bias" in state_dict:
      params["projection"]["bias"] = np.asarray(state_dict[f"{PROJECTION}bias"], np.float32)
  return params


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
  return {"/".join(map(str, path)): np.shape(x) for path, x in flatten_dict(tree).items()}
