"""The attention kernel on a mesh of 2 x 2 devices against one device: JSON of what differs.

python -m tests.attention_on_mesh
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp

from lightningdit_jax.attention import fused
from lightningdit_jax.positions import rope_tables
from vavae_jax.common import mesh
from vavae_jax.common.sharding import pin_batch


def main() -> None:
  qkv = jax.random.normal(jax.random.key(0), (8, 16, 384))
  rope = rope_tables(4, 4, 64)

  def loss(qkv: jax.Array) -> jax.Array:
    return jnp.sum(fused(pin_batch(qkv), 2, rope) ** 2)

  alone = jax.jit(jax.grad(loss))(qkv)
  with jax.set_mesh(mesh.make_mesh(2, 2)):
    traced = jax.jit(jax.grad(loss)).trace(qkv)
    spread = traced.lower().compile()(qkv)
  told = {
    "devices": len(spread.sharding.device_set),
    "largest": float(jnp.max(jnp.abs(alone))),
    "difference": float(jnp.max(jnp.abs(jax.device_get(spread) - jax.device_get(alone)))),
    "images": _shapes(traced.jaxpr.jaxpr),
  }
  print(json.dumps(told))


def _shapes(jaxpr: jax.extend.core.Jaxpr) -> list[list[int]]:
  """Of qkv in each kernel."""
  found = []
  for equation in jaxpr.eqns:
    if equation.primitive.name == "pallas_call":
      found.append(list(equation.invars[0].aval.shape))
      continue
    for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
      inner = getattr(value, "jaxpr", value)
      found += _shapes(inner) if hasattr(inner, "eqns") else []
  return found


if __name__ == "__main__":
  main()
