"""Two real processes train as one does, and a job resumes with another number of them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from launch.engine import processes, rendezvous
from launch.engine.writers import curve, read_metrics
from lightningdit_jax import Pipeline
from tests.conftest import ROOT, start_job
from tests.survive import ended
from vavae_jax.common.errors import InputError


@pytest.fixture
def training(pipeline):
  """The command of a training of four steps, with an early head and Muon."""
  settings = ["--config.num_steps=4", "--config.save_every_steps=2", "--config.log_every_steps=1"]
  return [
    *("launch.train", "--config=configs/quickstart.py:diffusion,tiny", *settings),
    *("--config.evaluate_every_steps=2", f"--config.latents.path={pipeline / 'latents'}"),
    *(f"--config.latents.valid_path={pipeline / 'latents'}", "--config.export=end"),
    *("--config.model.early_head=1", "--config.optimizer.muon=True"),
    "--config.sample.internal_scale=1.5",
  ]


def figures(workdir, name):
  return dict(curve(read_metrics(workdir), name))


def test_two_processes_train_as_one(training, two_processes, environment, command, tmp_path):
  """They are killed while they draw samples; and the second half is one process's."""
  done = command(*training, f"--workdir={tmp_path / 'one'}")
  assert done.returncode == 0, done.stderr
  half = [word.replace("num_steps=4", "num_steps=2") for word in training]
  half.append(f"--workdir={tmp_path / 'two'}")
  # Of 36 samples 18 are drawn at once.
  both = start_job(("tests.killed", "*/samples.parts/000000027_9.*", *half), environment, 2)
  assert ended(both[1])[0] == -signal.SIGKILL
  both[0].kill()
  both[0].communicate()
  parts = tmp_path / "two" / "samples.parts"
  assert {"000000000_9", "000000009_9"} <= {path.name.partition(".")[0] for path in parts.iterdir()}
  # What is done is not made again, or this would be killed too.
  two_processes("tests.killed", "*/samples.parts/000000009_9.*", *half)
  assert not parts.exists()
  assert Pipeline.load(tmp_path / "two" / "model").origin["step"] == 2
  done = command(*training, f"--workdir={tmp_path / 'two'}")
  assert done.returncode == 0, done.stderr
  # Of 16 records in two parts, each of two devices had 4 at once.
  assert "devices: 1, 2 before; config.accumulate_steps is 4" in " ".join(done.stdout.split())
  for name, steps in {"loss": [1, 2, 3, 4], "validation/early_mse": [2, 4]}.items():
    one, two = (figures(tmp_path / workdir, name) for workdir in ("one", "two"))
    assert list(one) == list(two) == steps
    # Sums over devices are taken in another order.
    np.testing.assert_allclose(list(two.values()), list(one.values()), rtol=1e-4)
  for step in (2, 4):
    path = f"pictures/samples_grid/{step:08d}.png"
    one, two = (np.asarray(Image.open(tmp_path / x / path), int) for x in ("one", "two"))
    assert abs(one - two).max() <= 1, step


@pytest.mark.parametrize(
  ("variables", "message"),
  [
    ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES is not"),
    (
      {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
      r"JAX_PROCESS_ID '2' is not in 0\.\.",
    ),
    (
      {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "\u00b2"},
      r"JAX_PROCESS_ID '\u00b2' is not in 0\.\.",
    ),
  ],
)
def test_half_a_job_is_refused(variables, message, monkeypatch):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(InputError, match=message):
    processes.start()


def test_a_command_for_one_process_refuses_several(environment, pipeline, tmp_path):
  """What each of them would write is the same folder."""
  words = ("launch.export", f"--workdir={pipeline / 'diffusion'}", f"--output={tmp_path / 'model'}")
  for code, printed in map(ended, start_job(words, environment, 2)):
    assert (code, "for one process, and 2 were started" in printed) == (2, True), printed
  assert not [*tmp_path.iterdir()]


@pytest.fixture
def address():
  with socket.create_server(("127.0.0.1", 0)) as free:
    return f"127.0.0.1:{free.getsockname()[1]}"


def meet(address, settings, late=0.0, indices=(0, 1, 2), counts=(3, 3, 3)):
  """What each process ends with, "" or its error; the last one comes late."""

  def one(i):
    time.sleep(late if i == len(settings) - 1 else 0.0)
    try:
      rendezvous.meet(address, counts[i], indices[i], settings[i])
    except InputError as error:
      return str(error)
    return ""

  with ThreadPoolExecutor() as pool:
    return list(pool.map(one, range(len(settings))))


def test_processes_meet_and_say_who_is_missing(address, monkeypatch, capsys):
  monkeypatch.setattr(rendezvous, "SECONDS_BETWEEN_LINES", 0.1)
  assert meet(address, [{"config.seed": 1}] * 3, late=1.5) == ["", "", ""]
  told = capsys.readouterr().out
  assert "waiting for process 2 of 3" in told
  assert "waiting for the other processes" in told
  socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))).close()  # free for jax


def test_other_settings_end_all_processes_by_name(address):
  ended = meet(address, [{"config.seed": 1}, {"config.seed": 1}, {"config.seed": 2}])
  assert set(ended) == {
    "The processes of a job need the same settings, but config.seed is 1 in process 0 and 2 in "
    "process 2."
  }


@pytest.fixture
def slurm(environment):
  """The variables of two processes whose job jax finds by itself."""
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  shared = {
    **{"DISTRIBUTED": "1", "JAX_COORDINATOR_PORT": str(port)},
    **{"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"},
  }
  return [{**environment, **shared, "SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]


@pytest.mark.parametrize("same", [False, True])
def test_processes_that_a_cluster_starts_compare_their_settings(slurm, same):
  running = [
    subprocess.Popen(
      [sys.executable, "-m", "launch.convert", f"--step={0 if same else rank}", "x", "y"],
      cwd=ROOT,
      env=variables,
      stderr=subprocess.PIPE,
      text=True,
    )
    for rank, variables in enumerate(slurm)
  ]
  for process in running:
    _, printed = process.communicate(timeout=100)
    assert process.returncode == 2
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: The processes of a job need the same settings") != same


@pytest.mark.parametrize(
  ("given", "told"),
  [
    ({"indices": (0, 1, 1)}, "Two processes have JAX_PROCESS_ID 1."),
    ({"counts": (4, 4, 2)}, "JAX_NUM_PROCESSES is 4 in process 0 and 2 in process 2."),
  ],
)
def test_another_count_or_index_ends_all_processes(given, told, address, monkeypatch):
  monkeypatch.setattr(rendezvous, "SECONDS_FOR_OTHERS", 0.2)
  ended = meet(address, [{}] * 3, late=0.3, **given)
  assert all(line.endswith(told) for line in ended)


@pytest.mark.parametrize(
  "line", [b"GET / HTTP/1.0\r\n\r\n", b'{"index": 1, "who": "", "settings": null}\n', b"[" * 10**5]
)
def test_another_program_at_the_address_disturbs_nobody(line, address):
  with ThreadPoolExecutor() as pool:
    first = pool.submit(rendezvous.meet, address, 2, 0, {})
    time.sleep(0.2)
    with socket.create_connection(rendezvous.place_of(address)) as stranger:
      stranger.sendall(line)
    rendezvous.meet(address, 2, 1, {})
    first.result()


@pytest.mark.parametrize(
  "address", ["host", ":1234", "::1:1234", "host:0", "host:65536", "host:\u00b2", "0.0.0.0"]
)
def test_what_is_no_address_is_refused(address):
  with pytest.raises(InputError, match="give HOST:PORT, or"):
    rendezvous.meet(address, 2, 1, {})


def test_nobody_waits_for_ever(address, monkeypatch):
  monkeypatch.setattr(rendezvous, "WAIT_SECONDS", 0.5)
  for index, missing in ((0, "process 1 of 2"), (1, "process 0 at 127")):
    with pytest.raises(InputError, match=f"there was no {missing}"):
      rendezvous.meet(address, 2, index, {})


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(host):
  with pytest.raises(InputError, match=f"{host}:1234 is no address of process 0's machine"):
    rendezvous.meet(f"{host}:1234", 2, 0, {})


def test_the_coordinator_listens_where_it_was_told(address, monkeypatch):
  given = {}
  monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *_, **o: given.update(o))
  for name, value in zip(processes._VARIABLES, (address, "1", "0"), strict=True):
    monkeypatch.setenv(name, value)
  processes.start()
  assert given["coordinator_bind_address"] == address
