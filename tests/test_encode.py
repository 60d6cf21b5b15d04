"""Encoding: latents are a function of picture and seed; a stopped run goes on; no mixing."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from launch.encode import encode
from lightningdit_jax import latents
from vavae_jax.errors import InputError

SHARDS = [f"latents_rank00_shard{i:03d}.safetensors" for i in range(4)]


def records(store):
  """All latents of a store and all mirrored ones, [2 n, h, w, Z]."""
  return np.stack(
    [store.record(i, flip=flip)["latent"] for flip in (False, True) for i in range(len(store))]
  )


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


class Stop(Exception):
  """What stands for a kill."""


@pytest.fixture
def written(monkeypatch):
  """Names of the shards that are written; a shard called `written.stop_at` is not, and ends it."""
  write_shard = latents.write_shard

  class Names(list):
    stop_at = ""

  names = Names()

  def write(path, *arrays):
    if path.name == names.stop_at:
      raise Stop
    names.append(path.name)
    write_shard(path, *arrays)

  monkeypatch.setattr(latents, "write_shard", write)
  return names


@pytest.fixture(scope="module")
def store(tokenizer, tmp_path_factory):
  """65 pictures in shards of 20."""
  return encode(tokenizer, tmp_path_factory.mktemp("store"), batch_size=8, shard_size=20)


def test_store_has_every_training_picture_once(store, tokenizer):
  assert sorted(path.name for path in store.path.glob("latents_rank*")) == SHARDS
  assert len(store) == 65
  assert store.shape == (4, 4, tokenizer.config.model.embed_dim)
  assert set(store.labels) == set(range(9))


def test_latents_do_not_depend_on_batches_and_shards(store, tokenizer, tmp_path):
  other = encode(tokenizer, tmp_path, batch_size=3, shard_size=65)
  assert len(list(tmp_path.glob("latents_rank*"))) == 1
  # Convolutions of other shapes sum in another order.
  np.testing.assert_allclose(records(other), records(store), rtol=0, atol=1e-4)
  np.testing.assert_array_equal(other.labels, store.labels)


def test_another_seed_gives_other_samples_of_the_same_posteriors(store, tokenizer, tmp_path):
  other = encode(tokenizer, tmp_path, batch_size=8, shard_size=65, seed=1)
  difference = records(other) - records(store)
  assert np.abs(difference).mean() > 0.1
  assert abs(difference.mean()) < 0.05


def test_held_out_pictures_are_others(store, tokenizer, tmp_path):
  other = encode(tokenizer, tmp_path, batch_size=8, held_out=True)
  assert len(other) + len(store) == 72


def test_a_stopped_run_encodes_only_what_is_missing(store, tokenizer, tmp_path, written):
  written.stop_at = SHARDS[2]
  with pytest.raises(Stop):
    encode(tokenizer, tmp_path, batch_size=8, shard_size=20)
  with pytest.raises(InputError, match="was not finished"):
    latents.LatentStore(tmp_path)
  assert written == SHARDS[:2]
  written.stop_at = ""
  encode(tokenizer, tmp_path, batch_size=8, shard_size=20)
  assert written == SHARDS
  assert contents(tmp_path) == contents(store.path)


@pytest.mark.parametrize(
  ("settings", "named"), [({"seed": 5}, "seed"), ({"held_out": True}, "held_out")]
)
def test_a_folder_begun_with_other_settings_is_refused(store, tokenizer, settings, named):
  before = contents(store.path)
  with pytest.raises(InputError, match=f"begun with another {named}"):
    encode(tokenizer, store.path, shard_size=20, **settings)
  assert contents(store.path) == before


def test_a_folder_of_another_tokenizer_is_refused(store, tokenizer):
  before = contents(store.path)
  other = dataclasses.replace(tokenizer, params=jax.tree.map(lambda x: x + 1, tokenizer.params))
  with pytest.raises(InputError, match="begun with another tokenizer"):
    encode(other, store.path, shard_size=20)
  assert contents(store.path) == before


def test_a_tokenizer_that_moved_is_still_the_same(store, tokenizer, tmp_path):
  output = Path(shutil.copytree(store.path, tmp_path / "latents"))
  moved = encode(dataclasses.replace(tokenizer, workdir=Path("/moved")), output, shard_size=20)
  assert moved.manifest["tokenizer"] == store.manifest["tokenizer"] | {"workdir": "/moved"}
  assert moved.sha256 == store.sha256


def test_a_store_that_was_copied_in_part_is_refused(store, tmp_path):
  output = Path(shutil.copytree(store.path, tmp_path / "latents"))
  (output / SHARDS[-1]).unlink()
  with pytest.raises(InputError, match=r"has 60 of the 65 latents"):
    latents.LatentStore(output)


def test_a_folder_of_foreign_latents_is_refused(tokenizer, tmp_path):
  (tmp_path / "latents_rank00_shard000.safetensors").write_bytes(b"published")
  with pytest.raises(InputError, match=r"launch\.encode did not write"):
    encode(tokenizer, tmp_path)
  assert len(contents(tmp_path)) == 1
