"""NNX modules as pure functions: parameters are plain nested dicts, modules exist only inside them.

Training, sharding and checkpoints see `{"encoder": {"conv_in": {"kernel": array, ...}}}`; a module
is put together from such a dict where it is called, and forgotten again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import platform

M = TypeVar("M")
Build = Callable[[nnx.Rngs], nnx.Module]
Params = dict[str, Any]


class _Stream(nnx.RngStream):
  """The keys of nnx.RngStream, quick to trace.

  That one updates its count in place, for which Flax asks a traced array for its sharding, and JAX
  words an error about all operations so far: two thirds of the time that outlining a VA-VAE takes.
  """

  def __call__(self) -> jax.Array:
    count = self.count.get_value()
    self.count.set_value(count + 1)
    return jax.random.fold_in(self.key.get_value(), count)


class _Rngs(nnx.Rngs):
  def __init__(self, key: jax.Array | int):
    super().__init__()
    self.default = _Stream(key, tag="default")


def abstract(build: Callable[[nnx.Rngs], M]) -> M:
  """The module that `build` makes, with shapes for arrays."""
  return nnx.eval_shape(lambda: build(_Rngs(0)))


def outline(build: Callable[[nnx.Rngs], M], name: str) -> M:
  """As `abstract`; InputError with `name` if the module cannot be built."""
  try:
    return abstract(build)
  except (TypeError, ValueError, ArithmeticError, LookupError) as error:
    raise InputError(f"{name} cannot be built: {error}") from error


def finite(tree: Any) -> Any:
  """Whether all numbers of an array are finite, bool [], for each array of floats of a pytree."""
  floats = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, tree)
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), floats)


def all_finite(state: Any, metrics: Any) -> jax.Array:
  """Whether all numbers of a training's state and metrics are; XLA checks where it writes them."""
  return jnp.stack(jax.tree.leaves((finite_state(state), finite(metrics)))).all()


def finite_state(state: Any) -> Any:
  """Flags, bool [], that together say whether all numbers of a training's state are finite.

  On TPUs a parameter has one flag with its averages and moments: with one each, XLA takes three
  passes to write them, which read what another has written.
  """
  if platform() != "tpu":
    return finite(state)
  structure: Any = jax.tree.structure(state.params)

  def is_alike(tree: Any) -> bool:
    return bool(structure == jax.tree.structure(tree))

  def together(*arrays: jax.Array) -> jax.Array:
    return functools.reduce(jnp.logical_and, map(jnp.isfinite, arrays)).all()

  trees = jax.tree.leaves(state, is_leaf=is_alike)
  others = [tree for tree in trees if not is_alike(tree)]
  return jax.tree.map(together, *filter(is_alike, trees)), finite(others)


def check_finite(tree: Any, name: str) -> None:
  """Raises InputError where an array of the pytree `name` has a number that is not finite."""
  flags = jax.device_get(jax.jit(finite)(tree))
  if bad := [jax.tree_util.keystr(k) for k, ok in jax.tree.leaves_with_path(flags) if not ok]:
    more = f" and {len(bad) - 1} more arrays" if len(bad) > 1 else ""
    raise InputError(
      f"{name} has numbers that are not finite, in {bad[0]}{more}: nothing can be computed with "
      "them. Take an earlier checkpoint, or other weights."
    )


@functools.lru_cache(64)
def graph_of(build: Build) -> nnx.GraphDef:
  """The static half of a module, for `nnx.merge(graph, params)` with `init`'s params; hashable."""
  return nnx.graphdef(abstract(build))


def fingerprint(params: Params) -> str:
  """Identifies parameters: a hash of their names and bytes."""
  digest = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    digest.update(jax.tree_util.keystr(path).encode())
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def init(build: Build, key: jax.Array, *kinds: type[nnx.Variable]) -> Any:
  """Fresh parameters as nested dicts of arrays, the names those of the module's attributes.

  With `kinds`, such as nnx.Param and nnx.BatchStat, a tuple of one dict for each.
  """
  module = build(_Rngs(key))
  if not kinds:
    return nnx.to_pure_dict(nnx.state(module))
  return tuple(nnx.to_pure_dict(state) for state in nnx.state(module, *kinds))
