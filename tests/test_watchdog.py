"""A signal ends a process in time, also inside a computation that Python cannot leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT

# A loop without an end. For so many seconds there is something to save.
ENDLESS = """
import sys
import threading
import jax
from launch.engine import console, watchdog

def main():
  watchdog.PATIENCE_SECONDS = 0.5
  if seconds := float(sys.argv[1]):
    watchdog.unsaved.set()
    threading.Timer(seconds, watchdog.unsaved.clear).start()
  print("begun", flush=True)
  run = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x * 0.5 + 1.0, x))
  jax.block_until_ready(run(1.0))

console.run_command(main, argv=["endless"])
"""


@pytest.mark.parametrize(
  ("number", "unsaved"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 0), (15, 3)]
)
def test_a_signal_ends_a_computation_that_cannot_be_left(environment, number, unsaved):
  words = [sys.executable, "-c", ENDLESS, str(unsaved)]
  process = subprocess.Popen(
    words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "begun\n"
  time.sleep(0.5)
  began = time.monotonic()
  process.send_signal(number)
  _, printed = process.communicate(timeout=60)
  assert (process.returncode, printed.count("stopped; resume with: cd")) == (128 + number, 1)
  assert unsaved - 0.7 < time.monotonic() - began < unsaved + 3
