"""Cached features are the teacher's own of each picture, and are computed once."""

from __future__ import annotations

import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

import vavae_jax.training
from configs import quickstart
from launch import cached_features, tasks
from launch.engine.configuration import claim_workdir
from launch.engine.ownership import owned
from launch.train import train
from tests.test_tokenizer_training import TinyNetwork, configuration
from vavae_jax import frozen, training
from vavae_jax.common.errors import InputError
from vavae_jax.data import feature_cache, images, selection
from vavae_jax.teachers.enlarged import Centred


def test_another_configuration_is_seen_before_features_are_made(tmp_path, monkeypatch):
  monkeypatch.setattr(cached_features, "make", lambda config: pytest.fail("features are made"))
  config = quickstart.tokenizer(tiny=True)
  config.data.update(crop="center", flip=False)
  config.teacher.cache = str(tmp_path / "features")
  claim_workdir(tmp_path, tasks.resolve(config))
  config.optimizer.b1 = 0.75
  with pytest.raises(InputError, match=r"b1: 0\.9 there, 0\.75 now"):
    train(config, tmp_path)


@pytest.fixture
def cached(pictures, tmp_path, monkeypatch):
  tiny = TinyNetwork(nnx.Rngs(3))
  monkeypatch.setattr(frozen, "_networks", lambda config: {"teacher": tiny})
  monkeypatch.setattr(vavae_jax.training, "check", lambda config: None)
  monkeypatch.setattr(feature_cache, "BATCH", 5)
  config = configuration(
    **{
      "batch_size": 3,
      "data.source": f"folder:{pictures}",
      "data.crop": "center",
      "teacher.cache": str(tmp_path / "cache"),
    }
  )
  return config, tiny


def test_features_go_with_their_pictures(cached, monkeypatch):
  config, tiny = cached
  cached_features.make(config)
  config = FrozenConfigDict(config.to_dict() | {"batch_size": 6})
  shares = np.arange(6).reshape(3, 2).T
  batches = [next(iter(training.train_data(config, rows, 0))) for rows in shares]
  for batch in batches:
    expected = jax.jit(lambda image: tiny(images.to_float(image)))(batch["image"])
    np.testing.assert_allclose(batch["features"], expected, rtol=2e-3, atol=2e-3)
  # Made once: a second call has nothing to do, and another size is another file.
  monkeypatch.setattr(feature_cache, "teacher_of", pytest.fail)
  cached_features.make(config)
  source, indices = selection.training_pictures(config)
  with pytest.raises(InputError, match="There are no features of these pictures and weights in"):
    feature_cache.open_cache(config, source, indices[1:])


def test_centred_features_have_no_mean_on_disk_or_off(cached, monkeypatch):
  config, tiny = cached
  config = FrozenConfigDict(config.to_dict() | {"teacher": {**config.teacher, "centre": True}})
  monkeypatch.setattr(frozen, "_networks", lambda config: {"teacher": Centred(tiny)})
  cached_features.make(config)
  source, indices = selection.training_pictures(config)
  found = feature_cache.open_cache(config, source, indices)[np.arange(len(indices))]
  np.testing.assert_allclose(found.mean((0, 1, 2), dtype=float), 0, atol=1e-3)
  networks = frozen.merge(config, training.load_frozen(config))
  image = images.load_crops(source, indices, config.data.image_size)
  expected = jax.jit(lambda image: networks["teacher"](images.to_float(image)))(image)
  np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)
  config = FrozenConfigDict(config.to_dict() | {"teacher": {**config.teacher, "cache": ""}})
  with pytest.raises(InputError, match=r"config\.teacher\.centre takes off the mean"):
    feature_cache.check(config)


def test_changed_pictures_have_other_features(cached):
  config, _ = cached
  source, indices = selection.training_pictures(config)
  before = feature_cache.place_of(config, source, indices)
  os.utime(source.name(0), ns=(1, 1))
  assert feature_cache.place_of(config, source, indices) != before


def test_one_training_at_a_time_makes_them(cached):
  config, _ = cached
  path = feature_cache.place_of(config, *selection.training_pictures(config))
  with owned(path, beside=True), pytest.raises(InputError, match="is being written by"):
    cached_features.make(config)
  (left := path.with_name(f".{path.name}.1.partial")).mkdir(parents=True)
  cached_features.make(config)
  assert path.is_file()
  assert not left.exists()
  with owned(path, beside=True):
    cached_features.make(config)  # they are there


def test_a_build_that_was_stopped_goes_on(cached, tmp_path, monkeypatch):
  config, _ = cached
  load, loaded = images.load_crops, []

  def stop(source, indices, size):
    loaded.append(len(indices))
    if len(loaded) == 2:
      raise KeyboardInterrupt
    return load(source, indices, size)

  monkeypatch.setattr(images, "load_crops", stop)
  with pytest.raises(KeyboardInterrupt):
    cached_features.make(config)
  (left,) = (tmp_path / "cache").iterdir()
  assert [path.name for path in left.iterdir()] == ["000000000_5.npy"]
  cached_features.make(config)
  assert sum(loaded) == len(selection.training_pictures(config)[1]) + 5
  assert not left.exists()


def test_a_disk_that_is_too_small_is_named_before_anything_is_written(
  cached, tmp_path, monkeypatch
):
  config, _ = cached
  monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
  with pytest.raises(InputError, match=r"0\.00 MiB free.* give another config\.teacher\.cache"):
    cached_features.make(config)
  assert not (tmp_path / "cache").exists()


def test_random_crops_have_no_cache(cached):
  config = configuration(**{"teacher.cache": "somewhere"})
  with pytest.raises(InputError, match=r'set config\.data\.crop to "center"'):
    feature_cache.check(config)
