"""A signal ends a process in time, also inside a computation that Python cannot leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.engine import watchdog
from tests.conftest import ROOT

# A loop without an end. For so many seconds there is something to save, which the main thread alone
# can save; or the watchdog, where it is "now". At the "start" jax waits for other processes.
ENDLESS = """
import contextlib
import sys
import threading
import jax
from launch.engine import console, watchdog

def main(*_):
  watchdog.PATIENCE_SECONDS = 0.5
  unsaved = sys.argv[1]
  if unsaved != "0":
    watchdog.unsaved.there = True
  if unsaved not in ("0", "now"):
    threading.Timer(float(unsaved), setattr, (watchdog.unsaved, "there", False)).start()
  print("begun", flush=True)
  run = jax.jit(lambda x: jax.lax.while_loop(lambda x: x > 0, lambda x: x * 0.5 + 1.0, x))
  save = (lambda: print("saved")) if unsaved == "now" else None
  with watchdog.unsaved.saved_by(save):
    jax.block_until_ready(run(1.0))

if sys.argv[1] == "start":
  sys.argv[1], console.processes.start = "0", main
console.run_command(main, argv=["endless"])
"""


@pytest.mark.parametrize(
  ("number", "unsaved"),
  [(signal.SIGTERM, "0"), (signal.SIGHUP, "0"), (2, "0"), (15, "3"), (15, "now"), (15, "start")],
)
def test_a_signal_ends_a_computation_that_cannot_be_left(environment, number, unsaved):
  words = [sys.executable, "-c", ENDLESS, unsaved]
  process = subprocess.Popen(
    words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout.readline() == "begun\n"
  time.sleep(0.5)
  began = time.monotonic()
  process.send_signal(number)
  try:
    output, printed = process.communicate(timeout=60)
  finally:
    process.kill()  # it would compute for ever
  assert (process.returncode, printed.count("stopped; resume with: cd")) == (128 + number, 1)
  assert output == ("saved\n" if unsaved == "now" else "")
  least = 3 if unsaved == "3" else 0
  assert least - 0.7 < time.monotonic() - began < least + 3


def test_what_another_thread_saves_the_main_one_does_not_go_on_from():
  unsaved = watchdog._Unsaved()
  left = threading.Event()

  def compute(begun):
    with unsaved.saved_by(print):
      begun.set()
      time.sleep(0.2)
    left.set()

  begun = threading.Event()
  threading.Thread(target=compute, args=(begun,), daemon=True).start()
  begun.wait()
  assert unsaved.take() is print
  assert not left.wait(0.5)
  assert watchdog._Unsaved().take() is None
