"""Processes of a job meet before jax connects them.

It would wait in silence for one that is missing, and fail in the middle of the work where their
settings differ. The first process listens at the address of the job, the others send it a line
each; when all are there it answers, and frees the address for jax.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from vavae_jax.common.errors import InputError

SECONDS_BETWEEN_LINES = 10.0
WAIT_SECONDS = 300.0  # as jax waits
LONGEST_LINE = 2**20
OK = "ok"


def meet(address: str, count: int, index: int, settings: Mapping[str, Any]) -> None:
  """Returns when all `count` processes are there; says every ten seconds who is missing.

  Raises:
    InputError: the address cannot be listened at, somebody has not come after five minutes, or has
      other settings than the first process.
  """
  host, _, port = address.rpartition(":")
  place = (host.strip("[]"), int(port))
  waiting = _Waiting()
  if index:
    answer = _report(place, json.dumps({"index": index, "settings": settings}), waiting, address)
    if answer != OK:
      raise InputError(answer)
  elif count > 1:
    _gather(place, count, settings, waiting)


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
  """The first process's answer to a line."""
  while True:
    with contextlib.suppress(OSError), socket.create_connection(place, timeout=1.0) as connection:
      connection.sendall(line.encode() + b"\n")
      while True:
        waiting.say("the other processes")
        with contextlib.suppress(TimeoutError):
          if answer := connection.recv(LONGEST_LINE):
            return answer.decode()
          break  # it ended
    waiting.say(f"process 0 at {address}")
    time.sleep(0.2)


def _gather(
  place: tuple[str, int], count: int, settings: Mapping[str, Any], waiting: _Waiting
) -> None:
  """Waits for all other processes and answers them."""
  family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
  there: dict[int, socket.socket] = {}
  wrong = ""
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
      waiting.say(f"process {', '.join(missing)} of {count}")
      with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        connection = stack.enter_context(server.accept()[0])
        connection.settimeout(1.0)
        note = json.loads(connection.makefile("rb").readline(LONGEST_LINE))
        there[int(note["index"])] = connection
        wrong = wrong or _difference(settings, note["settings"], int(note["index"]))
    for connection in there.values():
      with contextlib.suppress(OSError):
        connection.sendall((wrong or OK).encode())
  if wrong:
    raise InputError(wrong)


def _difference(mine: Mapping[str, Any], theirs: Mapping[str, Any], index: int) -> str:
  for key in sorted(mine.keys() | theirs.keys()):
    if mine.get(key) != theirs.get(key):
      return (
        f"The processes of a job need the same settings, but {key} is {mine.get(key)!r} in process "
        f"0 and {theirs.get(key)!r} in process {index}."
      )
  return ""
