"""The machine decides the attention kernel, XLA's flags and the cache of programs."""

from __future__ import annotations

import os
from types import SimpleNamespace

import jax
import pytest
from ml_collections import FrozenConfigDict

import configs.base
from launch import attention
from launch.engine import hardware
from vavae_jax.common.sharding import BATCH_AXES


def config(**model):
  changed = configs.base.diffusion("LightningDiT-B/1")
  changed.model.update(model)
  return FrozenConfigDict(changed)


def test_a_kernel_that_is_named_is_taken(tmp_path):
  assert attention.choose(config(attention="cudnn"), tmp_path) == "cudnn"


def test_without_a_gpu_there_is_no_choice(monkeypatch, tmp_path):
  monkeypatch.setattr(attention, "_seconds", None)  # nothing is measured
  assert attention.choose(config(), tmp_path) == "xla"


@pytest.mark.parametrize(
  ("sizes", "chosen"),
  [({}, "pallas"), ({"hidden_size": 192, "num_heads": 3}, "xla"), ({"input_size": 64}, "xla")],
)
def test_tpus_take_the_kernel_where_it_can(monkeypatch, tmp_path, capsys, sizes, chosen):
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  device = jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu")
  mesh = jax.sharding.AbstractMesh((1, 1), BATCH_AXES, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert attention.choose(config(**sizes), tmp_path) == chosen
  assert ("the kernel for TPUs cannot" in capsys.readouterr().out) == (chosen == "xla")


@pytest.mark.parametrize(("seconds", "chosen"), [(0.8, "cudnn"), (0.95, "xla"), (2.0, "xla")])
def test_the_fused_kernel_has_to_be_worth_it(monkeypatch, tmp_path, seconds, chosen):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(
    attention, "_seconds", lambda config, name: {"xla": 1.0, "cudnn": seconds}[name]
  )
  assert attention.choose(config(), tmp_path) == chosen


def test_a_training_that_goes_on_keeps_its_kernel(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(attention, "_seconds", None)  # nothing is measured
  (tmp_path / "config.json").write_text(
    '{"task": "diffusion", "seed": 0, "model": {"attention": "cudnn"}, "optimizer": {}}'
  )
  assert attention.choose(config(), tmp_path) == "cudnn"


def test_a_kernel_that_does_not_run_is_not_taken(monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  small = config(input_size=4, hidden_size=64, num_heads=2)  # measured for real, here without cuDNN
  assert attention.choose(small, tmp_path) == "xla"
  assert "cuDNN's does not run here" in capsys.readouterr().out


def test_xla_knows_the_flags_that_gpus_get(command):
  # Any build knows all flags, and ends a process that has one it does not know.
  done = command("tests.devices", XLA_FLAGS=" ".join(hardware.GPU_FLAGS))
  assert done.returncode == 0, done.stderr
  assert command("tests.devices", XLA_FLAGS="--xla_gpu_no_such_flag=true").returncode != 0


@pytest.mark.parametrize(("device", "flags"), [("/dev/nvidiactl", True), ("/dev/accel0", False)])
def test_accelerators_get_flags_and_a_cache_of_programs(monkeypatch, device, flags):
  monkeypatch.setattr(hardware.os.path, "exists", lambda path: path == device)
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=here")
  cached = []
  monkeypatch.setattr(jax.config, "update", lambda name, value: cached.append(value))
  hardware.prepare()
  wanted = hardware.GPU_FLAGS if flags else ()
  assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=here", *wanted]
  assert cached == [os.path.expanduser(hardware.PROGRAMS)]


@pytest.mark.parametrize(
  ("kind", "given", "kib"),
  [
    ("TPU v6 lite", "", "65536"),
    ("TPU v5p", "--xla_tpu_enable_async_all_to_all=true", "65536"),
    ("TPU v6 lite", "--xla_tpu_scoped_vmem_limit_kib=98304", None),
    ("TPU v5 lite", "", None),
    ("TPU v4", "", None),
    ("cpu", "", None),
  ],
)
def test_a_training_step_may_use_more_vmem_unless_libtpu_is_told(monkeypatch, kind, given, kib):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", given)
  place = SimpleNamespace(device_set=[SimpleNamespace(device_kind=kind)])
  options = hardware.compiler_options({"state": place}, "diffusion")
  assert options == ({hardware.VMEM_OPTION: kib} if kib else {})
  assert not hardware.compiler_options({"state": place}, "tokenizer")
