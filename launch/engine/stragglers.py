"""Who is waited for: a step of several processes ends for all when the last one has begun it.

Each process tells by the key-value store of JAX's distributed runtime how long it was held up in
its steps. That is the computation, and for all but the last one the wait for the others. The first
process reads the times of an interval when the next one is over, so that nobody waits for them.
"""

from __future__ import annotations

import itertools
import json
import socket
from typing import Any

import jax
from jax._src import distributed  # the store has no public name

from launch.engine import console, processes

SHARE = 0.1  # of an interval that others may wait for a process, which is then named,
SECONDS = 1.0  # and at least so long
_ANSWERED_WITHIN_MS = 5_000
_rounds = itertools.count()


class Stragglers:
  """Of one training; `tell` is called by all processes alike."""

  def __init__(self) -> None:
    self._store: Any = distributed.global_state.client if processes.several() else None
    self._name, self._told = f"stragglers/{next(_rounds)}", 0

  def tell(self, seconds: float, data: float, held: float) -> dict[str, float]:
    """Takes an interval's seconds, those spent on waiting for data, and those in steps.

    In the first process returns numbers of the interval before, for the log: which process was the
    last to begin its steps, and which share of the time the one that waited longest waited for it.
    """
    if self._store is None:
      return {}
    mine = json.dumps([seconds, data, held, socket.gethostname()])
    self._store.key_value_set(f"{self._name}/{self._told}/{jax.process_index()}", mine)
    self._told += 1
    if jax.process_index() or self._told < 2:
      return {}
    return self._found(f"{self._name}/{self._told - 2}")

  def _found(self, interval: str) -> dict[str, float]:
    """Of the times that all have told of an interval; {} where one is later than a whole one."""
    try:
      told = [
        json.loads(self._store.blocking_key_value_get(f"{interval}/{i}", _ANSWERED_WITHIN_MS))
        for i in range(jax.process_count())
      ]
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
      return {}
    self._store.key_value_delete(interval)
    held = [times[2] for times in told]
    last = held.index(min(held))
    seconds, data, least, host = told[last]
    waited = max(held) - least
    if waited > max(SHARE * seconds, SECONDS):
      console.say(
        f"process {last} on {host} is waited for: others up to {waited:.1f} of {seconds:.1f} s; it "
        f"waited {data:.1f} s for data"
      )
    return {"slowest_process": float(last), "others_wait_fraction": waited / seconds}
