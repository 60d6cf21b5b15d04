"""What a block keeps for its backward pass, by name: memory against recomputation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.extend

from lightningdit_jax.dense import dense_p

# What the backward pass computes again in any case: no arithmetic worth the name, and memory moves
# slower. Casts and gathers are among them: a scan would keep a copy of every block's weights.
CHEAP = frozenset(
  {
    "add",
    "add_any",
    "broadcast_in_dim",
    "concatenate",
    "convert_element_type",
    "integer_pow",
    "mul",
    "neg",
    "reshape",
    "select_n",
    "sharding_constraint",
    "slice",
    "split",
    "squeeze",
    "sub",
    "transpose",
  }
)


def is_costly(primitive: jax.extend.core.Primitive, *_: Any, **__: Any) -> bool:
  """The policy without `use_checkpoint`: keeps matrix products, sums and exponentials."""
  return primitive.name not in CHEAP


# What the backward pass finds stored where `use_checkpoint` is on; it computes the rest again.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dense": lambda primitive, *_, **__: primitive is dense_p,
  "dots": lambda primitive, *_, **__: primitive in (dense_p, jax.lax.dot_general_p),
}
