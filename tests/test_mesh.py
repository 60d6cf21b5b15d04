"""The mesh, the sharding rule, and both trainings on 8 devices against one."""

from __future__ import annotations

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh, PartitionSpec

from launch import restore
from launch.engine.writers import curve, read_metrics
from launch.train import train
from tests.train_on_mesh import NUM_STEPS, beyond
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError

BIG = mesh.MIN_SHARDED_SIZE


def spec(shape, *, data=4, fsdp=2):
  devices = AbstractMesh((data, fsdp), ("data", "fsdp"))
  return mesh.parameter_shardings(jax.ShapeDtypeStruct(shape, jnp.float32), devices).spec


def test_the_largest_divisible_axis_is_sharded():
  assert spec((BIG, 6)) == PartitionSpec("fsdp")
  assert spec((6, 3, BIG)) == PartitionSpec(None, None, "fsdp")
  assert spec((4, BIG + 1)) == PartitionSpec("fsdp")  # the largest is odd


def test_small_or_indivisible_arrays_are_whole_everywhere():
  assert spec((BIG // 4, 3)) == PartitionSpec()
  assert spec((3, BIG + 1)) == PartitionSpec()
  assert spec(()) == PartitionSpec()
  assert spec((BIG, 6), data=8, fsdp=1) == PartitionSpec()


def test_the_rule_keeps_the_tree():
  tree = {"a": jnp.zeros(3), "b": [jnp.zeros((2, 2))]}
  shardings = mesh.parameter_shardings(tree, mesh.make_mesh())
  assert jax.tree.structure(shardings) == jax.tree.structure(tree)


def test_minus_one_takes_all_devices():
  count = jax.device_count()
  assert dict(mesh.make_mesh().shape) == {"data": count, "fsdp": 1}
  assert dict(mesh.make_mesh(1, -1).shape) == {"data": 1, "fsdp": count}


@pytest.mark.parametrize(("data", "fsdp"), [(3, 5), (0, 1), (-1, 0), (-1, -1), (-1, 1000), (-2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(data, fsdp):
  with pytest.raises(InputError, match=f"data={data} x fsdp={fsdp}"):
    mesh.make_mesh(data, fsdp)


def test_a_mesh_that_does_not_lie_on_the_slice_is_refused(monkeypatch):
  def make(*_, **__):
    raise NotImplementedError

  monkeypatch.setattr(jax, "make_mesh", make)
  with pytest.raises(InputError, match="data=1 x fsdp=1, which does not lie"):
    mesh.make_mesh()


@dataclasses.dataclass(frozen=True, order=True)
class Gpu:
  """A device of a cluster of GPUs, whose hosts jax calls slices."""

  id: int
  process_index: int
  slice_index: int
  platform: str = "gpu"
  device_kind: str = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
  ("data", "fsdp", "hosts"), [(8, 1, [0] * 4 + [1] * 4), (2, 4, [0, 1]), (1, 8, [None])]
)
def test_hosts_of_gpus_lie_along_data_as_far_as_that_divides(data, fsdp, hosts):
  devices = [Gpu(i, i // 4, i // 4) for i in range(8)]
  made = mesh.make_mesh(data, fsdp, devices)
  assert made.devices.shape == (data, fsdp)
  assert sorted(made.devices.flat) == devices
  rows = [{device.slice_index for device in row} for row in made.devices]
  assert rows == [{0, 1} if host is None else {host} for host in hosts]


@pytest.mark.parametrize(("batch_size", "nearest"), [(12, "8 and 16"), (3, "8 and 8"), (0, "8")])
def test_a_batch_that_does_not_divide_is_refused(batch_size, nearest):
  with pytest.raises(InputError, match=f"batch_size is {batch_size}.*{nearest}"):
    mesh.check_batch_size(batch_size, AbstractMesh((4, 2), ("data", "fsdp")))


def test_global_batches_hold_the_hosts_rows():
  batch = {"x": np.arange(6.0).reshape(3, 2), "y": np.arange(3)}
  arrays = mesh.to_global(batch, mesh.make_mesh())
  jax.tree.map(np.testing.assert_array_equal, arrays, batch)


@pytest.fixture(scope="module")
def on_8_devices(command, pictures, pipeline, tmp_path_factory):
  """Both trainings of `pipeline` anew, and one with options, on 4 x 2 devices: (workdir, what was
  printed).
  """
  workdir = tmp_path_factory.mktemp("mesh")
  done = command(
    *("tests.train_on_mesh", pictures, pipeline / "latents", workdir, 4, 2),
    XLA_FLAGS="--xla_force_host_platform_device_count=8",
  )
  assert done.returncode == 0, done.stderr
  return workdir, json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
  ("task", "names"),
  [
    ("tokenizer", ("loss", "nll", "kl", "vf", "vf_weight", "grad_norm")),
    ("diffusion", ("loss", "mse", "cosine", "grad_norm")),
  ],
)
def test_losses_of_8_devices_are_those_of_one(pipeline, on_8_devices, task, names):
  # Sums in another order differ by 1e-7 or so; Adam's first steps, which are near to signs of the
  # gradients, and the ratio of two norms make more of it.
  one, eight = (
    [line for line in read_metrics(root / task) if line["step"] <= NUM_STEPS and "loss" in line]
    for root in (pipeline, on_8_devices[0])
  )
  assert [line["step"] for line in eight] == [line["step"] for line in one] == [2, 4]
  for a, b in zip(one, eight, strict=True):
    for name in names:
      assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])


def assert_moved_alike(one, eight, task, ema=0.0):
  """The last two steps of two trainings come to the same weights."""

  def weights(workdir, step):
    flat = flatten_dict(restore.load(workdir, task, step, ema).params)
    # A key's bias shifts all logits of a query alike: its gradient is but rounding, of which Adam
    # makes full steps.
    return {path: x for path, x in flat.items() if path[-2:] != ("k", "bias")}

  one, eight, before = weights(one, NUM_STEPS), weights(eight, NUM_STEPS), weights(eight, 2)
  moved = optax.tree.norm(optax.tree.sub(eight, before))
  assert optax.tree.norm(optax.tree.sub(eight, one)) < 1e-3 * moved


@pytest.mark.parametrize("ema", [0.0, None])
@pytest.mark.parametrize("task", ["tokenizer", "diffusion"])
def test_weights_and_averages_of_8_devices_are_those_of_one(pipeline, on_8_devices, task, ema):
  assert_moved_alike(pipeline / task, on_8_devices[0] / task, task, ema)


@pytest.mark.parametrize("name", ["turned", "routed"])
def test_options_train_on_8_devices_as_on_one_that_goes_on(
  pictures, pipeline, on_8_devices, name, tmp_path
):
  config = beyond(str(pictures), str(pipeline / "latents"))[name]
  for config.num_steps in (NUM_STEPS // 2, NUM_STEPS):
    train(config, tmp_path)
  workdirs = (tmp_path, on_8_devices[0] / name)
  assert_moved_alike(*workdirs, config.task)
  one, eight = (dict(curve(read_metrics(workdir), "loss")) for workdir in workdirs)
  assert list(eight) == list(one) == [1, 2, 3, 4]
  np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-4)


def test_the_adversarial_losses_of_8_devices_are_those_of_one(pipeline, on_8_devices):
  # The batch statistics of the discriminator are those of the whole batch.
  a, b = (
    next(x for x in read_metrics(root / "tokenizer") if x["step"] == 4 and "d_loss" in x)
    for root in (pipeline, on_8_devices[0])
  )
  for name in ("d_loss", "g_loss", "disc_weight"):
    assert b[name] == pytest.approx(a[name], rel=1e-3), name


def test_evaluations_run_on_8_devices(on_8_devices):
  (line,) = [x for x in read_metrics(on_8_devices[0] / "tokenizer") if "reconstruction/psnr" in x]
  assert line["reconstruction/psnr"] > 0
  events = list((on_8_devices[0] / "diffusion" / "tensorboard").iterdir())
  assert any(b"samples/grid" in file.read_bytes() for file in events)


@pytest.mark.parametrize("task", ["tokenizer", "diffusion"])
def test_each_device_holds_half_of_the_largest_parameter(on_8_devices, task):
  shape, shard = on_8_devices[1][task]
  assert math.prod(shape) == 2 * math.prod(shard)
