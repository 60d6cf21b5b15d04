"""The tokenizer's network against the reference case, and what holds at any size."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import cases
from tests.reference import procedural
from vavae_jax.autoencoder import Autoencoder, Posterior, preset
from vavae_jax.common import functional
from vavae_jax.convert import autoencoder_from_torch

TINY: dict[str, Any] = {
  "embed_dim": 3,
  "ch": 8,
  "ch_mult": (1, 2),
  "num_res_blocks": 1,
  "attn_resolutions": (8,),
  "resolution": 16,
  "norm_groups": 4,
}


def tiny(**kwargs) -> Autoencoder:
  model = functional.abstract(lambda rngs: Autoencoder(**(TINY | kwargs), rngs=rngs))
  return cases.random_weights(model)


@pytest.fixture(scope="module")
def reference():
  spec, weights, expected = cases.load("vae")
  model = autoencoder_from_torch(weights, embed_dim=spec["embed_dim"], **spec["ddconfig"])
  return model, expected


def test_posterior_matches_reference(reference):
  model, expected = reference
  image = np.tanh(cases.nhwc(procedural.normal("image", (2, 3, 32, 32))))
  posterior = jax.jit(Autoencoder.encode)(model, jnp.asarray(image))
  mean, logvar = np.split(cases.nhwc(expected["moments"]), 2, axis=-1)
  cases.assert_near(posterior.mean, mean, 1e-5)
  cases.assert_near(posterior.logvar, logvar, 1e-5)
  cases.assert_near(posterior.kl(), expected["kl"], 1e-5)
  noise = cases.nhwc(procedural.normal("eps", (2, 8, 8, 8)))
  cases.assert_near(posterior.sample(noise), cases.nhwc(expected["z"]), 1e-5)


def test_decoder_matches_reference(reference):
  model, expected = reference
  image = jax.jit(Autoencoder.decode)(model, jnp.asarray(cases.nhwc(expected["z"])))
  cases.assert_near(image, cases.nhwc(expected["decoded"]), 1e-5)


def test_logvar_is_clipped():
  moments = jnp.asarray([1.0, 2.0, -99.0, 99.0]).reshape(1, 1, 1, 4)
  posterior = Posterior.from_moments(moments)
  np.testing.assert_array_equal(posterior.logvar.ravel(), [-30, 20])
  np.testing.assert_array_equal(posterior.mode().ravel(), [1, 2])


def test_patches_are_folded_row_by_row():
  """patch_size=2 is patch_size=1 on images whose 2 x 2 pixels were moved into channels by hand."""
  folding = tiny(patch_size=2, ch_mult=(1,))
  _, weights = nnx.split(folding)
  graph, _ = nnx.split(tiny(in_channels=12, out_ch=12, resolution=8, ch_mult=(1,)))
  plain = nnx.merge(graph, weights)
  image = procedural.normal("image", (3, 4, 6, 3))
  folded = np.concatenate([image[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-1)

  @jax.jit
  def there_and_back(model, image):
    z = model.encode(image).mode()
    return z, model.decode(z)

  z, decoded = there_and_back(folding, image)
  assert folding.downsampling == 2
  assert z.shape == (3, 2, 3, 3)
  assert decoded.shape == image.shape
  expected_z, expected = there_and_back(plain, folded)
  cases.assert_near(z, expected_z, 1e-5)
  for part, (i, j) in zip(np.split(expected, 4, axis=-1), np.ndindex(2, 2), strict=True):
    cases.assert_near(decoded[:, i::2, j::2], part, 1e-5)


def test_the_shortcut_is_linear_and_stays_in_its_cell():
  """What it adds to the same weights without it, there and back."""
  long = tiny(linear_shortcut=True)
  short = tiny(linear_shortcut=True)
  short.shortcut_in = short.shortcut_out = None
  image = procedural.normal("image", (3, 4, 6, 3))
  z = procedural.normal("z", (3, 2, 3, 3))

  @jax.jit
  def added(image, z):
    return long.encode(image).mean - short.encode(image).mean, long.decode(z) - short.decode(z)

  (moments, pixels), (moments_2, pixels_2) = added(image, z), added(2 * image, 2 * z)
  moments_0, pixels_0 = added(0 * image, 0 * z)
  cases.assert_near(moments_2 - moments, moments - moments_0, 1e-4)
  cases.assert_near(pixels_2 - pixels, pixels - pixels_0, 1e-4)
  image[1, 2:, 2:4] += 1
  z[1, 1, 1] += 1
  near, cell = (np.asarray(a) for a in added(image, z))
  moved = np.abs(near - moments).max(axis=-1) > 1e-3
  np.testing.assert_array_equal(np.argwhere(moved), [[1, 1, 1]])
  moved = np.abs(cell - pixels).max(axis=-1) > 1e-3
  assert moved[1, 2:, 2:4].all()
  assert moved.sum() == 4


def test_without_the_final_norm_the_last_layers_see_what_the_blocks_give():
  model = tiny(final_norm=False, ch_mult=(1,))
  assert model.encoder.norm_out is model.decoder.norm_out is None

  @jax.jit
  def found(image, z):
    down, up = model.encoder.down[0], model.decoder.up[0]
    encoded = model.encoder.mid(down(model.encoder.conv_in(image)))
    decoded = up(model.decoder.mid(model.decoder.conv_in(z)))
    return (model.encoder.trunk(image), model.decoder.trunk(z)), (encoded, decoded)

  image, z = procedural.normal("image", (1, 4, 6, 3)), procedural.normal("z", (1, 2, 3, 3))
  jax.tree.map(np.testing.assert_array_equal, *found(image, z))


def test_an_image_depends_on_itself_only():
  model = tiny(ch_mult=(1,))
  image = jnp.asarray(procedural.normal("image", (3, 4, 6, 3)))
  gradient = jax.grad(lambda x: model.decode(model.encode(x).mode())[1].sum())
  grad = jax.jit(gradient)(image)
  assert jnp.abs(grad[1]).max() > 0
  np.testing.assert_array_equal(grad[jnp.array([0, 2])], 0)


def test_attention_is_placed_by_the_nominal_resolution():
  model = tiny(resolution=32, patch_size=4)
  assert [len(level.attn) for level in model.encoder.down] == [1, 0]
  assert [len(level.attn) for level in model.decoder.up] == [2, 0]


def test_bfloat16_stays_near_float32():
  image = jnp.asarray(np.tanh(procedural.normal("image", (3, 4, 6, 3))))
  results = []
  for dtype in (jnp.float32, jnp.bfloat16):
    model = tiny(dtype=dtype)
    results.append(jax.jit(lambda x, model=model: model.decode(model.encode(x).mode()))(image))
  exact, rounded = results
  assert rounded.dtype == jnp.float32
  assert rounded.shape == image.shape
  cases.assert_near(rounded, exact, 0.05)


def test_blocks_that_are_computed_again_keep_less_and_change_nothing():
  _, weights = nnx.split(tiny(ch_mult=(1,), attn_resolutions=(16,)))
  image = jnp.asarray(np.tanh(procedural.normal("image", (3, 8, 12, 3))))
  bytes_kept, gradients = [], []
  for use_checkpoint in (False, True):
    graph, _ = nnx.split(tiny(ch_mult=(1,), attn_resolutions=(16,), use_checkpoint=use_checkpoint))

    def loss(weights, graph=graph):
      model = nnx.merge(graph, weights)
      return jnp.sum(model.decode(model.encode(image).mode()) ** 2)

    backward = jax.eval_shape(lambda weights, loss=loss: jax.vjp(loss, weights)[1], weights)
    bytes_kept.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward)))
    gradients.append(jax.tree.leaves(jax.jit(jax.grad(loss))(weights)))
  assert bytes_kept[1] < bytes_kept[0] / 2
  for plain, recomputed in zip(*gradients, strict=True):
    # The floor is for keys' biases, which change nothing.
    cases.assert_near(recomputed, plain, 1e-5, floor=1e-5)


def test_the_decoder_may_have_attention_elsewhere():
  model = tiny(decoder_attn_resolutions=(16,))
  assert [len(level.attn) for level in model.encoder.down] == [0, 1]
  assert [len(level.attn) for level in model.decoder.up] == [2, 0]


@pytest.mark.parametrize(
  ("name", "num_weights", "factor", "encoder_attention", "decoder_attention"),
  [
    ("", 69_836_067, 16, 2, 3),
    ("f16d16", 69_610_963, 16, 2, 3),
    ("f16d32", 69_836_067, 16, 2, 3),
    ("f16d64", 70_293_955, 16, 2, 3),
    ("sd_f8d4", 83_653_863, 8, 0, 0),
    ("mar_f16d16", 66_456_019, 16, 2, 0),
  ],
)
def test_presets_are_the_published_networks(
  name, num_weights, factor, encoder_attention, decoder_attention
):
  """Weights as the PyTorch modules count them; "" stands for the defaults."""
  kwargs = preset(name) if name else {}
  model = functional.abstract(lambda rngs: Autoencoder(**kwargs, rngs=rngs))
  assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))) == num_weights
  assert model.downsampling == factor
  assert (name or "f16d32").endswith(f"f{factor}d{model.embed_dim}")
  assert sum(len(level.attn) for level in model.encoder.down) == encoder_attention
  assert sum(len(level.attn) for level in model.decoder.up) == decoder_attention


def test_an_unknown_preset_lists_the_known():
  with pytest.raises(ValueError, match=r"'f16d31'; choose one of f16d16, f16d32, .*mar_f16d16"):
    preset("f16d31")


@pytest.mark.parametrize("name", ["f16d32", "sd_f8d4", "mar_f16d16"])
def test_any_multiple_of_the_factor_goes_there_and_back(name):
  narrow = preset(name) | {"embed_dim": 3, "ch": 4, "num_res_blocks": 1, "norm_groups": 2}
  model = functional.abstract(lambda rngs: Autoencoder(**narrow, rngs=rngs))
  factor = model.downsampling
  image = jax.ShapeDtypeStruct((3, 3 * factor, 5 * factor, 3), jnp.float32)
  z = nnx.eval_shape(lambda model, image: model.encode(image).mode(), model, image)
  assert z.shape == (3, 3, 5, 3)
  assert nnx.eval_shape(lambda model, z: model.decode(z), model, z).shape == image.shape


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"norm_groups": 5}, "norm_groups=5"),
    ({"double_z": False}, "double_z"),
    ({"dropout": 0.1}, "dropout=0.1"),
  ],
)
def test_arguments_that_cannot_be_built_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    tiny(**kwargs)


def test_images_and_latents_that_do_not_fit_are_refused():
  model = tiny(patch_size=2)
  with pytest.raises(ValueError, match=r"8 x 10 pixels .* 4 x 4"):
    model.encode(jnp.zeros((3, 8, 10, 3)))
  with pytest.raises(ValueError, match=r"channels last, but got \(3, 3, 8, 12\)"):
    model.encode(jnp.zeros((3, 3, 8, 12)))
  with pytest.raises(ValueError, match=r"channels last, but got \(3, 3, 4, 6\)"):
    model.decode(jnp.zeros((3, 3, 4, 6)))
