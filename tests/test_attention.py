"""The attention kernel for TPUs, interpreted on the CPU, against `attend` and inside the model."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from launch.engine import flops
from lightningdit_jax.attention import Norm, attend, fused, refusal
from lightningdit_jax.model import LightningDiT
from lightningdit_jax.positions import rope_tables, rotate
from tests import cases
from vavae_jax.common import functional
from vavae_jax.common.sharding import BATCH_AXES

RMS, LAYER = Norm(centers=False, epsilon=1e-6), Norm(centers=True, epsilon=1e-5)


def plain(qkv, heads, rope, norms):
  """What the model does without the kernel."""
  parts = jnp.split(qkv, 3, axis=-1)
  q, k, v = (rearrange(part, "B N (K E) -> B K N E", K=heads) for part in parts)
  if norms:
    norm, weights = norms

    def normed(x, scale, bias):
      x = x.astype(jnp.float32)
      x = x - x.mean(-1, keepdims=True) if norm.centers else x
      return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + norm.epsilon) * scale + bias

    q, k = normed(q, *weights[:2]), normed(k, *weights[2:])
  if rope is not None:
    q, k = rotate(q, rope), rotate(k, rope)
  return rearrange(attend(q, k, v, "xla"), "B K N E -> B N (K E)")


@pytest.mark.parametrize(
  ("size", "heads", "grid", "dtype", "norm", "rotates"),
  [
    (72, 16, (2, 5), "float32", None, True),  # heads across registers; tokens are filled up
    (72, 16, (2, 4), "bfloat16", RMS, True),
    (96, 4, (3, 3), "float32", RMS, True),
    (96, 4, (4, 4), "bfloat16", None, True),
    (64, 3 * 2, (4, 6), "bfloat16", LAYER, True),
    (128, 1, (5, 7), "float32", LAYER, False),
    (32, 4, (20, 14), "float32", LAYER, True),  # two blocks of queries, the second filled up
    (32, 4, (3, 5), "bfloat16", None, False),
  ],
)
def test_it_is_attend(size, heads, grid, dtype, norm, rotates):
  """And its gradients, those of the norms' weights among them."""
  tokens = grid[0] * grid[1]
  rope = rope_tables(*grid, size) if rotates else None
  keys = jax.random.split(jax.random.key(0), 3)
  qkv = (1.5 * jax.random.normal(keys[0], (2, tokens, 3 * heads * size))).astype(dtype)
  weights = 1 + 0.3 * jax.random.normal(keys[1], (4, size))
  dy = jax.random.normal(keys[2], (2, tokens, heads * size)).astype(dtype)

  def run(function, qkv, weights):
    y, pull = jax.vjp(
      lambda qkv, weights: function(qkv, heads, rope, (norm, weights) if norm else None),
      *(qkv, weights),
    )
    dqkv, dweights = pull(dy)
    # RMSNorm has no bias.
    return y, dqkv, *(dweights if norm == LAYER else dweights[::2])

  ours, expected = (jax.jit(lambda *x, f=f: run(f, *x))(qkv, weights) for f in (fused, plain))
  assert ours[0].dtype == jnp.dtype(dtype)
  for actual, wanted in zip(ours, expected, strict=True):
    # Softmax ignores the bias of keys that are not rotated: its gradient is rounding noise.
    floor = 0.0 if rotates else 1e-4
    tolerance = 2e-6 if dtype == "float32" else 0.015
    cases.assert_near(*(np.asarray(x, np.float32) for x in (actual, wanted)), tolerance, floor)


OPTIONS = {
  **{"in_channels": 3, "hidden_size": 128, "depth": 2, "num_heads": 2, "num_classes": 10},
  **{"mlp_ratio": 1.0, "input_size": 4},
}


def gradients(**options):
  """Of a model with random weights, and the FLOPs of their program."""
  model = cases.random_weights(
    functional.abstract(lambda rngs: LightningDiT(**OPTIONS, **options, rngs=rngs))
  )
  graph, weights = nnx.split(model)
  x = jax.random.normal(jax.random.key(0), (2, 4, 8, 3))
  t, label = jnp.array([0.1, 0.9]), jnp.array([0, 10])

  def loss(weights):
    return jnp.sum(nnx.merge(graph, weights)(x, t, label) ** 2)

  traced = jax.jit(jax.grad(loss)).trace(weights)
  return traced.lower().compile()(weights), flops.count(traced.jaxpr)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"use_qknorm": True, "use_checkpoint": True},
    {"use_qknorm": True, "use_rmsnorm": False},
  ],
)
def test_the_model_is_the_same_with_it(options):
  ours, our_flops = gradients(attention="pallas", **options)
  expected, expected_flops = gradients(attention="xla", **options)
  jax.tree.map(lambda a, b: cases.assert_near(a, b, 1e-4, floor=1e-6), ours, expected)
  # The logits that the backward kernel makes again are no work of the model's.
  assert our_flops == expected_flops


def test_every_device_runs_it_on_its_images(command):
  done = command("tests.attention_on_mesh", XLA_FLAGS="--xla_force_host_platform_device_count=4")
  assert done.returncode == 0, done.stderr
  told = json.loads(done.stdout)
  assert told["devices"] == 4
  assert told["largest"] > 0.1
  assert told["difference"] < 1e-6
  assert told["images"] == [[2, 16, 384], [2, 16, 384]]  # of the kernels, on one device


def test_it_has_no_forward_mode():
  qkv = jnp.ones((1, 16, 384))
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda qkv: fused(qkv, 2), (qkv,), (qkv,))


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    ((256, 1152, 16), ""),
    ((1024, 1152, 16), ""),
    ((256, 192, 3), "3 heads of 64 channels"),
    ((256, 512, 2), "2 heads of 256 channels"),
    ((4096, 1152, 16), "4096 tokens, and it takes 1024"),
  ],
)
def test_sizes_that_it_cannot_take_have_a_reason(sizes, message):
  assert bool(message) == bool(refusal(*sizes))
  assert message in refusal(*sizes)


def test_a_chip_of_little_memory_refuses_many_tokens():
  device = jax.sharding.AbstractDevice("TPU v4", 2, "tpu")
  mesh = jax.sharding.AbstractMesh((1, 1), BATCH_AXES, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert refusal(256, 1152, 16) == ""
    assert re.fullmatch(r"\d+ MiB in VMEM, and the chip has 16", refusal(1024, 1152, 16))
