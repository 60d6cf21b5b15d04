"""The attention kernel compiled for TPUs that are not here, on meshes of both axes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from launch.lab import programs
from launch.lab.plan import schedule
from lightningdit_jax import attention
from lightningdit_jax.attention import Norm, fused
from lightningdit_jax.positions import rope_tables

RMS, LAYER = Norm(centers=False, epsilon=1e-6), Norm(centers=True, epsilon=1e-5)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
  ("topology", "heads", "size", "tokens", "norm"),
  [
    ("v4:2x2x1", 16, 72, 256, None),
    ("v5e:2x2", 16, 72, 256, None),
    ("v5p:2x2x1", 16, 72, 256, RMS),
    ("v6e:2x2", 16, 72, 256, LAYER),
    ("v6e:2x2", 8, 96, 1024, None),  # by blocks of queries
    ("v5e:2x2", 12, 64, 70, RMS),  # filled up
  ],
)
def test_the_kernel_is_compiled(described, topology, heads, size, tokens, norm):
  """Forward and backward, each chip with its images: nothing is sent or turned."""
  devices = described(topology, 2, -1)
  rope = rope_tables(2, tokens // 2, size)

  def gradients(qkv, weights):
    norms = (norm, weights) if norm else None
    return jax.grad(lambda x: jnp.sum(fused(x, heads, rope, norms).astype(jnp.float32)))(qkv)

  qkv = programs.rows((4, tokens, 3 * heads * size), jnp.bfloat16, devices)
  weights = programs.everywhere(jax.ShapeDtypeStruct((4, size), jnp.float32), devices)
  with jax.set_mesh(devices):
    assert not attention.refusal(tokens, heads * size, heads)
    text = jax.jit(gradients).lower(qkv, weights).compile().as_text()
  assert "attention_backward" in text
  for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute", " transpose("):
    assert kind not in text


@pytest.mark.tpu_aot
def test_the_kernel_of_routed_tokens_has_memory_enough(described):
  """Alone, where the compiler can put nothing beside it: norms, and tables of each image."""
  heads, size, tokens, images = 12, 64, 128, 16
  devices = described("v6e:2x2", 2, -1)
  one = jax.sharding.SingleDeviceSharding(devices.devices.flat[0])

  def gradients(qkv, weights, table, dy):
    attended = lambda x: fused(x, heads, (table, table), (RMS, weights))  # noqa: E731
    return jax.vjp(attended, qkv)[1](dy)

  def array(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=one)

  qkv, dy = (array((images, tokens, n * heads * size), jnp.bfloat16) for n in (3, 1))
  weights = array((4, size), jnp.float32)
  table = array((images, 1, tokens, size), jnp.float32)
  # Of a mesh the kernel knows the chip.
  single = jax.sharding.Mesh(devices.devices[:1, :1], devices.axis_names)
  with jax.set_mesh(single):
    traced = jax.jit(gradients).trace(qkv, weights, table, dy)
  _, backward = schedule.kernels_of(traced.jaxpr)
  inputs = [array(x.aval.shape, x.aval.dtype) for x in backward.invars]
  jax.jit(schedule.alone(backward)).lower(*inputs).compile()
