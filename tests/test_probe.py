"""The probe of how well a tokenizer's latents generate, alone and while a tokenizer trains."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from launch.evaluation import probe, training
from launch.evaluation.output import Output
from launch.evaluation.pictures import own_pictures
from launch.evaluation.reference import reference_of
from tests.evaluators_everywhere import cells
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import linear

ALWAYS = {"loss", "linear_accuracy", "linear_in_pixels", "effective_dimensions", "density_cv"}
JUDGED = {"fd_cells", "gaussian_fd_cells", "fd_latents", "gaussian_fd_latents"}


SIZES = {"STEPS": 4, "BATCH": 16, "WIDTH": 32, "DEPTH": 1, "SAMPLES": 18, "CELLS": 55}


@pytest.fixture(scope="module", autouse=True)
def small():
  """A model of seconds."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in SIZES.items():
      patch.setattr(probe, name, value)
    yield


@pytest.fixture(scope="module")
def judge(tokenizer):
  real, network = own_pictures(tokenizer, held_out=False), cells("")
  return probe.Judge(network, reference_of(real, network))


@pytest.fixture(scope="module")
def whole(tokenizer, judge, tmp_path_factory):
  """A folder with the probe "whole"."""
  folder = tmp_path_factory.mktemp("probes")
  probe.evaluate(tokenizer, Output(folder / "whole", probe.KIND), judge)
  return folder


def test_linear_functions_are_found_and_others_are_not():
  draw = np.random.default_rng(0)
  x = draw.standard_normal((9_000, 6)).astype(np.float32)
  exact = 3 * x @ draw.standard_normal((6, 2)).astype(np.float32) + 5
  half = exact + exact.std(0) * draw.standard_normal(exact.shape).astype(np.float32)
  for y, share in ((exact, 1.0), (half, 0.5), (half - exact, 0.0)):
    found = linear.explained(x[:6_000], y[:6_000], x[6_000:], y[6_000:])
    assert found == pytest.approx(share, abs=0.06), share
  label = (exact[:, 0] > 5).astype(int)
  assert linear.accuracy(x[:6_000], label[:6_000], x[6_000:], label[6_000:]) > 0.9
  assert linear.accuracy(x[:6_000], label[:6_000], -x[6_000:], label[6_000:]) < 0.1


def test_a_probe_that_was_stopped_goes_on_and_stands_among_others(
  tokenizer, judge, whole, tmp_path, monkeypatch
):
  sampled = probe._sampled

  def stopped(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(probe, "_sampled", stopped)
  output = Output(tmp_path / "again", probe.KIND)
  with pytest.raises(KeyboardInterrupt):
    probe.evaluate(tokenizer, output, judge)
  assert [*output.progress.glob("model-*/metrics.jsonl")]
  monkeypatch.setattr(probe, "_sampled", sampled)
  monkeypatch.setattr(probe.lightningdit_jax.training, "train_step", stopped)  # it is trained
  others = probe.read_others([str(whole)])
  found = probe.evaluate(tokenizer, Output(tmp_path / "again", probe.KIND), judge, others=others)
  assert found.keys() >= ALWAYS | JUDGED
  assert others == {"whole": found}
  noted = json.loads((tmp_path / "again.json").read_text())
  assert {*noted["place_from_below"].values()} == {1}
  assert "1 of 2" in (tmp_path / "again.html").read_text()
  assert not output.progress.exists()
  with pytest.raises(InputError, match="has no probes"):
    probe.read_others([str(output.progress)])


def test_the_small_model_has_a_picture_for_every_device(tokenizer, tmp_path, monkeypatch):
  store = probe.encode(tokenizer, tmp_path / "store")
  for devices, batch in ((1, 16), (6, 12), (32, 32)):
    monkeypatch.setattr(jax, "device_count", lambda count=devices: count)
    assert probe.model_of(store, store).batch_size == batch


def test_a_training_probes_its_average(tokenizer, whole, tmp_path, monkeypatch):
  """With what `launch.evaluate probe` finds of a checkpoint with the same weights."""
  monkeypatch.setattr(training, "load_network", cells)
  assert training.probes(tokenizer.config, tmp_path) == {}
  config = ConfigDict(tokenizer.config.to_dict())
  config.evaluate_probe = 10_000
  config.optimizer.ema_decays = ()
  state = dataclasses.make_dataclass("State", ["step", "params"])(7, tokenizer.params)
  (every, run) = training.probes(FrozenConfigDict(config), tmp_path)["probe"]
  assert every == config.evaluate_every_steps
  found = run(state)
  assert found.pop("samples").ndim == 3
  assert probe.read_others([str(whole)]) == {"whole": found}
  assert [file.name for file in tmp_path.iterdir()] == [training.REFERENCE]
  config.evaluate_probe = 59
  with pytest.raises(InputError, match="60 pictures or more"):
    training.probes(FrozenConfigDict(config), tmp_path)
