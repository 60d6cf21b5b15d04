"""`dense` is the matrix product under every transformation that trainings and researchers use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lightningdit_jax import dense as dense_module
from lightningdit_jax.dense import Linear, dense, spread

X = jax.random.normal(jax.random.key(0), (2, 3, 5))
KERNEL = jax.random.normal(jax.random.key(1), (5, 7))


def gradients(product):
  return jax.grad(lambda x, w: jnp.sin(product(x, w)).sum(), argnums=(0, 1))


TRANSFORMED = {
  "value": lambda f: f(X, KERNEL),
  "gradients": lambda f: gradients(f)(X, KERNEL),
  "forward mode": lambda f: jax.jvp(f, (X, KERNEL), (X + 1, KERNEL - 1)),
  "forward over reverse": lambda f: jax.jvp(gradients(f), (X, KERNEL), (X, KERNEL)),
  "one gradient a sample": lambda f: jax.vmap(gradients(f), (0, None))(X, KERNEL),
  "many kernels": lambda f: jax.vmap(f, (None, 0))(X, jnp.stack([KERNEL, 2 * KERNEL])),
  "recomputed in a scan": lambda f: jax.grad(
    lambda w: jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(f(x, w)), None)), X, w)[0].sum()
  )(jnp.stack([KERNEL[:, :5]] * 3)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_it_is_the_matrix_product(name):
  ours, expected = (jax.jit(lambda f=f: TRANSFORMED[name](f))() for f in (dense, jnp.matmul))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)


def test_the_gradient_of_the_kernel_needs_no_transpose():
  """What it is for."""
  text = jax.jit(gradients(dense)).lower(X, KERNEL).as_text()
  assert "stablehlo.dot_general" in text
  assert "stablehlo.transpose" not in text


def broadcast(row, places):
  return jnp.broadcast_to(row, (*places, *row.shape))


@pytest.mark.parametrize("name", ["value", "gradients", "forward mode", "forward over reverse"])
def test_spread_is_a_broadcast(name):
  def biased(add):
    return lambda x, row: dense(x, KERNEL) * 2 + add(row, x.shape[:-1])

  def transformed(add):
    f, row = biased(add), KERNEL[0]
    return {
      "value": lambda: f(X, row),
      "gradients": lambda: gradients(f)(X, row),
      "forward mode": lambda: jax.jvp(f, (X, row), (X + 1, row - 1)),
      "forward over reverse": lambda: jax.jvp(gradients(f), (X, row), (X, row)),
    }[name]

  ours, expected = (jax.jit(transformed(add))() for add in (spread, broadcast))
  jax.tree.map(np.testing.assert_array_equal, ours, expected)
  mapped = (jax.vmap(gradients(biased(add)), (0, None)) for add in (spread, broadcast))
  ours, expected = (jax.jit(f)(X, KERNEL[0]) for f in mapped)
  jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize(("platform", "sums"), [("cpu", 2), ("tpu", 1)])
def test_the_gradient_of_a_bias_before_a_kernel_is_a_product_on_tpus(platform, sums):
  layer = Linear(5, 7, rngs=nnx.Rngs(0))
  graph, weights = nnx.split(layer)
  loss = jax.grad(lambda w: jnp.sin(nnx.merge(graph, w)(X, apart=True)).sum())
  text = jax.jit(loss).trace(weights).lower(lowering_platforms=(platform,)).as_text()
  # The other sum is of the loss itself, which nobody wants.
  assert text.count("stablehlo.reduce") == sums - 1
  assert text.count("stablehlo.dot_general") == 4 - sums


def test_halves_are_the_parts_of_the_whole_on_every_platform(monkeypatch):
  layer = Linear(5, 8, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
  products = []
  for platform in ("cpu", "tpu"):
    monkeypatch.setattr(dense_module, "platform", lambda name=platform: name)
    np.testing.assert_allclose(jnp.concatenate(layer.halves(X), -1), layer(X), rtol=1e-6, atol=1e-6)
    products.append(str(jax.make_jaxpr(layer.halves)(X)).count("= dense"))
  assert products == [1, 2]


def test_wide_results_of_rounded_factors_are_not_rounded():
  layer = Linear(
    *(5, 8),
    bias_init=nnx.initializers.normal(),
    dtype=jnp.bfloat16,
    preferred_element_type=jnp.float32,
    rngs=nnx.Rngs(0),
  )
  x, kernel = (np.asarray(a.astype(jnp.bfloat16), np.float64) for a in (X, layer.kernel[...]))
  expected = x @ kernel + np.asarray(layer.bias[...])
  for y in (layer(X), layer(X, apart=True), jnp.concatenate(layer.halves(X), -1)):
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
