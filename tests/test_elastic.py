"""A run goes on with another number of devices, and processes that are waited for are named."""

from __future__ import annotations

import jax
import pytest
from ml_collections import ConfigDict

from launch.engine import elastic, stragglers
from launch.engine.writers import curve, read_metrics
from tests.conftest import start_job
from tests.survive import ended
from tests.test_stopping import Store
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json


@pytest.fixture
def start(tmp_path, monkeypatch):
  """`start(devices, accumulate_steps)`: the parts that a batch of 96 is then taken in."""

  def run(devices, accumulate_steps=1, batch_size=96):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    given = ConfigDict({"batch_size": batch_size, "accumulate_steps": accumulate_steps})
    config, note = elastic.adapted(given, tmp_path)
    write_json(tmp_path / elastic.NOTE, note)
    assert given.accumulate_steps == accumulate_steps
    return config.accumulate_steps

  return run


def test_a_device_has_no_more_at_once_than_where_the_run_began(start, capsys):
  assert start(16, 2) == 2  # 3 at once
  assert start(8, 2) == 4
  told = capsys.readouterr().out
  assert "devices: 8, 16 before; config.accumulate_steps is 4" in " ".join(told.split())
  assert start(32, 2) == 1
  assert start(6, 2) == 8  # 2 at once, since 3 do not divide 16
  assert start(48, 2) == 1
  assert start(16, 2) == 2


def test_parts_that_a_person_gives_are_left_as_they_are(start):
  assert start(16, 1) == 1
  assert start(8, 3) == 3
  assert start(4, 3) == 6


def test_devices_that_do_not_divide_the_batch_are_refused(start):
  start(16)
  with pytest.raises(InputError, match=r"batch_size=96, which the 20 devices .* such as 16 or 24"):
    start(20)
  assert start(20, batch_size=100) == 1  # another run's matter


@pytest.fixture
def job(monkeypatch):
  """`job(times)`: what the first of these processes says of two intervals of such times."""
  store = Store()
  store.key_value_delete = lambda name: [
    store._values.pop(key) for key in [*store._values] if key.startswith(f"{name}/")
  ]
  monkeypatch.setattr(stragglers.processes, "several", lambda: True)
  monkeypatch.setattr(stragglers.distributed.global_state, "client", store)

  def run(times):
    monkeypatch.setattr(stragglers.jax, "process_count", lambda: len(times))
    monkeypatch.setattr(stragglers, "_rounds", iter([7] * len(times)))
    all_of_them = [stragglers.Stragglers() for _ in times]
    for _ in range(2):
      for i in reversed(range(len(times))):
        monkeypatch.setattr(stragglers.jax, "process_index", lambda i=i: i)
        found = all_of_them[i].tell(*times[i])
    assert len(store._values) == len(times)  # those that were read are gone
    return found

  return run


def test_the_process_that_is_held_up_least_is_waited_for(job, capsys):
  found = job([(60.0, 0.1, 59.0), (60.0, 48.0, 11.0), (60.0, 0.2, 58.0)])
  assert found == {"slowest_process": 1.0, "others_wait_fraction": 48.0 / 60.0}
  told = " ".join(capsys.readouterr().out.split())
  assert "process 1 on" in told
  assert "others up to 48.0 of 60.0 s; it waited 48.0 s for data" in told


@pytest.mark.parametrize("waited", [5.9, 0.9])
def test_small_differences_are_logged_but_nobody_is_named(waited, job, capsys):
  seconds = 60.0 if waited > 1 else 2.0
  found = job([(seconds, 0.0, waited), (seconds, 0.0, 0.0)])
  assert found == {"slowest_process": 1.0, "others_wait_fraction": waited / seconds}
  assert "waited for" not in capsys.readouterr().out


def test_a_process_whose_data_are_slow_is_named(environment, tmp_path):
  """One of two real ones."""
  words = ("tests.toy_task", tmp_path / "run", 0, 100, "num_steps=36,log_every_steps=12")
  both = start_job(words, environment | {"TOY_SLOW": "1:0.15"}, 2)
  (code, told), other = map(ended, both)
  assert code == other[0] == 0, told
  assert "process 1 on " in told
  assert "process 0 on " not in told
  assert {process for _, process in curve(read_metrics(tmp_path / "run"), "slowest_process")} == {1}
