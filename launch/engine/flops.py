"""FLOPs of a traced function: its matrix products and convolutions, by their shapes.

Counted in the jaxpr, before any compiler: a scan counts all its rounds, and what the backward pass
computes again counts again. XLA's own count takes the body of a loop once. A primitive of ours has
a method `flops` (shapes of its inputs -> FLOPs).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.extend

# Matrix products of attention by jax's cuDNN and by our kernel for TPUs, without the logits that
# their backward kernels make again.
CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 4}
PALLAS_PRODUCTS = {"attention_forward": 2, "attention_backward": 4}


def count(jaxpr: Any) -> float:
  """FLOPs, 2 a multiply-add, of `jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`.

  A `while` counts one round, a `cond` its largest branch.
  """
  jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
  return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> float:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    (contracted, _), _ = params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    depth = math.prod(left[axis] for axis in contracted)
    return 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
  if own := getattr(equation.primitive, "flops", None):
    return own(*(x.aval.shape for x in equation.invars))
  if name == "conv_general_dilated":
    kernel = equation.invars[1].aval.shape
    out_axis = params["dimension_numbers"].rhs_spec[0]
    per_output = math.prod(kernel) / kernel[out_axis]
    # Zeros between the pixels of a dilated input are multiplied with nothing.
    spread = math.prod(params["lhs_dilation"])
    return 2.0 * per_output / spread * math.prod(equation.outvars[0].aval.shape)
  if name in CUDNN_PRODUCTS:
    batch, queries, heads, size = equation.invars[0].aval.shape
    keys = equation.invars[1].aval.shape[1]
    return 2.0 * CUDNN_PRODUCTS[name] * batch * heads * queries * keys * size
  if name == "pallas_call":
    batch, tokens, features = equation.invars[0].aval.shape  # of qkv
    return 2.0 * PALLAS_PRODUCTS[params["name"]] * batch * tokens**2 * features / 3
  inner = [count(x) for x in inner_jaxprs(equation)]
  if name == "cond":
    return max(inner, default=0.0)
  if name == "shard_map":  # has the shapes of one device
    return sum(inner) * params["mesh"].size
  return sum(inner) * (params["length"] if name == "scan" else 1)


def inner_jaxprs(equation: Any) -> list[Any]:
  """The jaxprs that an equation runs."""
  found = jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr)
  return [x for x in found if _is_jaxpr(x)]


def _is_jaxpr(value: Any) -> bool:
  return isinstance(value, jax.extend.core.Jaxpr | jax.extend.core.ClosedJaxpr)
