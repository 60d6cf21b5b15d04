"""Convolutions of small maps on CPUs: the same numbers by another program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vavae_jax.common.convolution import convolve

NHWC: dict[str, Any] = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def _convolves(side: int, size: int, stride: int, padding: Any) -> bool:
  x, kernel = jnp.zeros((2, side, side, 3)), jnp.zeros((size, size, 3, 5))
  traced = jax.make_jaxpr(lambda x, k: convolve(x, k, (stride, stride), padding, **NHWC))(x, kernel)
  return "conv_general_dilated" in str(traced)


@pytest.mark.parametrize(
  ("side", "size", "stride", "padding"),
  [
    *((side, 3, 1, "SAME") for side in (1, 2)),
    *((side, 3, 2, ((0, 1), (0, 1))) for side in (2, 3, 4)),
    (3, 4, 1, ((1, 1), (1, 1))),
    (6, 4, 2, ((1, 1), (1, 1))),
    (5, 3, 2, "VALID"),
  ],
)
def test_small_maps_convolve_by_a_product_and_their_gradients_agree(
  side: int, size: int, stride: int, padding: Any
) -> None:
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, side, side, 3))
  kernel = jax.random.normal(keys[1], (size, size, 3, 5))
  strides = (stride, stride)
  assert not _convolves(side, size, stride, padding)
  wanted, back = jax.vjp(
    lambda x, k: jax.lax.conv_general_dilated(x, k, strides, padding, **NHWC), x, kernel
  )
  found, own_back = jax.vjp(lambda x, k: convolve(x, k, strides, padding, **NHWC), x, kernel)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  cotangent = jax.random.normal(keys[2], wanted.shape)
  for ours, theirs in zip(own_back(cotangent), back(cotangent), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("side", "size"), [(3, 3), (8, 3), (2, 1)])
def test_others_stay_convolutions(side: int, size: int) -> None:
  assert _convolves(side, size, 1, "SAME")
