"""PyTorch state dicts in and out: the same bytes, and nothing that does not fit."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from lightningdit_jax import convert
from lightningdit_jax.positions import position_embedding
from tests import cases
from vavae_jax.autoencoder import Autoencoder, preset
from vavae_jax.common import functional
from vavae_jax.convert import (
  autoencoder_from_torch,
  autoencoder_to_torch,
  discriminator_from_torch,
  discriminator_to_torch,
)
from vavae_jax.weights import state_dicts

DIT = ("dit_default", "dit_variant", "dit_qknorm_rms")


def converters(name: str):
  """(from PyTorch, to PyTorch, procedural weights) of a case."""
  spec, weights, _ = cases.load(name)
  if name == "vae":
    kwargs = spec["ddconfig"] | {"embed_dim": spec["embed_dim"]}
    return functools.partial(autoencoder_from_torch, **kwargs), autoencoder_to_torch, weights
  if name == "patchgan":
    return discriminator_from_torch, discriminator_to_torch, weights
  return functools.partial(convert.from_torch, **spec["config"]), convert.to_torch, weights


@pytest.mark.parametrize("name", [*DIT, "vae", "patchgan"])
def test_round_trip_gives_the_same_bytes(name):
  from_torch, to_torch, weights = converters(name)
  back = to_torch(from_torch(weights))
  computed = {key for key in back if key.startswith(("pos_embed", "feat_rope."))}
  assert set(back) - computed == set(weights)
  for key, value in weights.items():
    assert back[key].dtype == value.dtype
    assert back[key].flags.c_contiguous
    np.testing.assert_array_equal(back[key], value)


def test_positions_are_written_and_read_back():
  from_torch, to_torch, weights = converters("dit_default")
  back = to_torch(from_torch(weights))
  np.testing.assert_array_equal(back["pos_embed"], position_embedding(8, 8, 48)[None])
  assert back["feat_rope.freqs_cos"].shape == back["feat_rope.freqs_sin"].shape == (64, 12)
  again = to_torch(from_torch(back))
  assert all(np.array_equal(again[key], back[key]) for key in back)


@pytest.mark.parametrize("name", ["dit_default", "vae", "patchgan"])
def test_what_does_not_fit_is_listed(name):
  from_torch, _, weights = converters(name)
  missing, misshapen, damaged, *_ = (key for key in weights if key.endswith("weight"))
  bad = weights | {
    "stranger.weight": np.zeros(3, np.float32),
    misshapen: weights[misshapen][..., :1],
    damaged: np.where(np.arange(weights[damaged].size) == 0, np.nan, 1).reshape(
      weights[damaged].shape
    ),
  }
  del bad[missing]
  with pytest.raises(ValueError, match="does not fit") as error:
    from_torch(bad)
  message = str(error.value)
  for kind, key in [
    ("unknown", "stranger.weight"),
    ("missing", missing),
    (
      "of another shape",
      f"{misshapen} {bad[misshapen].shape} instead of {weights[misshapen].shape}",
    ),
    ("not finite", damaged),
  ]:
    assert f"{kind}: {key}" in message


@pytest.mark.parametrize("change", ["another grid", "other values"])
def test_positions_of_another_model_are_refused(change):
  from_torch, _, weights = converters("dit_default")
  foreign = position_embedding(4, 4, 48) if change == "another grid" else np.zeros((64, 48))
  with pytest.raises(ValueError, match=r"of another (shape|value).*: pos_embed"):
    from_torch(weights | {"pos_embed": foreign[None]})


def test_prefix_of_data_parallelism_is_dropped():
  from_torch, to_torch, weights = converters("dit_default")
  back = to_torch(from_torch({f"module.{key}": value for key, value in weights.items()}))
  assert all(np.array_equal(back[key], value) for key, value in weights.items())


def test_what_only_training_used_is_left_aside():
  from_torch, to_torch, weights = converters("vae")
  foreign = ("loss.logvar", "foundation_model.model.cls_token", "linear_proj.weight")
  back = to_torch(from_torch(weights | {key: np.zeros(1) for key in foreign}))
  assert set(back) == set(weights)


def narrow(name: str, **kwargs) -> tuple[dict, dict]:
  """(arguments, state dict) of a preset with 4 channels."""
  kwargs = preset(name) | {"ch": 4, "norm_groups": 2} | kwargs
  model = functional.abstract(lambda rngs: Autoencoder(**kwargs, rngs=rngs))
  return kwargs, autoencoder_to_torch(cases.random_weights(model))


def test_sd_vae_has_the_names_of_latent_diffusion():
  kwargs, weights = narrow("sd_f8d4")
  shapes = {name: value.shape for name, value in weights.items()}
  assert len(shapes) == 248
  assert not any(".attn." in name for name in shapes)
  for name, shape in [
    ("encoder.down.1.block.0.nin_shortcut.weight", (8, 4, 1, 1)),
    ("encoder.down.2.downsample.conv.weight", (16, 16, 3, 3)),
    ("encoder.mid.attn_1.q.weight", (16, 16, 1, 1)),
    ("decoder.mid.attn_1.proj_out.bias", (16,)),
    ("decoder.up.0.block.0.nin_shortcut.weight", (4, 8, 1, 1)),
    ("decoder.up.3.upsample.conv.weight", (16, 16, 3, 3)),
    ("quant_conv.weight", (8, 8, 1, 1)),
    ("post_quant_conv.weight", (4, 4, 1, 1)),
  ]:
    assert shapes[name] == shape
  back = autoencoder_to_torch(autoencoder_from_torch(weights, **kwargs))
  assert all(np.array_equal(back[name], value) for name, value in weights.items())


def test_a_tokenizer_of_another_kind_is_refused():
  """MAR-VAE and f16d16 differ in the decoder's attention alone."""
  two_levels = {"ch_mult": (1, 1), "resolution": 32}
  mar, mar_weights = narrow("mar_f16d16", **two_levels)
  plain, plain_weights = narrow("f16d16", **two_levels)
  with pytest.raises(ValueError, match=r"missing: decoder\.up\.1\.attn\.0"):
    autoencoder_from_torch(mar_weights, **plain)
  with pytest.raises(ValueError, match=r"unknown: decoder\.up\.1\.attn\.0"):
    autoencoder_from_torch(plain_weights, **mar)


@pytest.mark.parametrize("average", ["ema", "model_ema", "params_ema", "EMA_0.9999", "a.ema"])
def test_an_average_is_known_by_a_word_of_its_name(average):
  found = [state_dicts.Place((where,), "", {}) for where in ("schema", average)]
  assert state_dicts.choose(found, average=True).where == average
  assert state_dicts.choose(found, average=False).where == "schema"
