"""GroupNorm for TPUs against flax's, forward and backward, alone and in the tokenizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import cases
from tests.reference import procedural
from tests.test_autoencoder import tiny
from vavae_jax import blocks, normalization
from vavae_jax.normalization import group_norm

EPSILON = 1e-6


def arguments(groups: int, width: int, mean: float = 0.3) -> list[jax.Array]:
  """Input of that mean in all channels, and deviations of 1 or so; scale, bias, cotangent."""
  shape = (3, 5, 7, groups * width)
  x, cotangent = (jnp.asarray(procedural.normal(name, shape)) for name in ("x", "cotangent"))
  scale, bias = (jnp.asarray(procedural.normal(name, shape[-1:])) for name in ("scale", "bias"))
  return [x + mean, scale + 1, bias, cotangent]


def flax(groups: int, swish: bool):
  """The same by flax, from centred values."""

  def run(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    norm = nnx.GroupNorm(
      x.shape[-1],
      groups,
      epsilon=EPSILON,
      dtype=jnp.float32,
      use_fast_variance=False,
      rngs=nnx.Rngs(0),
    )
    graph, _ = nnx.split(norm)
    y = nnx.merge(graph, {"scale": scale, "bias": bias})(x)
    return nnx.swish(y) if swish else y

  return run


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize(("groups", "width"), [(4, 3), (1, 8), (6, 1)])
def test_value_and_gradients_are_those_of_flax(groups, width, swish, dtype):
  x, *weights, cotangent = arguments(groups, width)
  given = (x.astype(dtype), *weights)
  own, pull_own = jax.vjp(lambda *a: group_norm(*a, groups, EPSILON, swish), *given)
  other, pull_other = jax.vjp(flax(groups, swish), *given)
  assert own.dtype == jnp.float32
  cases.assert_near(own, other, 1e-5)
  for mine, wanted in zip(pull_own(cotangent), pull_other(cotangent), strict=True):
    assert mine.dtype == wanted.dtype
    mine, wanted = (np.asarray(a, np.float32) for a in (mine, wanted))
    cases.assert_near(mine, wanted, 1e-5 if dtype == "float32" else 2**-7)


@pytest.mark.parametrize("mean", [30.0, -90.0])
def test_far_means_cost_less_than_bfloat16(mean):
  x, *weights, _ = arguments(4, 3, mean)
  own = group_norm(x, *weights, 4, EPSILON, False)
  cases.assert_near(own, flax(4, False)(x, *weights), 2**-9)


def test_means_beyond_float32_do_not_blow_up():
  """At a mean of 1e5 deviations; results were ten times too large where the variance came out 0."""
  x, *_ = arguments(4, 3)
  x = 1e3 + 1e-2 * x
  weights = (jnp.ones(x.shape[-1]), jnp.zeros(x.shape[-1]))
  own, wanted = group_norm(x, *weights, 4, EPSILON, False), flax(4, False)(x, *weights)
  assert jnp.abs(own).max() < jnp.abs(wanted).max()


def test_constant_input_becomes_the_bias():
  x, scale, bias, _ = arguments(4, 3)
  own = group_norm(jnp.zeros_like(x), scale, bias, 4, EPSILON, False)
  np.testing.assert_array_equal(own, jnp.broadcast_to(bias, x.shape))


def test_tokenizer_computes_the_same_as_on_tpus(monkeypatch):
  model = tiny()
  graph, weights = nnx.split(model)
  image = jnp.asarray(np.tanh(procedural.normal("image", (2, 8, 12, 3))))

  def rebuilt(weights, image: jax.Array) -> jax.Array:
    network = nnx.merge(graph, weights)
    return network.decode(network.encode(image).mode())

  def loss(weights) -> jax.Array:
    return jnp.mean(jnp.square(rebuilt(weights, image)))

  def computed() -> list[jax.Array]:
    return jax.tree.leaves(jax.jit(lambda w: (rebuilt(w, image), jax.grad(loss)(w)))(weights))

  plain = computed()
  taken = []

  def watched(*given):
    taken.append(given)
    return group_norm(*given)

  for module in (blocks, normalization):
    monkeypatch.setattr(module, "platform", lambda: "tpu")
  monkeypatch.setattr(normalization, "group_norm", watched)
  fused = computed()
  assert taken
  largest = max(float(jnp.abs(gradient).max()) for gradient in plain[1:])
  for mine, wanted in zip(fused, plain, strict=True):
    np.testing.assert_allclose(mine, wanted, rtol=1e-3, atol=1e-5 * largest)
