"""Processes agree on the place after which they stop: threads here, with a store of their own."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from launch.engine import stopping, watchdog
from launch.engine.console import Interrupted


class Store:
  """As JAX's, of one process."""

  def __init__(self):
    self._values, self._changed = {}, threading.Condition()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self._changed:
      assert allow_overwrite or key not in self._values
      self._values[key] = value
      self._changed.notify_all()

  def blocking_key_value_get(self, key, milliseconds):
    with self._changed:
      if not self._changed.wait_for(lambda: key in self._values, milliseconds / 1000):
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
      return self._values[key]


@pytest.fixture(autouse=True)
def listened(monkeypatch):
  """Often."""
  monkeypatch.setattr(stopping, "_LISTENED_MS", 100)


@pytest.mark.parametrize("seed", range(5))
def test_all_stop_after_the_same_place_which_one_had_begun(seed):
  """One asks, between two of its places."""
  store, count, draw = Store(), 3, random.Random(seed)
  order = [(step, evaluation) for step in range(1, 1000) for evaluation in range(1 + step % 3)]
  asks = draw.randrange(20)

  def run(process):
    together = stopping.Together(store, "stop", process, count)
    for done, place in enumerate(order):
      if together.stops_before(place, wanted=process == 1 and done >= asks):
        together.close()
        return order[:done]
      time.sleep(draw.random() / 100)
    raise AssertionError

  with ThreadPoolExecutor() as pool:
    first, *others = pool.map(run, range(count))
  assert others == [first, first]
  assert asks <= len(first) < asks + 20


def test_a_process_that_is_through_answers_too():
  store = Store()
  one, other = (stopping.Together(store, "stop", process, 2) for process in range(2))
  assert not one.stops_before((3, 0), wanted=False)
  assert not other.stops_before((2, 0), wanted=False)
  one.close()
  assert not other.stops_before((3, 0), wanted=True)
  assert other.stops_before((3, 1), wanted=True)
  other.close()


def test_a_signal_is_passed_on_while_the_main_thread_computes():
  store = Store()
  one, other = (stopping.Together(store, "stop", process, 2) for process in range(2))
  watchdog.heard.set()
  try:
    assert one.last == other.last == (0, 0)
  finally:
    watchdog.heard.clear()
  one.close()
  other.close()


@pytest.fixture
def job(monkeypatch):
  """The signals of a process and the agreement of the only other one."""
  store = Store()
  monkeypatch.setattr(stopping, "_LAST_BATCH", 0.3)
  jax.devices()  # before there are several processes
  monkeypatch.setattr(stopping.jax, "process_count", lambda: 2)
  monkeypatch.setattr(stopping.distributed.global_state, "client", store)
  monkeypatch.setattr(stopping, "_rounds", iter([7]))
  with contextlib.suppress(Interrupted), stopping.Signals(60.0, "data") as signals:
    other = stopping.Together(store, "stopping/7", 1, 2)
    yield signals, other
    other.close()


def waits(signals, seconds=2.0):
  """The answer of the wait and how long it took."""
  began = time.monotonic()
  while not signals.waiting(0.0):
    assert time.monotonic() - began < seconds
    time.sleep(0.01)
  return time.monotonic() - began


def test_where_none_began_the_step_that_waits_all_stop_before_it(job):
  signals, other = job
  signals.go_on(1)
  other.stops_before((1, 0, 0), wanted=False)
  assert not signals.waiting(0.0)
  assert other.stops_before((2, 0, 0), wanted=True)
  with pytest.raises(Interrupted) as raised:
    signals.waiting(0.0)
  assert raised.value.together
  assert raised.value.exit_code == 128 + signal.SIGTERM


def test_where_another_began_it_the_last_batch_serves_again(job, capsys):
  signals, other = job
  signals.go_on(1)
  other.stops_before((1, 0, 0), wanted=False)
  other.stops_before((2, 0, 0), wanted=False)
  signal.raise_signal(signal.SIGTERM)
  assert waits(signals) > 0.25
  assert "no data for step 2, which others began" in capsys.readouterr().out
  signals.go_on(2)
  with pytest.raises(Interrupted):
    signals.waiting(0.0)
  assert other.stops_before((3, 0, 0), wanted=False)


def test_without_a_batch_before_there_is_nothing_to_save(job):
  signals, other = job
  other.stops_before((1, 0, 0), wanted=False)
  signal.raise_signal(signal.SIGTERM)
  with pytest.raises(Interrupted) as raised:
    waits(signals)
  assert not raised.value.together


def test_a_signal_after_the_last_place_where_it_could_stop_ends_the_work_too():
  with pytest.raises(Interrupted) as raised, stopping.Signals(60.0, "data"):
    signal.raise_signal(signal.SIGTERM)
  assert raised.value.together


def test_a_training_within_an_evaluation_leaves_the_outer_one_s_steps_to_save():
  def save():
    raise AssertionError

  with stopping.Signals(60.0, "data") as outer:
    outer.done()
    with outer.at_once(save):
      with stopping.Signals(60.0, "data") as inner:
        inner.done()
        with inner.at_once(print):
          assert watchdog.unsaved._save is save
      assert watchdog.unsaved.there
      assert watchdog.unsaved._save is save
  assert not watchdog.unsaved.there
