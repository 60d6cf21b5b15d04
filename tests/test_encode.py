"""Encoding: latents are a function of picture and seed; a stopped run resumes; no mixing."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from launch.encode import encode
from launch.engine import processes
from launch.evaluation import check_latents
from launch.evaluation.encoded_files import PARTS, Encoded
from lightningdit_jax.store import latents, shards
from tests.conftest import ROOT
from vavae_jax.common.errors import InputError
from vavae_jax.data.order import Share

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
  write_shard = shards.write_shard

  class Names(list):
    stop_at = ""

  names = Names()

  def write(path, *arrays):
    if path.name == names.stop_at:
      raise Stop
    names.append(path.name)
    write_shard(path, *arrays)

  monkeypatch.setattr(shards, "write_shard", write)
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


def test_another_source_is_encoded_whole(tokenizer, pictures, tmp_path):
  root = shutil.copytree(pictures, tmp_path / "pictures")
  other = encode(tokenizer, tmp_path / "store", source=f"folder:{root}", batch_size=8)
  assert len(other) == 72
  with pytest.raises(InputError, match="--held_out is for"):
    encode(tokenizer, tmp_path / "held_out", source=f"folder:{root}", held_out=True)


def test_pictures_that_moved_in_the_listing_are_refused(tokenizer, pictures, tmp_path, written):
  root = Path(shutil.copytree(pictures, tmp_path / "pictures"))
  settings = {"source": f"folder:{root}", "shard_size": 20, "batch_size": 8}
  written.stop_at = SHARDS[2]
  with pytest.raises(Stop):
    encode(tokenizer, tmp_path / "store", **settings)
  first = min(root.rglob("*.png"))
  first.rename(first.with_name("zzz.png"))
  with pytest.raises(InputError, match="begun with another listing"):
    encode(tokenizer, tmp_path / "store", **settings)


def test_a_shard_without_a_readable_picture_is_empty(tokenizer, pictures, tmp_path):
  root = Path(shutil.copytree(pictures, tmp_path / "pictures"))
  max(root.rglob("*.png")).write_bytes(b"no picture")
  found = encode(
    tokenizer, tmp_path / "store", source=f"folder:{root}", shard_size=71, max_corrupt=1
  )
  assert len(found) == 71
  check_latents.check(tmp_path / "store")


@pytest.mark.parametrize("sizes", [(4, 7), (9, 2), (3, 25), (25,)])
def test_parts_of_any_size_are_joined_to_the_same_shards(sizes, tmp_path):
  """Some were left by a run with other batches; of two that overlap one counts."""
  whole = np.arange(23 * 2 * 3 * 4, dtype=np.float32).reshape(23, 2, 3, 4)
  unreadable = {3, 10, 19, 20, 21, 22}
  for run, size in enumerate(sizes):
    encoded = Encoded(tmp_path, 23, 10, size)
    encoded.begin()
    parts = encoded.mine()
    for part in parts[:3] if run < len(sizes) - 1 else parts:
      rows = slice(part.start, part.stop)
      skipped = {i - part.start: f"{i}" for i in part if i in unreadable}
      encoded.add(part, dict.fromkeys(shards.SAMPLES, whole[rows]), np.arange(23)[rows], skipped)
  assert not encoded.mine()
  encoded.join()
  assert encoded.missing() == 0
  assert encoded.lost() == 6
  encoded.finish()
  assert not (tmp_path / PARTS).exists()
  opened = [shards.Shard(path) for path in encoded.paths]
  kept = [i for i in range(23) if i not in unreadable]
  assert np.concatenate([shard.labels for shard in opened]).tolist() == kept
  assert [shard.note.skipped for shard in opened] == [["3"], ["10", "19"], ["20", "21", "22"]]
  found = np.concatenate([shard.tensors["latents"] for shard in opened])
  np.testing.assert_array_equal(found, whole[kept].transpose(0, 3, 1, 2))


def test_a_slow_process_lets_no_more_pile_up_than_there_is_room_for(tmp_path, monkeypatch):
  """Parts that reach into a shard of the other process wait until this one joins it, at the end."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(processes, "first_does", lambda act: act())
  monkeypatch.setattr(processes, "wait_for_all", lambda: None)
  write_shard, used = shards.write_shard, []

  def write(*arguments):
    write_shard(*arguments)
    in_parts = sum(int(path.stem[10:]) for path in (tmp_path / PARTS).iterdir())
    used.append(48 - fast.missing() + in_parts)

  monkeypatch.setattr(shards, "write_shard", write)
  both = []
  for index in range(2):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    both.append(Encoded(tmp_path, 48, 4, 6))
    both[-1].begin()
  fast, slow = both
  room, parts = fast.room(), [range(start, start + 6) for start in range(0, 48, 6)]
  for encoded, mine in ((fast, parts[::2]), (slow, parts[1::2])):
    for part in mine:
      rows = np.zeros((6, 1, 1, 1), np.float32)
      encoded.add(part, dict.fromkeys(shards.SAMPLES, rows), np.zeros(6, int), {})
  slow.join()
  fast.join()
  assert 48 < max(used) <= room


@pytest.mark.parametrize("stray", ["lost", "foreign"])
def test_a_store_is_finished_of_its_own_shards_alone(store, stray, tmp_path):
  output = Path(shutil.copytree(store.path, tmp_path / "latents"))
  files = latents.shard_files(output)
  if stray == "lost":
    files[1].unlink()
  else:
    shutil.copy(files[0], output / "other.safetensors")
  with pytest.raises(InputError, match="should hold the shards of one encoding"):
    latents.finish_store(output, {}, 0, files)


def test_a_shard_of_another_store_is_refused(store, tokenizer, tmp_path):
  other = encode(tokenizer, tmp_path / "other", batch_size=8, shard_size=20, seed=1)
  output = Path(shutil.copytree(store.path, tmp_path / "latents"))
  shutil.copy(other.path / SHARDS[1], output / SHARDS[1])
  with pytest.raises(InputError, match=f"{SHARDS[1]} is not the shard that manifest"):
    latents.LatentStore(output)


def test_held_out_pictures_are_others(store, tokenizer, tmp_path):
  other = encode(tokenizer, tmp_path, batch_size=8, held_out=True)
  assert len(other) + len(store) == 72


def test_a_stopped_run_encodes_only_what_is_missing(
  store, tokenizer, tmp_path, written, monkeypatch
):
  """And asks for no room for the parts that it finds."""
  needed = []
  monkeypatch.setattr("launch.encode.check_free", lambda _, size, why: needed.append(size))
  written.stop_at = SHARDS[2]
  with pytest.raises(Stop):
    encode(tokenizer, tmp_path, batch_size=8, shard_size=20)
  with pytest.raises(InputError, match="was not finished"):
    latents.LatentStore(tmp_path)
  assert written == SHARDS[:2]
  there = sum(int(path.stem.partition("_")[2]) for path in (tmp_path / PARTS).iterdir())
  assert there == 25
  written.stop_at = ""
  encode(tokenizer, tmp_path, batch_size=8, shard_size=20)
  assert written == SHARDS
  assert contents(tmp_path) == contents(store.path)
  # At first: all, what is joined, and what reaches into two shards; then 25 in shards alone.
  assert needed[1] * (65 + 20 + 2 * 8) == needed[0] * 25


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


def size_of(store):
  return sum(file.stat().st_size for file in latents.shard_files(store.path))


def test_bfloat16_halves_a_store(store, tokenizer, tmp_path):
  half = encode(tokenizer, tmp_path, batch_size=8, shard_size=65, dtype="bfloat16")
  np.testing.assert_allclose(records(half), records(store), rtol=2**-8, atol=1e-3)
  assert size_of(half) < 0.6 * size_of(store)


def test_posteriors_give_the_samples_and_new_ones_each_epoch(store, tokenizer, tmp_path):
  posteriors = encode(tokenizer, tmp_path, batch_size=8, shard_size=20, moments=True)
  assert posteriors.has_posteriors
  opened = [shards.Shard(file) for file in latents.shard_files(tmp_path)]
  mean, std = (np.concatenate([s.tensors[n] for s in opened]) for n in ("mean", "std"))
  samples = np.stack([store[i]["latent"] for i in range(65)]).transpose(0, 3, 1, 2)
  noise = (samples - mean) / std
  assert abs(noise.mean()) < 0.05
  assert abs(noise.std() - 1) < 0.05
  # Over all samples that could be drawn, without drawing any.
  exact = np.sqrt(mean.var((0, 2, 3)) + np.square(std).mean((0, 2, 3)))
  np.testing.assert_allclose(posteriors.manifest["exact_std"], exact, rtol=0.01)
  share = Share(65)
  settings = {"seed": 0, "mean": store.mean, "std": store.std, "multiplier": 1.0}
  iterator = iter(latents.training_batches(posteriors, share, **settings))
  first, second = next(iterator), next(iterator)
  again = next(iter(latents.training_batches(posteriors, Share(65, start=1), **settings)))
  np.testing.assert_array_equal(second["latent"], again["latent"])
  assert not set(first["latent"][..., 0].ravel()) & set(second["latent"][..., 0].ravel())


def test_exact_statistics_are_those_of_all_latents(store):
  whole = np.stack([store[i]["latent"] for i in range(len(store))]).astype(np.float64)
  np.testing.assert_allclose(store.manifest["exact_mean"], whole.mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(store.manifest["exact_std"], whole.std((0, 1, 2), ddof=1), rtol=1e-12)


def test_pictures_that_cannot_be_read_are_left_out_and_noted(store, tokenizer, pictures, tmp_path):
  root = Path(shutil.copytree(pictures, tmp_path / "pictures"))
  source = f"folder:{root}"
  files = sorted(path for path in root.rglob("*.png"))
  plain = encode(tokenizer, tmp_path / "all", source=source, shard_size=20)
  bad = files[21]
  bad.write_bytes(b"no picture")
  with pytest.raises(InputError, match=f"max_corrupt allows 0.*{bad.name}"):
    encode(tokenizer, tmp_path / "some", source=source, shard_size=20)
  found = encode(tokenizer, tmp_path / "some", source=source, shard_size=20, max_corrupt=1)
  assert bad.name in found.manifest["skipped"][0]
  next((tmp_path / "some").glob("*shard003*")).unlink()
  with pytest.raises(InputError, match="max_corrupt allows 0"):
    encode(tokenizer, tmp_path / "some", source=source, shard_size=20)
  expected = np.delete(records(plain), [21, 72 + 21], axis=0)
  np.testing.assert_allclose(records(found), expected, rtol=0, atol=1e-4)


@pytest.fixture
def words(pipeline):
  """The command that encodes the pipeline's pictures, a shard for every few of them."""
  return [
    *("launch.encode", f"--workdir={pipeline / 'tokenizer'}"),
    *("--batch_size=4", "--shard_size=4"),
  ]


def test_killed_at_random_moments_it_ends_the_same(
  words, tokenizer, command, environment, tmp_path
):
  """KILLS sets how often; each takes a start of Python."""
  encode(tokenizer, tmp_path / "undisturbed", batch_size=4, shard_size=4)
  rng = np.random.default_rng(0)
  disturbed = tmp_path / "disturbed"
  # In a cache of their own, since a kill may leave half an entry.
  variables = environment | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
  kills = 0
  while kills < int(os.environ.get("KILLS", "3")):
    process = subprocess.Popen(
      [sys.executable, "-m", *words, f"--output={disturbed}"], cwd=ROOT, env=variables
    )
    before = len(list(disturbed.glob("*.safetensors")))
    while process.poll() is None and len(list(disturbed.glob("*.safetensors"))) == before:
      time.sleep(0.002)
    time.sleep(float(rng.exponential(0.05)))
    process.kill()
    process.wait()
    if (disturbed / latents.MANIFEST).exists():  # it was faster than the kill
      shutil.rmtree(disturbed)
    else:
      kills += 1
  # What a kill in the middle of a shard leaves.
  (disturbed / ".latents_rank00_shard016.safetensors.1.partial").mkdir()
  done = command(*words, f"--output={disturbed}")
  assert done.returncode == 0, done.stderr
  assert contents(disturbed) == contents(tmp_path / "undisturbed")


def test_the_check_finds_what_is_wrong_and_draws_what_is_right(store, tmp_path, capsys):
  output = Path(shutil.copytree(store.path, tmp_path / "latents"))
  check_latents.check(output)
  assert "is sound" in capsys.readouterr().out
  assert (tmp_path / "latents_check.png").stat().st_size > 1_000
  shard = output / SHARDS[1]
  data = bytearray(shard.read_bytes())
  data[-9] ^= 0x40  # a number, still finite
  shard.write_bytes(data)
  with pytest.raises(InputError, match=f"{SHARDS[1]} does not hold what was written"):
    check_latents.check(output)
  tensors = load_file(shard)
  tensors["labels"][0] = 12
  tensors["latents"][3, 0, 1, 2] = np.nan
  save_file(tensors, shard)
  with pytest.raises(InputError, match=r"1 numbers in latents that are not finite.*label 12"):
    check_latents.check(output)
