"""PyTorch state dicts in and out: the same bytes, and nothing that does not fit."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from lightningdit_jax import convert
from lightningdit_jax.positions import position_embedding
from tests import cases
from vavae_jax.convert import (
  autoencoder_from_torch,
  autoencoder_to_torch,
  discriminator_from_torch,
  discriminator_to_torch,
)

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
