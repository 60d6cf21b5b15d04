"""Processes of a job meet before jax connects them.

It would wait in silence for one that is missing, and fail in the middle of the work where their
settings differ. The first process listens at the address of the job, the others send it a line
each; when all are there it answers, and frees the address for jax.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import time
import uuid
from collections.abc import Mapping
from typing import Any

import jax

from vavae_jax.common.errors import InputError

SECONDS_BETWEEN_LINES = 10.0
WAIT_SECONDS = 300.0  # as jax waits
LONGEST_LINE = 2**20
COMPARED_WITHIN_MS = 60_000
SECONDS_FOR_OTHERS = 5.0  # to come and hear what is wrong with one of them


def meet(address: str, count: int, index: int, settings: Mapping[str, Any]) -> None:
  """Returns when all `count` processes are there; says every ten seconds who is missing.

  Raises:
    InputError: the address cannot be listened at, somebody has not come after five minutes, or has
      other settings than the first process, another count, or another's index.
  """
  place, waiting = place_of(address), _Waiting()
  settings = {**settings, "JAX_NUM_PROCESSES": count}
  if index:
    note = {"index": index, "who": uuid.uuid4().hex, "settings": settings}
    wrong = _report(place, json.dumps(note), waiting, address)
  else:
    wrong = _gather(place, count, settings, waiting) if count > 1 else ""
  if wrong:
    raise InputError(wrong)


def compare(store: Any, process: int, count: int, settings: Mapping[str, Any]) -> None:
  """Compares likewise in a job that jax connected already, by its key-value `store`.

  Raises:
    InputError: in all processes, where one has other settings than the first.
  """
  if process:
    store.key_value_set(f"settings/{process}", json.dumps(settings))
  else:
    wrong = ""
    for other in range(1, count):
      theirs = json.loads(store.blocking_key_value_get(f"settings/{other}", COMPARED_WITHIN_MS))
      wrong = wrong or _difference(settings, theirs, other)
    store.key_value_set("settings/wrong", wrong)
  if wrong := store.blocking_key_value_get("settings/wrong", COMPARED_WITHIN_MS):
    jax.distributed.shutdown()  # together, so that none is ended by another's end
    raise InputError(wrong)


def place_of(address: str) -> tuple[str, int]:
  """Host and port of "host:port" or "[IPv6]:port"; InputError for anything else."""
  found = re.fullmatch(r"(?:([^][:]+)|\[([^][]+)\]):([0-9]{1,5})", address)
  if not found or not 0 < int(found[3]) < 2**16:
    raise InputError(
      f"{address!r} is no address at which the processes of a job could meet; give HOST:PORT, or "
      "[HOST]:PORT for IPv6, in JAX_COORDINATOR_ADDRESS (and JAX_COORDINATOR_BIND_ADDRESS)."
    )
  return found[1] or found[2], int(found[3])


class _Waiting:
  def __init__(self) -> None:
    self._began = self._last = time.monotonic()

  def say(self, what: str) -> None:
    """Prints for what or whom it is waited, now and then; InputError when that was too long."""
    now = time.monotonic()
    if now - self._began > WAIT_SECONDS:
      raise InputError(f"In {WAIT_SECONDS:.0f} s there was no {what}; start all of them together.")
    if now - self._last > SECONDS_BETWEEN_LINES:
      self._last = now
      print(f"waiting for {what}", flush=True)


def _report(place: tuple[str, int], line: str, waiting: _Waiting, address: str) -> str:
  """What the first process finds wrong, "" if nothing; `line` is this one's."""
  while True:
    with contextlib.suppress(OSError), socket.create_connection(place, timeout=1.0) as connection:
      connection.sendall(line.encode() + b"\n")
      answer = b""
      while not answer.endswith(b"\n") and len(answer) < LONGEST_LINE:
        waiting.say("the other processes")
        with contextlib.suppress(TimeoutError):
          if not (more := connection.recv(LONGEST_LINE)):
            break  # it ended
          answer += more
      with contextlib.suppress(ValueError, LookupError, TypeError):  # another program's
        return str(json.loads(answer)["wrong"])
    waiting.say(f"process 0 at {address}")
    time.sleep(0.2)


def _gather(
  place: tuple[str, int], count: int, settings: Mapping[str, Any], waiting: _Waiting
) -> str:
  """Waits for all other processes and answers them with what is wrong, which it returns.

  Where something is, it waits a few seconds for others to come and hear it.
  """
  family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
  there: dict[int, str] = {}  # who has which index
  connections = []
  wrong, until = "", math.inf
  with contextlib.ExitStack() as stack:
    try:
      server = stack.enter_context(socket.create_server(place, family=family))
    except OSError as error:
      raise InputError(
        f"JAX_COORDINATOR_ADDRESS {place[0]}:{place[1]} is no address of process 0's machine, or "
        f"is in use ({error.strerror or error})."
      ) from error
    server.settimeout(0.2)
    while missing := [str(i) for i in range(1, count) if i not in there]:
      if time.monotonic() > until:
        break
      waiting.say(f"process {', '.join(missing)} of {count}")
      with contextlib.suppress(OSError):
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(1.0)
        index, who, theirs = _read(connection.makefile("rb").readline(LONGEST_LINE))
        if not index:
          continue  # another program
        connections.append(connection)
        wrong = wrong or _difference(settings, theirs, index)
        if there.setdefault(index, who) != who:
          wrong = wrong or f"Two processes have JAX_PROCESS_ID {index}."
        if wrong:
          until = min(until, time.monotonic() + SECONDS_FOR_OTHERS)
    for connection in connections:
      with contextlib.suppress(OSError):
        connection.sendall(json.dumps({"wrong": wrong}).encode() + b"\n")
  return wrong


def _read(line: bytes) -> tuple[int, str, dict[str, Any]]:
  """(index, who, settings) of a process's line; index 0 if it is none."""
  try:
    note = json.loads(line)
    return int(note["index"]), str(note["who"]), dict(note["settings"])
  except (ValueError, LookupError, TypeError, RecursionError):
    return 0, "", {}


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], index: int) -> str:
  for key in sorted(mine.keys() | theirs.keys()):
    if mine.get(key) != theirs.get(key):
      return (
        f"The processes of a job need the same settings, but {key} is {mine.get(key)!r} in process "
        f"0 and {theirs.get(key)!r} in process {index}."
      )
  return ""
