"""Large pictures in tiles: what is exact, where tiles lie, and what is refused."""

from __future__ import annotations

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import cases
from tests.reference import procedural
from vavae_jax import tiling
from vavae_jax.autoencoder import Autoencoder, Posterior
from vavae_jax.tiling import decode_tiled, encode_tiled

# Larger than a tile along both axes or along one; h != w.
SIZES = [(24, 40), (40, 68), (28, 16), (8, 36), (36, 10)]
# Long and narrow, from less than the overlap to more.
SIZES += [(2 * cells, 20) for cells in range(1, 6)]
TILE, OVERLAP = 16, 4


class Pixelwise(nnx.Module):
  """A tokenizer of 2 x 2 pixels whose cells know nothing of each other."""

  downsampling = 2

  def encode(self, image_BHWC: jax.Array) -> Posterior:
    cells = image_BHWC[:, ::2, ::2] + image_BHWC[:, 1::2, 1::2]
    return Posterior(cells, -cells)

  def decode(self, z_BhwZ: jax.Array) -> jax.Array:
    return -z_BhwZ.repeat(2, 1).repeat(2, 2)


class Numbered(nnx.Module):
  """Decodes every tile to the value of its first cell."""

  downsampling = 2

  def decode(self, z_BhwZ: jax.Array) -> jax.Array:
    return jnp.broadcast_to(z_BhwZ[:, :1, :1], z_BhwZ.shape).repeat(2, 1).repeat(2, 2)


def tiny() -> Any:
  model = nnx.eval_shape(
    lambda: Autoencoder(
      embed_dim=3, ch=4, ch_mult=(1, 1), num_res_blocks=1, norm_groups=2, rngs=nnx.Rngs(0)
    )
  )
  return cases.random_weights(model)


@pytest.mark.parametrize("overlap", [0, OVERLAP, 10])
@pytest.mark.parametrize("size", SIZES)
def test_what_depends_on_a_cell_alone_is_not_changed(size, overlap):
  """So that the weights of all tiles sum to one everywhere, also where three overlap."""
  model: Any = Pixelwise()
  image = procedural.normal("image", (3, *size, 2))
  posterior = encode_tiled(model, image, tile=TILE, overlap=overlap)
  expected = model.encode(image)
  np.testing.assert_array_equal(posterior.mean, expected.mean)
  np.testing.assert_array_equal(posterior.logvar, expected.logvar)
  z = np.asarray(expected.mean)
  decoded = decode_tiled(model, z, tile=TILE, overlap=overlap)
  np.testing.assert_array_equal(decoded, model.decode(z))


def test_overlaps_fade_linearly_and_the_last_tile_is_moved_inwards():
  """11 cells in tiles of 8 that share 2 at least: from 0 to 8, and from 3 to 11."""
  model: Any = Numbered()
  z = np.arange(11, dtype=np.float32).reshape(1, 1, 11, 1)
  decoded = decode_tiled(model, z, tile=TILE, overlap=OVERLAP)
  fading = 3 * (np.arange(10) + 0.5) / 10
  for row in decoded[0, :, :, 0]:
    np.testing.assert_allclose(row, [*np.zeros(6), *fading, *np.full(6, 3.0)], rtol=1e-6)
  across = decode_tiled(model, z.swapaxes(1, 2), tile=TILE, overlap=OVERLAP)
  np.testing.assert_array_equal(across, decoded.swapaxes(1, 2))


def test_a_picture_no_larger_than_a_tile_runs_in_one_pass():
  model = tiny()
  image = procedural.normal("image", (3, 12, 16, 3))
  posterior = encode_tiled(model, image, tile=TILE, overlap=OVERLAP)
  expected = jax.jit(Autoencoder.encode)(model, image)
  np.testing.assert_array_equal(posterior.mean, expected.mean)
  np.testing.assert_array_equal(posterior.logvar, expected.logvar)
  z = np.asarray(posterior.mean)
  decoded = decode_tiled(model, z, tile=TILE, overlap=OVERLAP)
  np.testing.assert_array_equal(decoded, jax.jit(Autoencoder.decode)(model, z))


def test_all_tiles_share_one_compilation(monkeypatch):
  chex.clear_trace_counter()
  # One trace is for the shape of the whole.
  traced = chex.assert_max_traces(lambda model, x: model.decode(x), n=2)
  monkeypatch.setattr(tiling, "_decode", jax.jit(traced))
  model = tiny()
  z = procedural.normal("z", (2, 19, 13, 3))
  decoded = decode_tiled(model, z, tile=TILE, overlap=OVERLAP)
  assert decoded.shape == (2, 38, 26, 3)
  corner = jax.jit(Autoencoder.decode)(model, z[:, -8:, -8:])
  # Where no other tile reaches: those before end at cells 14 and 8 of 19 and 13.
  np.testing.assert_array_equal(decoded[:, 28:, 16:], corner[:, -10:, -10:])


@pytest.mark.parametrize(("tile", "overlap"), [(15, 4), (16, 3), (16, 16), (16, -2), (0, 0)])
def test_tiles_that_do_not_fit_are_refused(tile, overlap):
  model: Any = Pixelwise()
  message = rf"tile={tile} and overlap={overlap} .* multiples of 2"
  with pytest.raises(ValueError, match=message):
    encode_tiled(model, np.zeros((1, 32, 32, 3)), tile=tile, overlap=overlap)
  with pytest.raises(ValueError, match=message):
    decode_tiled(model, np.zeros((1, 16, 16, 3)), tile=tile, overlap=overlap)


def test_pictures_and_latents_that_do_not_fit_are_refused():
  model = tiny()
  with pytest.raises(ValueError, match=r"33 x 40 pixels .* 2 x 2"):
    encode_tiled(model, np.zeros((1, 33, 40, 3), np.float32), tile=TILE, overlap=OVERLAP)
  with pytest.raises(ValueError, match=r"needs latents \[B,h,w,3\]"):
    decode_tiled(model, np.zeros((1, 3, 20, 20), np.float32), tile=TILE, overlap=OVERLAP)
