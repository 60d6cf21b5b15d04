"""The choice of the attention kernel, on a machine that has but one of them."""

from __future__ import annotations

import os

import jax
import pytest
from ml_collections import FrozenConfigDict

import configs.base
from launch import attention
from launch.engine import hardware


def config(**model):
  changed = configs.base.diffusion("LightningDiT-B/1")
  changed.model.update(model)
  return FrozenConfigDict(changed)


def test_a_kernel_that_is_named_is_taken():
  assert attention.choose(config(attention="cudnn")) == "cudnn"


def test_without_a_gpu_there_is_no_choice(monkeypatch):
  monkeypatch.setattr(attention, "_seconds", None)  # nothing is measured
  assert attention.choose(config()) == "xla"


@pytest.mark.parametrize(("seconds", "chosen"), [(0.8, "cudnn"), (0.95, "xla"), (2.0, "xla")])
def test_the_fused_kernel_has_to_be_worth_it(monkeypatch, seconds, chosen):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(
    attention, "_seconds", lambda config, name: {"xla": 1.0, "cudnn": seconds}[name]
  )
  assert attention.choose(config()) == chosen


def test_a_kernel_that_does_not_run_is_not_taken(monkeypatch, capsys):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  small = config(input_size=4, hidden_size=64, num_heads=2)  # measured for real, here without cuDNN
  assert attention.choose(small) == "xla"
  assert "cuDNN's does not run here" in capsys.readouterr().out


def test_xla_knows_the_flags_that_gpus_get(command, monkeypatch):
  # Any build knows all flags, and ends a process that has one it does not know.
  done = command("tests.devices", XLA_FLAGS=" ".join(hardware.GPU_FLAGS))
  assert done.returncode == 0, done.stderr
  assert command("tests.devices", XLA_FLAGS="--xla_gpu_no_such_flag=true").returncode != 0
  monkeypatch.setattr(hardware.os.path, "exists", lambda path: True)
  monkeypatch.setenv("JAX_PLATFORMS", "")
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
  hardware.set_gpu_flags()
  assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=here", *hardware.GPU_FLAGS]
