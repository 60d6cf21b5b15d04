"""launch.engine.tracing: how busy devices were, by what a trace holds."""

from __future__ import annotations

import time

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from launch.engine import tracing
from launch.engine.tracing import Operation

tracing.define_flags()
flags.FLAGS.mark_as_parsed()
SECOND = 1e9


@pytest.mark.parametrize(
  ("spans", "length"),
  [
    ([], 0),
    ([(1, 3), (5, 6)], 3),
    ([(5, 6), (1, 3)], 3),
    ([(1, 4), (2, 3)], 3),  # one in another, as in a loop
    ([(1, 3), (2, 5), (5, 6)], 5),
  ],
)
def test_time_in_which_two_things_happen_counts_once(spans, length):
  assert tracing.union(spans) == length


def test_busy_is_the_mean_of_devices_and_loops_are_told_by_what_is_in_them(tmp_path, monkeypatch):
  (tmp_path / "host.xplane.pb").touch()
  seen = [
    Operation("/device:GPU:0", "while.3", 0, 3 * SECOND),
    Operation("/device:GPU:0", "gemm", 0, 2 * SECOND),
    Operation("/device:GPU:0", "add", 2 * SECOND, 3 * SECOND),
    Operation("/device:GPU:1", "add", 1 * SECOND, 2 * SECOND),
    Operation("/host:CPU", "copy", 0, 4 * SECOND),
  ]
  monkeypatch.setattr(tracing, "_operations", lambda file: iter(seen))
  monkeypatch.setattr(tracing.jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(tracing.jax, "local_device_count", lambda: 4)  # two of them idle
  told = tracing.read(tmp_path, 4.0)
  assert told.busy == pytest.approx((3 / 4 + 1 / 4) / 4)
  assert told.largest == [("gemm", 0.5), ("add", 0.5)]


def test_a_command_is_traced_in_the_midst_of_its_work(tmp_path):
  said = []
  work = jax.jit(lambda x: jnp.tanh(x @ x))
  x = jnp.ones((400, 400))
  jax.block_until_ready(work(x))
  with (
    flagsaver.flagsaver(trace=str(tmp_path / "new"), trace_after=0.1, trace_seconds=0.3),
    tracing.traced(said.append),
  ):
    end = time.monotonic() + 60
    while not said and time.monotonic() < end:
      jax.block_until_ready(work(x))
  (line,) = said
  busy = float(line.partition("the device was busy ")[2].partition("%")[0])
  assert 1 < busy <= 100
  assert "none seen" not in line
  assert list((tmp_path / "new").rglob("*.xplane.pb"))


def test_a_command_that_ends_before_is_told_so(tmp_path):
  said = []
  with (
    flagsaver.flagsaver(trace=str(tmp_path), trace_after=1000.0),
    tracing.traced(said.append),
  ):
    pass
  assert said == ["no trace: the command ended before --trace_after=1000 seconds"]
  assert not flags.FLAGS.trace
