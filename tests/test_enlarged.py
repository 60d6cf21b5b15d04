"""A teacher that sees enlarged pictures has one feature for each latent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from tests.test_tokenizer_training import configuration
from vavae_jax import frozen
from vavae_jax.common.errors import InputError
from vavae_jax.teachers.enlarged import Enlarged


class Means(nnx.Module):
  """The mean colour of cells of 4 pixels."""

  feature_size, stride = 3, 4

  def __call__(self, image_BHWC):
    batch, height, width, channels = image_BHWC.shape
    cells = (batch, height // 4, 4, width // 4, 4, channels)
    return image_BHWC.reshape(cells).mean((2, 4))


@pytest.mark.parametrize(("scale", "stride"), [(2, 2), (4, 2), (1, 8), (4, 1)])
def test_each_latent_has_the_features_of_its_pixels(scale, stride):
  """Of a picture in halves, where enlarging moves nothing far from the edge between them."""
  row = jnp.where(jnp.arange(32) < 16, -0.5, 0.75)
  image = jnp.broadcast_to(row[:, None], (2, 8, 32, 3))
  teacher = Enlarged(Means(), scale, stride)
  found = jax.jit(teacher.__call__)(image)
  assert (teacher.stride, teacher.feature_size) == (stride, 3)
  assert found.shape == (2, 8 // stride, 32 // stride, 3)
  left = 16 // stride
  np.testing.assert_allclose(found[:, :, : left - max(2 // stride, 1)], -0.5, atol=1e-5)
  np.testing.assert_allclose(found[:, :, left + max(2 // stride, 1) :], 0.75, atol=1e-5)


def test_enlarged_pictures_stay_in_range():
  """Cubic interpolation alone overshoots at edges."""
  seen = []

  class Looks(Means):
    def __call__(self, image_BHWC):
      seen.append((float(image_BHWC.min()), float(image_BHWC.max())))
      return super().__call__(image_BHWC)

  image = jnp.where(jnp.arange(8) < 4, -1.0, 1.0)[None, None, :, None] * jnp.ones((1, 8, 8, 3))
  Enlarged(Looks(), 4, 4)(image)
  assert seen == [(-1.0, 1.0)]


@pytest.mark.parametrize(("scale", "stride"), [(1, 2), (3, 2), (0, 4)])
def test_a_grid_that_cannot_be_met_is_refused(scale, stride):
  with pytest.raises(InputError, match=r"feature for every 4 pixels.*config\.teacher\.scale=\d"):
    Enlarged(Means(), scale, stride)


def test_a_configuration_without_the_needed_scale_is_told_which(monkeypatch):
  monkeypatch.setattr(frozen, "_loaded_teacher", lambda config: Means())
  changes = {"teacher.name": "efficientnet_lite0", "loss.perceptual_weight": 0.0}
  changes |= {"model.patch_size": 1, "model.ch_mult": (1, 1)}
  config = configuration(**changes)
  with pytest.raises(InputError, match="set the scale to 2"):
    frozen.check(config)
  frozen.check(
    FrozenConfigDict(config.to_dict() | {"teacher": config.teacher.to_dict() | {"scale": 2}})
  )
