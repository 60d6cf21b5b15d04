"""TREAD: a random share of the tokens is led around a stretch of the blocks.

Training draws for each latent which tokens the stretch leaves out; behind it they come back as they
were before it, and the loss is of all tokens. The blocks in between cost as much less as there are
fewer tokens, and a model learns faster. Samples take all tokens; or they are guided away from what
the same model predicts with fewer.

Source: Krause et al., TREAD, arXiv 2501.04765; CompVis/tread `dit.py`, `rf.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from lightningdit_jax.positions import Rope
from vavae_jax.common.errors import InputError
from vavae_jax.common.keys import MAYBE, Key
from vavae_jax.common.sharding import pin_batch

# The keys of `config.route`.
ROUTE: dict[str, Key] = {
  "share": Key(
    0.0, "[0, 1)", "Of the tokens that training leads around blocks; 0: none; docs/beyond.md."
  ),
  "until": Key(0, MAYBE, "The last step that does; 0: all."),
  "first": Key(2, "[0, 1023]", "The first of these blocks, counted from 0,"),
  "last": Key(-4, "[-1024, 1023]", "and the last; below 0 it is counted from the end."),
}
# Of a key for samples, which noise is of the same seed.
_SALT = 2**32 - 1

Scan = Callable[[jax.Array, Any, Any], jax.Array]


class Route(NamedTuple):
  """Which blocks leave out which tokens."""

  first: int
  stop: int  # the block behind the last one
  kept_BN: jax.Array  # int32, places of the tokens that go through, N less than all


def stretch(route: FrozenConfigDict, depth: int, whose: str = "") -> tuple[int, int]:
  """The blocks of `config.route`, (first, behind the last); InputError where there are none."""
  stop = route.last + 1 + (depth if route.last < 0 else 0)
  if not route.first < stop <= depth:
    raise InputError(
      f"{whose}config.route.first={route.first} and last={route.last} are no stretch of the "
      f"{depth} blocks; give the first and the last of some, counted from 0, or last from the end, "
      "below 0."
    )
  return route.first, stop


def lasts(config: FrozenConfigDict, step: int) -> bool:
  """Whether a step of training leads tokens around blocks."""
  return bool(config.route.share and (not config.route.until or step <= config.route.until))


def drawn(config: FrozenConfigDict, key: jax.Array, count: int) -> jax.Array:
  """The tokens that go through, for each of `count` latents in training, by the step's key."""
  key = jax.random.fold_in(key, 3)  # 0 to 2 are those into which the step splits it
  tokens = (config.model.input_size // config.model.patch_size) ** 2
  return _first(jax.random.uniform(key, (count, tokens)), config.route.share)


def _first(noise_BN: jax.Array, share: float) -> jax.Array:
  """Places of the lowest numbers of each row, all but this share."""
  tokens = noise_BN.shape[1]
  return pin_batch(jnp.argsort(noise_BN, axis=1)[:, : tokens - int(tokens * share)])


def of(config: FrozenConfigDict, kept_BN: jax.Array | None) -> Route | None:
  """The route of these tokens around the blocks of `config.route`."""
  if kept_BN is None:
    return None
  return Route(*stretch(config.route, config.model.depth), kept_BN)


def through(
  scan: Scan, x_BND: jax.Array, rope: Rope | None, weights: Any, route: Route
) -> jax.Array:
  """All blocks of the stacked `weights`, by `scan(x, rope, weights)`, those of the stretch with the
  tokens that are kept, each turned by the angles of its own place.
  """

  def blocks(start: int, stop: int | None) -> Any:
    return jax.tree.map(lambda x: x[start:stop], weights)

  x_BND = scan(x_BND, rope, blocks(0, route.first))
  few_BND = pin_batch(jnp.take_along_axis(x_BND, route.kept_BN[..., None], axis=1))
  # One table for each latent: [B, 1, N, E], for all heads.
  tables = rope and tuple(jnp.asarray(table)[route.kept_BN][:, None] for table in rope)
  few_BND = scan(few_BND, tables, blocks(route.first, route.stop))
  put = jax.vmap(lambda x, kept, y: x.at[kept].set(y, unique_indices=True))
  x_BND = pin_batch(put(x_BND, route.kept_BN, few_BND))
  return scan(x_BND, rope, blocks(route.stop, None))


def for_sampling(
  main: tuple[FrozenConfigDict, Any],
  guide: tuple[FrozenConfigDict, Any] | None,
  shares: tuple[float, float],
  seed: int | jax.Array,
  index_B: jax.Array,
) -> tuple[Any, Any]:
  """The model and what guides it, for `sampling.guided`, with these shares of their tokens routed.

  `main` and `guide` are configurations and models. Which tokens go through is a function of seed,
  index and time.
  """
  pairs = (main, guide or (main if shares[1] else None))
  towards, away = (
    pair and (_routed(*pair, share, seed, index_B) if share else pair[1])
    for pair, share in zip(pairs, shares, strict=True)
  )
  return towards, away


def _routed(
  config: FrozenConfigDict, model: Any, share: float, seed: int | jax.Array, index_B: jax.Array
) -> Any:
  def predict(x_BhwZ: jax.Array, t_B: jax.Array, label_B: jax.Array) -> jax.Array:
    tokens = int(np.prod(x_BhwZ.shape[1:3])) // config.model.patch_size**2

    def noise(index: jax.Array, t: jax.Array) -> jax.Array:
      key = jax.random.fold_in(jax.random.key(seed), _SALT)
      for number in (index, jax.lax.bitcast_convert_type(t, jnp.uint32)):
        key = jax.random.fold_in(key, number)
      return jax.random.uniform(key, (tokens,))

    # With guidance by the null label a latent stands there twice.
    twice_B = jnp.repeat(index_B, len(x_BhwZ) // len(index_B))
    kept_BN = _first(jax.vmap(noise)(twice_B, t_B), share)
    return model(x_BhwZ, t_B, label_B, of(config, kept_BN))

  return predict
