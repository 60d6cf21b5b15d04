"""The latent store: the published layout, ours, statistics, flips, damage."""

from __future__ import annotations

import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lightningdit_jax.store import latents, shards
from tests import cases
from vavae_jax.common.errors import InputError
from vavae_jax.data.order import Share

PUBLISHED = cases.FOLDER / "formats" / "latents"


@pytest.fixture
def store(tmp_path):
  """Two shards of 5 and 3 records, 2 x 3 with 4 channels."""
  rng = np.random.default_rng(0)
  plain, flipped = rng.normal(3, 2, (2, 8, 2, 3, 4)).astype(np.float32)
  for i, part in enumerate((slice(0, 5), slice(5, 8))):
    path = tmp_path / f"latents_rank00_shard{i:03d}.safetensors"
    samples = {"latents": plain[part], "latents_flip": flipped[part]}
    shards.write_shard(path, samples, np.arange(8)[part], [])
  latents.finish_store(tmp_path, {"source": "here"}, 0, latents.shard_files(tmp_path))
  return tmp_path, plain, flipped


def test_published_files_read_as_they_are():
  found = latents.LatentStore(PUBLISHED)
  shards = [load_file(path) for path in sorted(PUBLISHED.glob("*.safetensors"))]
  expected = np.concatenate([shard["latents"] for shard in shards])
  assert len(found) == len(expected)
  for i in (0, len(found) - 1):
    np.testing.assert_array_equal(found[i]["latent"], expected[i].transpose(1, 2, 0))
  np.testing.assert_allclose(found.mean, expected.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.std, expected.std((0, 2, 3), ddof=1), rtol=1e-5)


def test_what_is_written_is_read(store):
  path, plain, flipped = store
  found = latents.LatentStore(path)
  assert (len(found), found.shape, found.manifest["records"]) == (8, (2, 3, 4), 8)
  for i in range(8):
    np.testing.assert_array_equal(found[i]["latent"], plain[i])
    np.testing.assert_array_equal(found.record(i, flip=True)["latent"], flipped[i])
    assert found[i]["label"] == i
  np.testing.assert_allclose(found.std, plain.std((0, 1, 2), ddof=1), rtol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("labels", [np.uint8, np.int16, np.uint64])
def test_other_floats_and_integers_are_converted(dtype, labels, tmp_path):
  latent = np.linspace(-2, 2, 3 * 4 * 2 * 3).reshape(3, 4, 2, 3).astype(dtype)
  tensors = {"latents": latent, "latents_flip": latent, "labels": np.array([0, 7, 3], labels)}
  save_file(tensors, tmp_path / "a.safetensors")
  ones = np.ones((1, 4, 1, 1), np.float32)
  save_file({"mean": 0 * ones, "std": ones}, tmp_path / latents.STATISTICS)
  store = latents.LatentStore(tmp_path)
  expected = latent[1].transpose(1, 2, 0).astype(np.float32)
  np.testing.assert_array_equal(store[1]["latent"], expected, strict=True)
  assert store.labels.tolist() == [0, 7, 3]


@pytest.mark.parametrize(("value", "flip"), [(np.nan, False), (np.inf, True), (-np.inf, False)])
def test_numbers_that_are_not_finite_are_named_where_they_are_read(store, value, flip):
  path, _, _ = store
  shard = path / "latents_rank00_shard001.safetensors"
  tensors = {name: np.array(x) for name, x in load_file(shard).items()}
  tensors[shards.SAMPLES[flip]][2, 1, 0, 0] = value
  tensors[shards.SAMPLES[flip]][1] = 3e38  # whose sum is not finite either
  (path / "manifest.json").unlink()
  save_file(tensors, shard)
  found = latents.LatentStore(path)
  latent = np.empty((8, 2, 3, 4), np.float32)
  found.read(np.arange(8), np.full(8, not flip), out=latent)
  with pytest.raises(InputError, match=r"shard001\.safetensors .* not finite, in its record 2"):
    found.read(np.arange(8), np.full(8, flip), out=latent)


def test_normalise_and_back(store):
  found = latents.LatentStore(store[0])
  there = latents.normalise(store[1], found.mean, found.std, 0.5)
  np.testing.assert_allclose(there.std((0, 1, 2), ddof=1), 0.5, rtol=1e-5)
  back = latents.denormalise(there, found.mean, found.std, 0.5)
  np.testing.assert_allclose(back, store[1], atol=1e-5)


def test_without_latent_norm_values_stay(store):
  mean, std = latents.statistics(latents.LatentStore(store[0]), latent_norm=False)
  np.testing.assert_array_equal(latents.normalise(store[1], mean, std), store[1])


def batches(path, seed, count=6):
  found = latents.LatentStore(path)
  data = latents.training_batches(
    found, Share(4), seed=seed, mean=found.mean, std=found.std, multiplier=1.0
  )
  iterator = iter(data)
  return [next(iterator) for _ in range(count)], iterator


def test_flips_are_chosen_by_the_seed(store):
  path, plain, _ = store
  found = latents.LatentStore(path)
  same, again, other = (batches(path, seed)[0] for seed in (1, 1, 2))
  for a, b in zip(same, again, strict=True):
    np.testing.assert_array_equal(a["latent"], b["latent"])
  assert not all(np.array_equal(a["latent"], b["latent"]) for a, b in zip(same, other, strict=True))
  unflipped = [
    np.allclose(x, latents.normalise(plain[label], found.mean, found.std))
    for batch in same
    for x, label in zip(batch["latent"], batch["label"], strict=True)
  ]
  assert 0 < sum(unflipped) < len(unflipped)


def test_the_iterator_continues_from_its_state(store):
  _, iterator = batches(store[0], 1, count=3)
  state = iterator.get_state()
  expected = next(iterator)["latent"]
  _, fresh = batches(store[0], 1, count=1)
  fresh.set_state(state)
  np.testing.assert_array_equal(next(fresh)["latent"], expected)


@pytest.mark.parametrize(
  "damage", ["no shards", "no statistics", "cut", "deep", "records", "shapes", "channels"]
)
def test_damage_is_named(store, damage):
  path = store[0]
  shard = path / "latents_rank00_shard001.safetensors"
  if damage == "no shards":
    shutil.rmtree(path)
  elif damage == "no statistics":
    (path / latents.STATISTICS).unlink()
  elif damage == "cut":
    shard.write_bytes(shard.read_bytes()[:-9])
  elif damage == "deep":
    shard.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5)
  elif damage == "records":
    (path / latents.MANIFEST).write_text('{"records": "4"}')
  else:
    shape = (2, 3, 3, 4) if damage == "shapes" else (2, 2, 3, 5)
    samples = {name: np.zeros(shape, np.float32) for name in shards.SAMPLES}
    shards.write_shard(shard, samples, np.zeros(2), [])
  latents._open.cache_clear()
  with pytest.raises(InputError, match=str(path)):
    latents.LatentStore(path)
