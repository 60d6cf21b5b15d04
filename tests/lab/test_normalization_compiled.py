"""GroupNorm compiled for TPUs that are not here: how often it passes over memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from launch.lab import programs
from launch.lab.plan import hlo, operations
from vavae_jax.normalization import normalized


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_value_and_gradient_take_eight_passes(described, topology):
  """Sums, then value; sums of two, then gradient; by centred values it takes nine or ten."""
  devices = described(topology)
  norm = nnx.GroupNorm(128, 32, epsilon=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0))
  graph, weights = nnx.split(norm)

  def run(weights, x_BhwD, cotangent_BhwD):
    def of(weights, x_BhwD):
      return normalized(nnx.merge(graph, weights), x_BhwD, swish=True)

    y_BhwD, pull = jax.vjp(of, weights, x_BhwD)
    return y_BhwD, pull(cotangent_BhwD)

  # A device's part, 512 MiB, is larger than any VMEM.
  x = programs.rows((16 * devices.size, 256, 256, 128), jnp.float32, devices)
  shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), weights)
  with jax.set_mesh(devices):
    compiled = jax.jit(run).lower(programs.everywhere(shapes, devices), x, x).compile()
  moved = operations.moved(operations.of(hlo.parse(compiled.as_text())))
  assert moved <= 8.1 * x.size * 4 / devices.size
