"""A training that logs to W&B, without a network."""

import pytest
import wandb

from launch.engine import loop
from launch.engine import wandb as ours
from tests import toy_task
from vavae_jax.common.errors import InputError


class Seen:
  """Stands for a run of W&B."""

  url = "nowhere"

  def __init__(self, **given):
    self.given, self.logged, self.ended = given, [], False

  def define_metric(self, *_, **__): ...

  def log(self, values):
    self.logged.append(values)

  def finish(self):
    self.ended = True


@pytest.fixture
def runs(monkeypatch):
  begun = []
  monkeypatch.setattr(wandb, "init", lambda **given: begun.append(Seen(**given)) or begun[-1])
  return begun


def test_a_training_that_goes_on_logs_to_the_same_run(tmp_path, runs):
  for steps in (4, 8):
    loop.run(toy_task, toy_task.config(num_steps=steps, log_to=("wandb",)), tmp_path)
  first, second = runs
  assert first.given["id"] == second.given["id"]
  assert [line["step"] for run in runs for line in run.logged] == [2, 4, 6, 8]
  assert "loss" in first.logged[0]
  assert first.ended
  assert second.ended
  assert not (tmp_path / "tensorboard").exists()


def test_a_run_without_a_network_is_kept_in_the_workdir(tmp_path, monkeypatch):
  monkeypatch.setenv("WANDB_MODE", "offline")
  loop.run(toy_task, toy_task.config(num_steps=2, log_to=("wandb",)), tmp_path)
  (kept,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
  assert kept.stat().st_size


def test_wandb_that_is_not_installed_is_told_before_the_training(tmp_path, monkeypatch):
  monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match="not installed: run `pip install wandb`"):
    loop.run(toy_task, toy_task.config(log_to=("wandb",)), tmp_path)
  assert not any(tmp_path.iterdir())
