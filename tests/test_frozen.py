"""The weights of the networks that judge a tokenizer, as TPUs take them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.reference import procedural
from vavae_jax import frozen
from vavae_jax.teachers import layers


def weights() -> dict:
  of_layer = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}
  depthwise = {"kernel": jnp.ones((3, 3, 1, 4))}
  return {
    "teacher": {"blocks": {"fc1": of_layer, "conv": depthwise}, "pos_embed": jnp.ones((1, 5, 3))},
    "perceptual": {"heads": {0: {"kernel": jnp.ones((1, 1, 3, 1))}}},
  }


def dtypes(tree) -> dict:
  return jax.tree.map(lambda x: x.dtype.name, tree)


def test_tpus_get_the_teachers_matrices_in_bfloat16_and_nothing_else():
  wanted = dtypes(weights())
  wanted["teacher"]["blocks"]["fc1"]["kernel"] = "bfloat16"
  assert dtypes(frozen.as_multiplied(weights(), "tpu")) == wanted


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_others_get_the_weights_as_they_are(platform):
  given = weights()
  assert frozen.as_multiplied(given, platform) is given


def test_a_chosen_precision_keeps_the_weights():
  given = weights()
  with jax.default_matmul_precision("highest"):
    assert frozen.as_multiplied(given, "tpu") is given


def test_gelu_of_tpus_is_that_of_others(monkeypatch):
  x = 4 * jnp.asarray(procedural.normal("x", (1000,)))
  plain = layers._gelu(x)
  monkeypatch.setattr(layers, "platform", lambda: "tpu")
  own = layers._gelu(x)
  assert not np.array_equal(own, plain)
  np.testing.assert_array_less(np.abs(own - plain), 3e-7 * np.abs(x) + 1e-30)
