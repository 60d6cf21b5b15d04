"""`dense` is the matrix product under every transformation that trainings and researchers use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lightningdit_jax.dense import dense

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
