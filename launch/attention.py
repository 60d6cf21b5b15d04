"""The attention kernel of a training, chosen by measuring on its device and shapes."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import FrozenConfigDict

from launch.engine import console, processes
from launch.engine.checkpoint import read_config
from lightningdit_jax.attention import attend, refusal
from lightningdit_jax.options import ATTENTIONS

ROUNDS = 5
# The kernels round differently; a run uses the fused one only below this share of the time.
WORTH = 0.9


def choose(config: FrozenConfigDict, workdir: Path) -> str:
  """The kernel that `config.model.attention` names, for "auto" the faster one.

  TPUs take ours in bfloat16 for the sizes that it can do: it is faster on all chips, by the
  compiler's estimate in docs/lab/performance.md. cuDNN's is tried only on NVIDIA GPUs in bfloat16,
  forward and backward, with one device's share of a batch; it must run and be a tenth faster. All
  processes of a job use what the first one finds. A training that goes on in `workdir` keeps its
  kernel.
  """
  if config.model.attention != "auto":
    return config.model.attention
  if (workdir / "config.json").exists():
    noted = read_config(workdir).get("model", {}).get("attention")
    if noted in ATTENTIONS:
      return noted
  if jax.default_backend() not in ("gpu", "tpu") or config.dtype != "bfloat16":
    return "xla"
  model = config.model
  if jax.default_backend() == "tpu":
    tokens = (model.input_size // model.patch_size) ** 2
    if reason := refusal(tokens, model.hidden_size, model.num_heads):
      console.say(f"attention: xla (the kernel for TPUs cannot: {reason})")
    return "xla" if reason else "pallas"
  ours = _seconds(config, "xla")
  try:
    fused = _seconds(config, "cudnn")
  except (RuntimeError, ValueError, NotImplementedError) as error:
    console.say(f"attention: cuDNN's does not run here ({str(error).splitlines()[0]})")
    fused = math.inf
  chosen = "cudnn" if processes.first_does(lambda: fused < WORTH * ours) else "xla"
  console.say(
    f"attention: {chosen} (a layer takes {ours * 1e3:.2f} ms by xla, {fused * 1e3:.2f} ms by cudnn)"
  )
  return chosen


def _seconds(config: FrozenConfigDict, implementation: str) -> float:
  """Seconds of a layer's attention, forward and backward."""
  model = config.model
  batch = max(config.batch_size // config.accumulate_steps // jax.device_count(), 1)
  tokens = (model.input_size // model.patch_size) ** 2
  shape = (batch, model.num_heads, tokens, model.hidden_size // model.num_heads)
  q, k, v = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))

  @jax.jit
  @functools.partial(jax.grad, argnums=(0, 1, 2))
  def gradients(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.sum(attend(q, k, v, implementation).astype(jnp.float32) ** 2)

  taken = []
  for _ in range(ROUNDS + 1):
    began = time.perf_counter()
    jax.block_until_ready(gradients(q, k, v))
    taken.append(time.perf_counter() - began)
  return float(np.median(taken[1:]))
