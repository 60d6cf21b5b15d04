"""Two real processes train as one does, and a job resumes with another number of them."""

from __future__ import annotations

import numpy as np
import pytest

from launch.engine import processes
from launch.engine.writers import read_metrics
from vavae_jax.common.errors import InputError


@pytest.fixture
def training(pipeline):
  """The command of a training of four steps."""
  settings = ["--config.num_steps=4", "--config.save_every_steps=2", "--config.log_every_steps=1"]
  return [
    *("launch.train", "--config=configs/quickstart.py:diffusion,tiny", *settings),
    *("--config.evaluate_every_steps=0", f"--config.latents.path={pipeline / 'latents'}"),
  ]


def losses(workdir):
  return {line["step"]: line["loss"] for line in read_metrics(workdir) if "loss" in line}


def test_two_processes_train_as_one(training, two_processes, command, tmp_path):
  """The second half also by one process, from the checkpoint of two."""
  done = command(*training, f"--workdir={tmp_path / 'one'}")
  assert done.returncode == 0, done.stderr
  half = [word.replace("num_steps=4", "num_steps=2") for word in training]
  two_processes(*half, f"--workdir={tmp_path / 'two'}")
  done = command(*training, f"--workdir={tmp_path / 'two'}")
  assert done.returncode == 0, done.stderr
  one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
  assert list(one) == list(two) == [1, 2, 3, 4]
  # Sums over devices are taken in another order.
  np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)


@pytest.mark.parametrize(
  ("variables", "message"),
  [
    ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not"),
    (
      {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
      r"JAX_PROCESS_ID '2' is not in 0\.\.",
    ),
  ],
)
def test_half_a_job_is_refused(variables, message, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(InputError, match=message):
    processes.start()
