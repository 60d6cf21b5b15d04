"""Three stages in one run: each of them resumes to the same bits."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from configs import quickstart
from launch.engine import configuration, loop
from launch.engine.checkpoint import batch_sizes
from launch.engine.writers import read_metrics
from launch.train import train
from tests.test_tokenizer_training import TinyNetwork
from vavae_jax import frozen, teachers
from vavae_jax.data import selection, sources

BATCH = 4


def config(pictures, num_steps):
  """Two steps a stage, without the GAN, whose steps compile for long."""
  config = quickstart.tokenizer(tiny=True)
  config.update(batch_size=BATCH, num_steps=num_steps, log_every_steps=1, evaluate_every_steps=0)
  config.data.source = f"folder:{pictures}"
  config.model.update(ch=8, norm_groups=4)
  config.discriminator.update(ndf=4, n_layers=2)
  config.loss.disc_weight = 0.0
  config.optimizer.decay_steps = 6  # wherever it is stopped
  source = sources.open_source(config.data.source)
  epochs = 2 * BATCH / len(selection.split(source, config.data)[0])
  config.stages.update(
    epochs=(epochs,) * 3,
    vf_weight=(0.5, 0.1, 0.1),
    cos_margin=(0.0, 0.0, 0.5),
    distmat_margin=(0.0, 0.0, 0.25),
    disc_start=(0, 0, 0),
  )
  return config


def test_a_run_with_another_batch_keeps_its_stages(pictures, tmp_path, monkeypatch, capsys):
  """It was at the third of six steps, in the second stage; and goes on once more with neither."""
  found = []
  monkeypatch.setattr(loop, "run", lambda task, config, *_, **__: found.append(config))
  begun = config(pictures, num_steps=0)
  train(begun, tmp_path)
  configuration.claim_workdir(tmp_path, found[0])
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  begun.batch_size = BATCH // 2
  train(begun, tmp_path, with_changes=True)
  assert [x.stages.begins for x in found] == [(0, 2, 4), (0, 2, 5)]
  assert [x.num_steps for x in found] == [6, 9]
  assert "the stages end after 2, 5, 9 steps" in capsys.readouterr().out
  configuration.note_changes(tmp_path, 3, {"batch_size": (BATCH, BATCH // 2)})
  configuration.claim_workdir(tmp_path, found[1])
  (tmp_path / "checkpoints" / "7").mkdir()
  train(begun, tmp_path)
  assert found[2] == found[1]


def test_batches_of_a_run_that_went_back_are_those_that_were(tmp_path):
  """To a checkpoint from before a change, after which another one followed."""
  configuration.claim_workdir(tmp_path, FrozenConfigDict({"batch_size": 16}))
  for step, sizes in ((100, (8, 4)), (1000, (4, 16)), (500, (16, 2))):
    configuration.note_changes(tmp_path, step, {"batch_size": sizes})
  assert batch_sizes(tmp_path, 2) == [(0, 8), (100, 4), (500, 2)]


def test_every_stage_resumes_and_the_loop_crosses_them_by_itself(pictures, tmp_path, monkeypatch):
  tiny = TinyNetwork(nnx.Rngs(3))  # EfficientNet compiles for long
  monkeypatch.setattr(frozen, "_networks", lambda config: {"teacher": tiny})
  monkeypatch.setattr(teachers, "feature_size", lambda name: tiny.feature_size)
  whole = train(config(pictures, num_steps=0), tmp_path / "whole")
  assert int(whole.step) == 6
  for num_steps in (1, 3, 5, 0):  # each time in the middle of a stage
    parts = train(config(pictures, num_steps), tmp_path / "parts")
  jax.tree.map(np.testing.assert_array_equal, parts, whole)
  told = {line["step"]: line for line in read_metrics(tmp_path / "parts") if "vf" in line}
  assert sorted(told) == list(range(1, 7))
  for step, line in told.items():
    beyond = 1 - line["teacher_cosine"] - line["vf_cos"]
    # What the margin takes off 1 - cosine: nothing in the first two stages, up to 0.5 in the third.
    assert 0.1 < beyond <= 0.5 + 1e-5 if step > 4 else abs(beyond) < 1e-5
