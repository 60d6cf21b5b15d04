"""Sampling: a sample is a function of seed and index; a stopped run resumes; labels."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

from launch import restore, sample
from launch.engine.configuration import claim_folder
from launch.engine.parts import ROWS, Parts, write_rows
from launch.evaluation.sample_files import contact_sheet, read_samples, write_npz
from lightningdit_jax.store import space
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError


def settings(diffusion, **changes):
  return FrozenConfigDict(ConfigDict(diffusion.config.sample.to_dict() | changes))


def sampler(diffusion, tokenizer, settings, seed, guide=None):
  """A model's sampler, from indices and labels to pictures."""
  devices = mesh.make_mesh()
  space = restore.space_of(diffusion)
  run = sample.make_sampler(diffusion.config, space, tokenizer, settings, seed, devices, guide)
  return functools.partial(run, diffusion.params)


class Stop(Exception):
  """What stands for a kill."""


@pytest.fixture
def batches(monkeypatch):
  """The indices of the batches that are computed; after `batches.limit` of them it ends."""
  make_sampler = sample.make_sampler

  class Batches(list):
    limit = 100

  seen = Batches()

  def make(*arguments):
    sampler = make_sampler(*arguments)

    def run(params, index, label):
      if len(seen) == seen.limit:
        raise Stop
      seen.append(index.tolist())
      return sampler(params, index, label)

    return run

  monkeypatch.setattr(sample, "make_sampler", make)
  return seen


def test_samples_that_are_not_finite_are_refused_and_no_black_pictures(diffusion, tokenizer):
  run = sampler(diffusion, tokenizer, settings(diffusion, batch_size=4), 0)
  far = jax.tree.map(lambda x: x * 1e30, diffusion.params)
  with pytest.raises(InputError, match="3 of 3 samples have numbers that are not finite"):
    run.func(far, np.arange(3), np.arange(3))


def test_another_guidance_compiles_nothing(diffusion, tokenizer, caplog):
  """Unless it is none, which takes half of the work."""
  given = functools.partial(settings, diffusion, batch_size=3, num_steps=3)
  first, other, everywhere, none = (
    given(cfg_scale=scale, cfg_interval_start=start)
    for scale, start in ((2.0, 0.1), (5.0, 0.6), (2.0, 0.0), (1.0, 0.1))
  )
  index = np.arange(3)
  run = sampler(diffusion, tokenizer, first, 0)
  run(index, index)
  with jax.log_compiles():
    drawn = run(index, index, other)
  assert "Compiling" not in caplog.text
  np.testing.assert_array_equal(sampler(diffusion, tokenizer, other, 0)(index, index), drawn)
  assert sample.program_of(first) == sample.program_of(other)
  assert len({*map(sample.program_of, (first, everywhere, none))}) == 3


def test_a_sample_does_not_depend_on_its_batch(diffusion, tokenizer):
  index, label = np.arange(11), np.arange(11) % 9
  by_4, by_9 = (
    sampler(diffusion, tokenizer, settings(diffusion, batch_size=size), 0) for size in (4, 9)
  )
  a, b = by_4(index, label), by_9(index, label)
  assert a.shape == (11, 64, 64, 3)
  # Rounding of float32 may move a value over the border between two of 256.
  assert np.abs(a.astype(int) - b).max() <= 1
  # A part of the set, in another order.
  c = by_9(index[[7, 2]], label[[7, 2]])
  assert np.abs(c.astype(int) - a[[7, 2]]).max() <= 1
  assert np.abs(a[0].astype(int) - a[9]).max() > 1  # other noise, the same class


def test_a_sample_does_not_depend_on_the_number_of_devices(
  command, pipeline, diffusion, tokenizer, tmp_path
):
  done = command(
    *("launch.sample", f"--workdir={pipeline / 'diffusion'}", f"--output={tmp_path / 'eight.npz'}"),
    *("--num_samples=11", "--batch_size=8", "--seed=5"),
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
  )
  assert done.returncode == 0, done.stderr
  eight, _ = read_samples(tmp_path / "eight.npz")
  index = np.arange(11)
  run = sampler(diffusion, tokenizer, settings(diffusion, batch_size=11), 5)
  assert np.abs(run(index, index % 9).astype(int) - eight).max() <= 1


def test_a_stopped_run_samples_only_what_is_missing(diffusion, tokenizer, tmp_path, batches):
  def run(name):
    output = tmp_path / name / "samples.npz"
    sample.sample_set(diffusion, tokenizer, output, num_samples=21)
    return read_samples(output)

  pictures, labels = run("whole")
  assert pictures.shape == (21, 64, 64, 3)
  np.testing.assert_array_equal(labels, np.arange(21) % 9)
  assert batches == [[*range(9)], [*range(9, 18)], [*range(18, 21)]]
  batches.clear()
  batches.limit = 1
  with pytest.raises(Stop):
    run("stopped")
  batches.limit = 100
  run("stopped")
  assert batches == [[*range(9)], [*range(9, 18)], [*range(18, 21)]]
  files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
  assert sorted(files) == ["samples.json", "samples.npz", "samples.png"]
  assert files == {path.name: path.read_bytes() for path in (tmp_path / "stopped").iterdir()}
  np.testing.assert_array_equal(run("whole")[0], pictures)
  assert len(batches) == 3


def test_a_file_begun_with_other_settings_is_refused(diffusion, tokenizer, pipeline):
  before = (pipeline / "samples.npz").read_bytes()
  for change, named in (({"num_samples": 19}, "num_samples"), ({"seed": 2}, "seed")):
    with pytest.raises(InputError, match=f"begun with another {named}"):
      sample.sample_set(
        diffusion, tokenizer, pipeline / "samples.npz", **{"num_samples": 18, **change}
      )
  with pytest.raises(InputError, match="begun with another cfg_scale"):
    sample.sample_set(
      *(diffusion, tokenizer, pipeline / "samples.npz"),
      num_samples=18,
      settings=settings(diffusion, cfg_scale=7.0),
    )
  assert (pipeline / "samples.npz").read_bytes() == before


def test_balanced_labels_have_every_class_as_often():
  np.testing.assert_array_equal(space.labels_for("balanced", 7, 3, 0), [0, 1, 2, 0, 1, 2, 0])


def test_uniform_labels_are_seeded():
  a, b = (space.labels_for("uniform", 500, 9, seed) for seed in (0, 1))
  np.testing.assert_array_equal(a, space.labels_for("uniform", 500, 9, 0))
  assert (a != b).any()
  assert set(a) == set(range(9))


def test_given_labels_are_repeated():
  np.testing.assert_array_equal(space.labels_for("3,7", 5, 9, 0), [3, 7, 3, 7, 3])


@pytest.mark.parametrize("labels", ["9", "-1", "0,9", "99999999999", "cat", "", "1,,2"])
def test_wrong_labels_are_refused(labels):
  with pytest.raises(InputError, match="--labels is"):
    space.labels_for(labels, 5, 9, 0)


def test_contact_sheet_fills_the_last_row_with_white():
  pictures = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 3, 3), np.uint8)
  sheet = contact_sheet(pictures, columns=2)
  assert sheet.shape == (6, 6, 3)
  np.testing.assert_array_equal(sheet[::2, ::3, 0], [[0, 1], [2, 3], [4, 255]])


def test_png_files_are_the_pictures_and_those_that_are_there_stay(diffusion, tokenizer, tmp_path):
  output = tmp_path / "samples.npz"
  sample.sample_set(diffusion, tokenizer, output, num_samples=10, png=True)
  folder = tmp_path / "samples"
  names = sorted(path.name for path in folder.glob("*.png"))
  assert names[3] == "000003_3-Food-Drink_seed0.png"
  assert [name[:6] for name in names] == [f"{i:06d}" for i in range(10)]
  pictures, labels = read_samples(output)
  assert labels.tolist() == [*range(9), 0]
  for path, picture in zip(sorted(folder.glob("*.png")), pictures, strict=True):
    np.testing.assert_array_equal(np.asarray(Image.open(path)), picture)
  (folder / names[3]).unlink()
  kept = (folder / names[4]).stat().st_mtime_ns
  sample.sample_set(diffusion, tokenizer, output, num_samples=10, png=True)
  assert (folder / names[3]).is_file()
  assert (folder / names[4]).stat().st_mtime_ns == kept


def test_a_folder_of_other_pictures_is_refused(diffusion, tokenizer, tmp_path):
  claim_folder(tmp_path / "samples", sample.PNG_SETTINGS, {"seed": 1})
  with pytest.raises(InputError, match=r"samples was begun with another .*seed"):
    sample.sample_set(diffusion, tokenizer, tmp_path / "samples.npz", num_samples=9, png=True)
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "holiday.png").write_bytes(b"")
  with pytest.raises(InputError, match="holds other files"):
    sample.sample_set(diffusion, tokenizer, tmp_path / "mine.npz", num_samples=9, png=True)


def test_a_folder_of_parts_may_hold_other_files_and_a_damaged_part_is_named(tmp_path):
  write_rows(tmp_path / "000000000_2.npy", np.zeros((2, 4, 4, 3), np.uint8))
  for name in ("000000000_2 copy.npy", "x.npy", ".DS_Store"):
    (tmp_path / name).write_bytes(b"x")
  parts = Parts(tmp_path, 2, 2, ROWS)
  write_npz(tmp_path / "all.npz", parts, np.zeros(2, np.int32))
  (tmp_path / "000000000_2.npy").write_bytes(b"x")
  with pytest.raises(InputError, match=r"000000000_2\.npy is damaged"):
    write_npz(tmp_path / "all.npz", parts, np.zeros(2, np.int32))


def test_parts_of_runs_with_other_batch_sizes_become_one_file(tmp_path):
  pictures = np.arange(11, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
  parts = Parts(tmp_path, 11, 3, ROWS)
  for start, count in ((0, 4), (4, 4), (3, 3), (9, 2)):
    np.save(parts.path(range(start, start + count)), pictures[start : start + count])
  assert parts.missing() == [range(6, 9)]
  np.save(parts.path(range(6, 9)), pictures[6:9])
  write_npz(tmp_path / "all.npz", parts, np.zeros(11, np.int32))
  np.testing.assert_array_equal(read_samples(tmp_path / "all.npz")[0], pictures)


@pytest.mark.parametrize("changes", [{"mode": "SDE"}, {"method": "dopri5"}, {"method": "heun"}])
def test_a_sample_of_any_sampler_does_not_depend_on_its_batch(diffusion, tokenizer, changes):
  index, label = np.arange(5), np.arange(5)
  pictures = []
  for size in (2, 5):
    chosen = settings(diffusion, batch_size=size, num_steps=4, **changes)
    run = sampler(diffusion, tokenizer, chosen, 0)
    pictures.append(run(index, label).astype(int))
  assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_a_guide_changes_the_samples_and_must_see_the_same_latents(diffusion, tokenizer, tmp_path):
  weaker = restore.load(diffusion.workdir, "diffusion", ema=0.0)
  chosen = settings(diffusion, cfg_scale=3.0)
  index = np.arange(9)
  plain, led = (
    sampler(diffusion, tokenizer, chosen, 0, guide)(index, index) for guide in (None, weaker)
  )
  assert not np.array_equal(plain, led)
  other = ConfigDict(diffusion.config.to_dict())
  other.latents.sha256 = "0" * 64
  foreign = dataclasses.replace(weaker, config=FrozenConfigDict(other))
  with pytest.raises(InputError, match=r"guide .*latents\.sha256"):
    sample.sample_set(
      diffusion, tokenizer, tmp_path / "a.npz", num_samples=9, settings=chosen, guide=foreign
    )


def test_an_average_that_was_not_kept_is_named(diffusion):
  with pytest.raises(InputError, match=r"keeps no average of decay 0\.99, only \(0\.5,\)"):
    restore.load(diffusion.workdir, "diffusion", ema=0.99)
