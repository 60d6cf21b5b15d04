"""What `vavae run --pictures` makes of somebody's pictures, before anything is trained."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from ml_collections import FrozenConfigDict
from PIL import Image

import launch.quickstart
from configs import pictures, quickstart
from launch.engine import configuration
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json
from vavae_jax.data import selection


def make_pictures(root: Path, **counts: int) -> Path:
  for name, count in counts.items():
    (root / name).mkdir(parents=True)
    for i in range(count):
      Image.new("RGB", (20, 20)).save(root / name / f"{i}.png")
  return root


def test_own_pictures_fix_classes_batches_and_what_is_held_out(tmp_path):
  config = pictures.get_config("cpu")
  launch.quickstart.fit(config, str(make_pictures(tmp_path / "own", cat=12, dog=11)), tmp_path)
  assert config.diffusion.model.num_classes == 2
  assert config.tokenizer.batch_size == config.diffusion.batch_size == 16
  assert config.sample.num_samples == 80
  assert config.tokenizer.data.source == f"folder:{tmp_path / 'own'}"
  with pytest.raises(InputError, match="has 3 pictures; the pipeline needs 16 or more"):
    launch.quickstart.fit(config, str(make_pictures(tmp_path / "few", cat=3)), tmp_path)


@pytest.mark.parametrize("first", [80, 352, 416, 528])
def test_of_few_pictures_two_are_held_out_whatever_they_are_called(first, tmp_path):
  """The usual share takes none of these; the largest is needed of some."""
  (tmp_path / "own").mkdir()
  for i in range(first, first + 16):
    Image.new("RGB", (20, 20)).save(tmp_path / "own" / f"IMG_{i:04}.png")
  config = pictures.get_config("cpu")
  launch.quickstart.fit(config, str(tmp_path / "own"), tmp_path)
  source = selection.opened(config.tokenizer.data.source)
  assert len(selection.split(source, FrozenConfigDict(config.tokenizer.data))[1]) >= 2


def test_what_somebody_set_beside_own_pictures_stays(tmp_path, capsys):
  config = pictures.get_config("cpu")
  config.tokenizer.data.held_out = 0.4
  config.diffusion.model.num_classes, config.sample.num_samples = 3, 10
  launch.quickstart.fit(config, str(make_pictures(tmp_path / "own", cat=12, dog=11)), tmp_path)
  kept = (config.tokenizer.data.held_out, config.sample.num_samples)
  assert (*kept, config.diffusion.model.num_classes) == (0.4, 10, 3)
  assert re.search("time .* about [0-9]+ minutes, an estimate", capsys.readouterr().out)


def fitted(train: int, classes: int = 9, kind: str = "cpu", **machine: float):
  """(Configuration, estimate in seconds) for a machine as fast as the measured one."""
  config, machine_kind = pictures.get_config(kind), "cpu" if kind == "cpu" else "accelerator"
  machine.setdefault("rate", pictures.SPEEDS[machine_kind].rate)
  config.tokenizer.data.held_out = 0.1
  seconds = pictures.fit(config, classes=classes, train=train, machine=machine_kind, **machine)
  return config, seconds


@pytest.mark.parametrize(
  ("kind", "train", "steps", "minutes"),
  [
    ("cpu", 16, (1000, 1000), (3, 4)),
    ("cpu", 177, (1000, 1000), (4, 6)),
    ("cpu", 1_667, (2000, 4000), (12, 14)),  # the quickstart's
    ("cpu", 10_000, (10_300, 20_500), (60, 65)),  # an hour of training
    ("cpu", 1_281_167, (10_300, 20_500), (120, 140)),  # another to encode them
    ("gpu", 10_000, (3000, 3000), (3, 5)),
    ("gpu", 1_281_167, (97_600, 97_600), (100, 110)),
  ],
)
def test_steps_follow_the_pictures_until_an_hour_is_full(kind, train, steps, minutes):
  config, seconds = fitted(train, kind=kind)
  assert (config.tokenizer.num_steps, config.diffusion.num_steps) == steps
  assert minutes[0] <= seconds / 60 <= minutes[1]
  for part in (config.tokenizer, config.diffusion):
    assert part.optimizer.decay_steps == part.num_steps
  config.diffusion.latents.path = "latents"
  configuration.resolve(config, quickstart.KEYS)  # nothing is left open


def test_a_slow_machine_takes_fewer_steps_in_the_hour_but_enough_to_learn():
  speed = pictures.SPEEDS["cpu"].rate
  assert fitted(10_000, rate=speed / 2)[0].diffusion.num_steps == 10_300
  assert fitted(10_000, rate=speed / 100)[0].diffusion.num_steps == pictures.LEAST_STEPS


def test_a_small_device_takes_a_batch_in_parts():
  assert fitted(10_000, kind="gpu", memory=80e9)[0].diffusion.accumulate_steps == 1
  assert fitted(10_000, kind="gpu", memory=4e9)[0].diffusion.accumulate_steps == 4


def test_what_follows_the_steps_follows_those_that_somebody_set(tmp_path):
  config = pictures.get_config("cpu")
  config.tokenizer.num_steps, config.diffusion.optimizer.decay_steps = 300, 7_000
  launch.quickstart.fit(config, str(make_pictures(tmp_path / "own", cat=12, dog=11)), tmp_path)
  first, second = config.tokenizer, config.diffusion
  assert (first.optimizer.decay_steps, first.stages.disc_start) == (300, (270,))
  assert (second.num_steps, second.optimizer.decay_steps) == (1000, 7_000)


def test_a_run_that_was_begun_decays_until_another_last_step():
  config = pictures.get_config("cpu")
  begun = fitted(177)[0].diffusion
  config.diffusion.num_steps = 5_000
  pictures.go_on(config.diffusion, begun.to_dict())
  later = config.diffusion
  assert (later.optimizer.decay_steps, later.save_every_steps) == (5_000, 200)
  assert later.optimizer.ema_decays == begun.optimizer.ema_decays


def test_a_run_that_was_begun_keeps_its_numbers_when_pictures_are_added(tmp_path):
  own = make_pictures(tmp_path / "own", cat=12, dog=11)
  kept = []
  for count in (0, 2_000):
    for i in range(count):
      os.link(own / "cat" / "0.png", own / "cat" / f"more{i}.png")
    selection.opened.cache_clear()  # as in another process
    config = pictures.get_config("cpu")
    launch.quickstart.fit(config, str(own), tmp_path / "run")
    kept.append({name: config[name].to_dict() for name in ("tokenizer", "diffusion")})
    for name in kept[0]:
      write_json(tmp_path / "run" / name / "config.json", kept[0][name])
  assert kept[1] == kept[0]
  config = pictures.get_config("cpu")
  launch.quickstart.fit(config, str(own), tmp_path / "new")
  assert config.tokenizer.num_steps > kept[0]["tokenizer"]["num_steps"]


@pytest.mark.parametrize(
  ("given", "message"),
  [("nowhere", "which does not exist; give a folder"), ("a.rar", "which is no folder, .zip or")],
)
def test_what_are_no_pictures_is_told(given, message, tmp_path):
  (tmp_path / "a.rar").touch()
  with pytest.raises(InputError, match=message):
    launch.quickstart.fit(pictures.get_config("cpu"), str(tmp_path / given), tmp_path)
