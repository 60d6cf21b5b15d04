"""The order of records: each once an epoch for any number of processes; a function of position."""

from __future__ import annotations

import numpy as np
import pytest

from vavae_jax.data import order
from vavae_jax.data.order import Order, Share


def taken(count: int, batch_size: int, processes: int, batches: int) -> np.ndarray:
  """Records of the global batches, [batches, batch_size]."""
  places = Order(count, seed=3)
  held = np.arange(batch_size).reshape(-1, processes).T  # as where devices are interleaved
  shares = [Share(batch_size, rows) for rows in held]
  found = np.empty((batches, batch_size), int)
  for share in shares:
    for batch in range(batches):
      found[batch, share.rows] = places.records(share.positions(batch))[0]
  return found


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [48, 47, 23, 5])
def test_every_record_comes_once_an_epoch_on_any_number_of_processes(processes, count):
  batches = 3 * count
  found = taken(count, 24, processes, batches)
  epochs = found.ravel()[: batches * 24 // count * count].reshape(-1, count)
  assert (np.sort(epochs, axis=1) == np.arange(count)).all()
  assert len({tuple(epoch) for epoch in epochs}) > 1  # another order each
  np.testing.assert_array_equal(found, taken(count, 24, 1, batches))


def test_a_job_resumes_on_another_number_of_processes():
  """The first two batches by three processes, the next ones by two."""
  whole = taken(50, 12, 1, 6)
  for batch in range(2, 6):
    halves = np.arange(6), np.arange(6, 12)
    parts = [Order(50, 3).records(Share(12, x, start=2).positions(batch))[0] for x in halves]
    np.testing.assert_array_equal(np.concatenate(parts), whole[batch])


def test_coins_are_fair_and_of_record_and_epoch():
  places = Order(2_000, seed=0)
  records = np.arange(2_000)
  coins = [places.coins(records, np.full(2_000, epoch)) for epoch in range(4)]
  np.testing.assert_array_equal(coins[1], places.coins(records, np.full(2_000, 1)))
  # Each within five deviations of a half, and two epochs agree in a half.
  assert all(abs(coin.mean() - 0.5) < 0.056 for coin in coins)
  assert abs((coins[0] == coins[1]).mean() - 0.5) < 0.056
  mixed = places.coins(np.array([7, 7, 8]), np.array([0, 3, 1]))
  np.testing.assert_array_equal(mixed, [coins[0][7], coins[3][7], coins[1][8]])


@pytest.mark.parametrize("count", [1, 3, 7, 8])
def test_some_of_the_records_are_spread_over_all(count):
  found = order.spread(7, count)
  assert found[0] == 0
  assert len({*found.tolist()}) == len(found) == min(count, 7)
  assert count == 1 or found[-1] == 6
  assert np.ptp(np.diff(found)) <= 1 if count > 2 else True


def load(positions: np.ndarray) -> dict[str, np.ndarray]:
  records, _ = Order(20, 1).records(positions)
  return {"record": records}


@pytest.mark.parametrize("start", range(8))
def test_batches_go_on_at_every_position(start):
  def first(share, count):
    iterator = iter(order.batches(share, load))
    return np.array([next(iterator)["record"] for _ in range(count)])

  whole = first(Share(5), 12)
  np.testing.assert_array_equal(first(Share(5, start=start), 12 - start), whole[start:])
