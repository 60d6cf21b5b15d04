"""What the end-to-end tests share: commands as processes, pictures, one finished tiny pipeline.

Everything here runs on the CPU. Compiling is most of the work: all processes share a compilation
cache, which tests/run.sh keeps from one run to the next, and tests and commands leave out
optimisations, which changes no property of theirs. The workers of pytest-xdist, which take a file
of tests each, share what the session's fixtures make.
"""

from __future__ import annotations

import os

# Before NumPy and JAX are loaded. Threads that wait for each other only slow arrays of this size.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A name that nothing here has may be one of the hub, which no test asks: tests have their own.
os.environ["HF_HUB_OFFLINE"] = "1"

import dataclasses
import fcntl
import gc
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxlib.version

# XLA compiles in a fifth less time with its older emitters of kernels. jax 0.11 has them no more,
# and an unknown flag ends a process.
if jaxlib.version.__version_info__ < (0, 11):
  os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import jax
import numpy as np
import pytest
from PIL import Image

from launch.engine.writers import read_metrics
from launch.report import plots
from vavae_jax.assets import load_emoji

if TYPE_CHECKING:
  from launch import restore

gc.set_threshold(10_000)  # as launch.engine.console has it
# Under nohup, or behind a shell's &, processes inherit that these are ignored, and the tests that
# end their processes with them wait for nothing.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

Command = Callable[..., subprocess.CompletedProcess]

ROOT = Path(__file__).parents[1]
PICTURES_PER_CLASS = 8
# Metrics that a clock measured, besides "EVALUATOR/took_seconds".
CLOCK = {
  "steps_per_second",
  "images_per_second",
  "data_wait_fraction",
  "model_tflops_per_second",
  "mfu",
  "slowest_process",
  "others_wait_fraction",
}


# The longest files, the longest first: begun first, so that no core waits for them at the end.
LONG = (
  "test_survival.py",
  "test_quickstart.py",
  "test_mesh.py",
  "test_diffusion_training.py",
  "test_vae_step.py",
  "test_tokenizer_training.py",
  "test_dilemma.py",
  "test_benchmark.py",
  "test_plan.py",
  "test_evaluation.py",
  "test_commands.py",
  "test_studio.py",
  "test_processes.py",
  "test_sampling.py",
  "test_stages.py",
  "test_encode.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Pytest's hook."""
  rank = {name: i for i, name in enumerate(LONG)}
  items.sort(key=lambda item: rank.get(item.path.name, len(LONG)))


def repeatable_metrics(workdir: Path) -> list[dict]:
  """The lines of a run's metrics without what a clock measured: two equal runs have the same."""
  told = [
    {k: v for k, v in line.items() if k not in CLOCK and not k.endswith("/took_seconds")}
    for line in read_metrics(workdir)
  ]
  return [line for line in told if line.keys() != {"step"}]


def made_once(
  tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]
) -> Path:
  """The folder `name` of this session, filled by the first worker to ask for it."""
  own = tmp_path_factory.getbasetemp()
  folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
  made = folder.with_suffix(".made")
  with folder.with_suffix(".lock").open("w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not made.exists():
      folder.mkdir()  # fails where another worker failed to fill it
      make(folder)
      made.touch()
  return folder


def start_job(
  words: Sequence[object], environment: Mapping[str, str], count: int = 1
) -> list[subprocess.Popen]:
  """Starts a module as a job of `count` processes, their output piped."""
  jobs: list[dict[str, str]] = [{}]
  if count > 1:
    with socket.socket() as free:
      free.bind(("localhost", 0))
      address = f"localhost:{free.getsockname()[1]}"
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count)}
    jobs = [shared | {"JAX_PROCESS_ID": str(i)} for i in range(count)]
  return [
    subprocess.Popen(
      [sys.executable, "-m", *map(str, words)],
      cwd=ROOT,
      env={**environment, **job},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for job in jobs
  ]


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The compilation cache: of this session, or the folder VAVAE_TEST_CACHE, which outlives it."""
  kept = os.environ.get("VAVAE_TEST_CACHE")
  folder = Path(kept) if kept else made_once(tmp_path_factory, "compiled", lambda folder: None)
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  return folder


@pytest.fixture(scope="session", autouse=True)
def _every_chart_can_be_read() -> Iterator[None]:
  """A test that saves a chart fails where texts of it are cut off or overlap."""
  save = plots.save

  def checked(figure: Any, path: Path, dpi: int = 100) -> Path:
    from tests.charts import crowded

    assert crowded(figure) == [], path
    return save(figure, path, dpi)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(plots, "save", checked)
    yield


@pytest.fixture(scope="session")
def environment(compiled: Path) -> dict[str, str]:
  """The variables of every process of this session."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(compiled),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


@pytest.fixture(scope="session")
def command(environment: dict[str, str]) -> Command:
  """`command("launch.train", "--workdir=...", XLA_FLAGS="...")` runs a module to its end.

  These flags are added to those of the session.
  """

  def run(*words: str, XLA_FLAGS: str = "", **variables: str) -> subprocess.CompletedProcess:
    flags = f"{environment.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()  # XLA takes " " for a file
    return subprocess.run(
      [sys.executable, "-m", *map(str, words)],
      cwd=ROOT,
      env=environment | variables | {"XLA_FLAGS": flags},
      capture_output=True,
      text=True,
      timeout=600,
      check=False,
    )

  return run


@dataclasses.dataclass
class Done:
  """What a command left: its exit code, its output, and the modules that it had imported."""

  returncode: int
  stdout: str
  stderr: str
  modules: set[str]


@pytest.fixture(scope="session")
def forked(
  environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Done]]:
  """`forked([["launch.train", ...], ...], imported="jax")` runs command lines; see forked.py.

  These variables are added to those of the session.
  """

  def run(lines: Iterable[Sequence[object]], imported: str, **variables: str) -> list[Done]:
    lines = list(lines)
    folder = tmp_path_factory.mktemp("forked")
    words = [sys.executable, "-m", "tests.forked", str(folder), imported]
    given = json.dumps([list(map(str, line)) for line in lines])
    subprocess.run(words, cwd=ROOT, env=environment | variables, input=given, text=True, check=True)
    answers = []
    for number in range(len(lines)):
      told = json.loads((folder / f"{number}.json").read_text())
      files = (folder / f"{number}.{suffix}" for suffix in ("out", "err"))
      streams = [file.read_text() if file.exists() else "" for file in files]
      answers.append(Done(told["code"], *streams, set(told["modules"])))
    return answers

  return run


@pytest.fixture(scope="session")
def two_processes(environment: dict[str, str]) -> Callable[..., None]:
  """`two_processes("launch.train", "--workdir=...")` runs a module as a job of two processes."""

  def run(*words: str) -> None:
    for process in start_job(words, environment, 2):
      output, _ = process.communicate(timeout=600)
      assert process.returncode == 0, output

  return run


def write_pictures(root: Path) -> None:
  """Class folders with a few emoji each."""
  images, labels, _, class_names = load_emoji()
  for label, name in enumerate(class_names):
    folder = root / f"{label} {name}"
    folder.mkdir()
    for index in np.flatnonzero(labels == label)[:PICTURES_PER_CLASS]:
      Image.fromarray(images[index]).save(folder / f"{index}.png")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A folder of class folders with a few emoji each."""
  return made_once(tmp_path_factory, "pictures", write_pictures)


@pytest.fixture(scope="session")
def quickstart(pictures: Path) -> Callable[[Path], list[str]]:
  """The command line of the tiny pipeline on these pictures in a workdir."""

  def words(workdir: Path) -> list[str]:
    return [
      "launch.quickstart",
      "--config=configs/quickstart.py:pipeline,tiny",
      f"--config.tokenizer.data.source=folder:{pictures}",
      "--config.encode.shard_size=20",
      f"--workdir={workdir}",
    ]

  return words


@pytest.fixture(scope="session")
def pipeline(
  command: Command,
  quickstart: Callable[[Path], list[str]],
  tmp_path_factory: pytest.TempPathFactory,
) -> Path:
  """The workdir of a tiny pipeline that nobody disturbed; tests only read it."""

  def make(workdir: Path) -> None:
    done = command(*quickstart(workdir))
    assert done.returncode == 0, done.stderr

  return made_once(tmp_path_factory, "pipeline", make)


@pytest.fixture(scope="session")
def tokenizer(pipeline: Path) -> restore.Trained:
  """Its tokenizer."""
  from launch import restore  # takes half a second, which tests of plain functions do without

  return restore.load(pipeline / "tokenizer", "tokenizer")


@pytest.fixture(scope="session")
def diffusion(pipeline: Path) -> restore.Trained:
  """Its diffusion model."""
  from launch import restore  # takes half a second, which tests of plain functions do without

  return restore.load(pipeline / "diffusion", "diffusion")
