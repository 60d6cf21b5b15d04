"""Several processes of one job: how they find each other, agree, exchange arrays and wait.

They agree and wait by JAX's coordination service, which needs no device, knows no time limit and
ends all where one has died.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors.numpy
from jax._src import distributed  # the store has no public name
from jax.experimental import multihost_utils

from launch.engine import rendezvous
from vavae_jax.common.errors import InputError

# The others give up after so long without a heartbeat of one process.
HEARTBEAT_SECONDS = 30
SECONDS_FOR_OTHERS = 3.0  # to end together
# Another process's file is seen so late on some shared disks, which keep what they once said.
SECONDS_UNTIL_SEEN = 90.0
_FOR_EVER_MS = 2**31 - 1
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

T = TypeVar("T")
_meetings = itertools.count()  # all processes have the same


def start(settings: Mapping[str, Any] | None = None) -> None:
  """Joins the processes of a job, where the environment says that there are several.

  `settings` are JSON values that all of them must have in common.

  JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so on
  any machines. With DISTRIBUTED=1, which launch/tpu_pod.sh and launch/slurm.sbatch set, or a list
  in TPU_WORKER_HOSTNAMES, jax finds them itself, in a TPU slice or a Slurm job.

  Raises:
    InputError: some of the variables are missing, or are no numbers; or as of `rendezvous`.
  """
  # The service would take SIGTERM from us, in every command.
  jax.config.update("jax_enable_preemption_service", False)
  given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
  if not given:
    if os.environ.get("DISTRIBUTED") == "1" or "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
      jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
      job = distributed.global_state
      rendezvous.compare(job.client, job.process_id, job.num_processes, settings or {})
    return
  if missing := [name for name in _VARIABLES if name not in given]:
    raise InputError(
      f"{', '.join(given)} is set, but {', '.join(missing)} is not; set all or none."
    )
  address, count, index = (given[name] for name in _VARIABLES)
  numbers = all(re.fullmatch("[0-9]{1,6}", text) for text in (count, index))
  if not numbers or int(index) >= int(count):
    raise InputError(f"JAX_PROCESS_ID {index!r} is not in 0..JAX_NUM_PROCESSES - 1 ({count!r}).")
  # Else jax would listen on all addresses of the machine.
  listened = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", address)
  rendezvous.place_of(address)
  rendezvous.meet(address if int(index) else listened, int(count), int(index), settings or {})
  jax.distributed.initialize(
    address,
    int(count),
    int(index),
    coordinator_bind_address=listened,
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
  )


def several() -> bool:
  """Whether this process is one of a job of several."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def end(code: int, together: bool) -> None:
  """Ends this process at once, since Python waits for threads that hang in a read, and takes apart
  what others still compute with.

  The other processes of a job come here too if they end `together`; else they wait for this one in
  vain and end when they miss its heartbeat.
  """
  if together:
    late = threading.Timer(SECONDS_FOR_OTHERS, os._exit, (code,))
    late.daemon = True
    late.start()
    jax.distributed.shutdown()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def gather(tensors: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
  """The named arrays of all processes, in their order; names and shapes may differ.

  They travel as bytes, since jax would make float32 of float64.
  """
  if jax.process_count() == 1:
    return [tensors]
  wait_for_all()  # collectives have time limits
  mine = np.frombuffer(safetensors.numpy.save(tensors), np.uint8)
  halves = np.array(divmod(len(mine), 2**30), np.int32)  # int64 would become int32
  sizes = [high * 2**30 + low for high, low in multihost_utils.process_allgather(halves).tolist()]
  padded = np.zeros(max(sizes), np.uint8)
  padded[: len(mine)] = mine
  rows = multihost_utils.process_allgather(padded)
  return [
    safetensors.numpy.load(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)
  ]


def first_does(act: Callable[[], T]) -> T:
  """Calls a function in the first process and returns its JSON value in all, which wait for it.

  All must come here; its InputError is raised in all.
  """
  if jax.process_count() == 1:
    return act()
  store: Any = distributed.global_state.client
  key = f"first/{next(_meetings)}"
  if jax.process_index() == 0:
    try:
      note: dict[str, Any] = {"value": act()}
    except InputError as error:
      note = {"error": str(error)}
    store.key_value_set(key, json.dumps(note))
  said = json.loads(store.blocking_key_value_get(key, _FOR_EVER_MS))
  if "error" in said:
    jax.distributed.shutdown()  # together, so that none is ended by another's end
    raise InputError(said["error"])
  return said["value"]


def wait_for_all() -> None:
  """Returns when all processes have come here."""
  if jax.process_count() > 1:
    client: Any = distributed.global_state.client
    client.wait_at_barrier(f"all/{next(_meetings)}", _FOR_EVER_MS)


def check_seen(paths: Iterable[Path]) -> None:
  """Returns when this process sees files that others have written; InputError if it never does."""
  until = time.monotonic() + SECONDS_UNTIL_SEEN
  for path in paths:
    while not path.exists():
      if time.monotonic() > until:
        raise InputError(
          f"Process {jax.process_index()} does not see {path}, which another one wrote: put the "
          "output on a disk that all processes share, or in a bucket."
        )
      time.sleep(0.5)
