"""The tokenizer's upsampling compiled for TPUs that are not here."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from launch.lab import programs
from vavae_jax.blocks import Layers, ResnetBlock, Upsample


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v6e:2x2", "tpu7x:2x2x1"])
def test_value_and_gradients_are_compiled(described, topology):
  """The compiler crashes for these two if the norm's sums join the convolution's fusion."""
  devices = described(topology)

  def build() -> nnx.Sequential:
    layers = Layers(32, False, True, jnp.float32, nnx.Rngs(0))
    return nnx.Sequential(Upsample(32, layers), ResnetBlock(32, 32, layers))

  graph, weights = nnx.split(nnx.eval_shape(build))

  def loss(weights, x_BhwD):
    return (nnx.merge(graph, weights)(x_BhwD) ** 2).sum()

  x = programs.rows((devices.size, 8, 8, 32), jnp.float32, devices)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights)
  with jax.set_mesh(devices):
    lowered = jax.jit(jax.grad(loss, (0, 1))).lower(programs.everywhere(shapes, devices), x)
    assert "lhs_dilate = [2, 2]" in lowered.as_text()
    lowered.compile()
