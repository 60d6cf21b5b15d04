"""What of a model depends on the platform: attention, what the backward pass keeps, the scan."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from ml_collections import FrozenConfigDict

from vavae_jax.common.sharding import platform, rounds_products

_FUSED = {"gpu": "cudnn", "tpu": "pallas"}  # attention


def fitted(config: FrozenConfigDict, dtype: str = "") -> dict[str, Any]:
  """The arguments of LightningDiT on this platform, to train, or in a `dtype` to sample.

  What TPUs would round in float32 is cast before, to sample: the same numbers but for queries and
  keys, which are rounded also before their rotation, and half as much to move; and the attention's
  kernel runs.
  """
  here, name, options = platform(), dtype or config.dtype, config.model.to_dict()
  results = None
  if dtype == "float32" and rounds_products(here):
    name, results = "bfloat16", jnp.float32
  kernel = _FUSED.get(here)
  if name != "bfloat16" or options["attention"] not in ("auto", kernel):
    # What was trained with a fused kernel is also sampled in float32 and on other devices;
    # `checks.check_model` refuses to train so.
    options["attention"] = "xla"
  elif kernel == "pallas":
    options["attention"] = kernel
  if here == "tpu" and not options["use_checkpoint"] and options["remat_policy"] == "auto":
    options |= {"use_checkpoint": True, "remat_policy": "attended"}
  if not options["scan_unroll"]:
    # On GPUs a scan copies what the backward pass needs into arrays of all blocks: a third of what
    # is read and written in a step. TPUs write it in place.
    options["scan_unroll"] = options["depth"] if here == "gpu" else 1
  return options | {"dtype": jnp.dtype(name), "results": results}
