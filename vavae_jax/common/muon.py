"""Muon for the matrices of stacked transformer blocks, beside AdamW for all else.

The step of a matrix is its gradient, averaged by Nesterov, with all singular values brought near 1
by five Newton-Schulz iterations, times 0.2 sqrt(the longer side): then its root mean square is
AdamW's, and AdamW's rate and weight decay serve both. Each matrix of each block by itself, and
those that one array keeps side by side as the separate ones that they are.

Source: Jordan et al., Muon; Liu et al., Muon is scalable for LLM training, arXiv 2502.16982; optax
has the iteration.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from vavae_jax.common.sharding import pin_batch

MOMENTUM = 0.95
RMS = 0.2
# Matrices side by side in an array [L, in, out]; a modulation has one for each of its vectors.
PIECES = {"qkv": 3, "w12": 2}


def beside(
  adam: optax.GradientTransformation, rate: optax.ScalarOrSchedule, weight_decay: float
) -> optax.GradientTransformation:
  """Muon for every "kernel" [L, in, out] below "blocks", and `adam` for all other parameters."""
  muon = optax.chain(
    optax.trace(MOMENTUM, nesterov=True),
    optax.stateless(lambda updates, _: jax.tree.map_with_path(_orthogonal, updates)),
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(rate),
  )

  def label(path: tuple[Any, ...], x: jax.Array) -> str:
    names = [entry.key for entry in path]
    is_matrix = "blocks" in names[:-1] and names[-1] == "kernel" and x.ndim == 3
    return "muon" if is_matrix else "adam"

  return optax.partition(
    {"muon": muon, "adam": adam}, lambda params: jax.tree.map_with_path(label, params)
  )


def _orthogonal(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
  """All matrices of an array [L, in, out] with singular values near one number."""
  name = path[-2].key
  pieces = x.shape[2] // x.shape[1] if name == "adaLN_modulation" else PIECES.get(name, 1)
  apart = rearrange(x, "L D (P F) -> (L P) D F", P=pieces)
  # Each device iterates with some of them, filled up to a multiple, and not with all.
  fill = -len(apart) % max(jax.sharding.get_abstract_mesh().size, 1)
  shared = pin_batch(jnp.pad(apart, ((0, fill), (0, 0), (0, 0))))
  # Without an average of its own it is the iteration alone.
  iteration = optax.contrib.scale_by_muon(
    beta=0.0,
    nesterov=False,
    weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2),
  )
  turned = iteration.update(shared, iteration.init(shared))[0][: len(apart)]
  scale = RMS * max(apart.shape[1:]) ** 0.5
  return scale * rearrange(turned, "(L P) D F -> L D (P F)", P=pieces)
