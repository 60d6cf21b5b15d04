"""Internal Guidance: a model is led away from what its own early head predicts.

`Options.early_head` says behind which block that head reads, `training.losses` trains it on the
same target, and here the two predictions become one. An early head knows less, so that it stands
for the weaker model of autoguidance, at the price of one more final layer.

Source: Zhou et al., Guiding a diffusion transformer with the internal dynamics of itself, arXiv
2512.24176; `forward_with_ig` of CVL-UESTC/Internal-Guidance.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vavae_jax.common.sharding import pin_batch


def extrapolated(model: Any, scale: float | jax.Array, until: float | jax.Array = 1.0) -> Any:
  """The function of (x, t [B], label) that gives early + scale (last - early) of a LightningDiT.

  It takes the model's place in `sampling.guided`, so that with classifier-free guidance each half
  is led away from its own early head, on all channels. A scale of 1 is the model itself; where t is
  larger than `until`, the last head's prediction stands.
  """
  if not isinstance(scale, jax.Array) and scale == 1:
    return model

  def predict(x_BhwZ: jax.Array, t_B: jax.Array, label_B: jax.Array) -> jax.Array:
    early, last = model.both(x_BhwZ, t_B, label_B)
    return jnp.where((t_B <= until)[:, None, None, None], early + scale * (last - early), last)

  return predict


def scan(
  run_block: Callable[..., Any],
  read: Callable[[jax.Array], jax.Array],
  x_BND: jax.Array,
  weights: Any,
  count: int,
  unroll: int,
  prevent_cse: bool,
) -> tuple[jax.Array, jax.Array]:
  """All blocks of the stacked `weights`, by `run_block` as `jax.lax.scan` takes it.

  Returns the tokens behind them, and what `read` makes of those behind the first `count`. One scan
  carries the latter, which is small beside the tokens: two would copy their parts of the weights.
  """

  # The tokens before a block are kept for its own backward pass in any case.
  @functools.partial(jax.checkpoint, prevent_cse=prevent_cse)
  def look(block: jax.Array, x_BND: jax.Array, found: jax.Array) -> jax.Array:
    return jax.lax.cond(block == count, lambda: read(x_BND), lambda: found)

  def run(carry: tuple[jax.Array, jax.Array], block: tuple[jax.Array, Any]) -> Any:
    return (run_block(carry[0], block[1])[0], look(block[0], *carry)), None

  there = jax.eval_shape(read, x_BND)
  start = (x_BND, pin_batch(jnp.zeros(there.shape, there.dtype)))
  depth = len(jax.tree.leaves(weights)[0])
  return jax.lax.scan(run, start, (jnp.arange(depth), weights), unroll=unroll)[0]
