"""Batches ahead of the steps: their order, errors in the waiting step, and their end."""

from __future__ import annotations

import itertools
import threading
import time

import pytest

from launch.engine.prefetch import AHEAD, Prefetched


def never(seconds):
  assert seconds < 10


def test_batches_come_in_order_and_a_few_ahead():
  put = []
  with Prefetched(itertools.count(), lambda x: put.append(x) or 2 * x, never) as batches:
    assert [next(batches) for _ in range(5)] == [0, 2, 4, 6, 8]
  # Those taken and those in line, of which leaving calls off what has not begun.
  assert len(put) <= 5 + AHEAD
  assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def failing():
  yield 1
  raise ValueError("the disk is gone")


@pytest.mark.parametrize(
  ("data", "error", "message"),
  [(failing(), ValueError, "the disk is gone"), ([1], RuntimeError, "should be endless")],
)
def test_what_ends_the_data_is_raised_where_a_step_waits(data, error, message):
  with Prefetched(data, lambda x: x, never) as batches:
    assert next(batches) == 1
    with pytest.raises(error, match=message):
      next(batches)


def test_the_last_batch_comes_again_where_the_wait_says_so():
  def late():
    yield 1
    time.sleep(0.5)
    yield 2
    yield 3

  with Prefetched(late(), lambda x: x, lambda seconds: True, repeating=True) as batches:
    assert [next(batches) for _ in range(2)] == [1, 1]
    time.sleep(0.6)
    assert next(batches) == 2


def test_a_wait_can_be_ended_and_so_can_the_block_around_it():
  def stalled():
    yield 1
    time.sleep(1000)
    yield 2

  waited = []

  def impatient(seconds):
    waited.append(seconds)
    if seconds > 0.5:
      raise TimeoutError

  began = time.monotonic()
  with Prefetched(stalled(), lambda x: x, impatient) as batches:
    assert next(batches) == 1
    with pytest.raises(TimeoutError):
      next(batches)
  assert time.monotonic() - began < 5
  assert waited == sorted(waited)
