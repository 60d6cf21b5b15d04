"""What commands write is the same to the bit by one process, and by others after a kill."""

from __future__ import annotations

import io
import json
import signal

import numpy as np
import pytest

from tests.conftest import start_job
from tests.fake_gcs import FakeGcs
from tests.survive import ended


@pytest.fixture
def shared(environment, tmp_path):
  """`shared(words, output, killed_at)`: the folder of an output of one process; that of two, of
  which one dies as it gives a file the name `killed_at`, and then four; what the two had left.
  """

  def run(words, output, killed_at):
    (tmp_path / "one").mkdir()
    (tmp_path / "pod").mkdir()
    finish(start_job((*words, f"--output={tmp_path / 'one' / output}"), environment))
    words = (*words, f"--output={tmp_path / 'pod' / output}")
    both = start_job(("tests.killed", killed_at, *words), environment, 2)
    assert ended(both[1])[0] == -signal.SIGKILL
    both[0].kill()
    both[0].communicate()
    left = {path.name for path in (tmp_path / "pod").rglob("*_*.*")}
    finish(start_job(words, environment, 4))
    return tmp_path / "one", tmp_path / "pod", left

  return run


def finish(job):
  for process in job:
    code, printed = ended(process)
    assert code == 0, printed


def test_samples(shared, pipeline):
  words = ("launch.sample", f"--workdir={pipeline / 'diffusion'}", "--num_samples=21")
  one, pod, left = shared((*words, "--batch_size=4"), "x.npz", "*/000000012_4.npy")
  assert "000000004_4.npy" in left  # of the one that was killed
  files = {path.name: path.read_bytes() for path in one.iterdir()}
  assert sorted(files) == ["x.json", "x.npz", "x.png"]
  assert files == {path.name: path.read_bytes() for path in pod.iterdir()}


def test_latents(shared, pipeline):
  words = ("launch.encode", f"--workdir={pipeline / 'tokenizer'}", "--batch_size=4")
  one, pod, left = shared((*words, "--shard_size=10"), "x", "*/parts/000000036_4.safetensors")
  assert "000000028_4.safetensors" in left  # of the one that was killed, in two shards
  files = {path.name: path.read_bytes() for path in (one / "x").iterdir()}
  assert files == {path.name: path.read_bytes() for path in (pod / "x").iterdir()}


@pytest.fixture(scope="module")
def evaluations(command, pipeline, tmp_path_factory):
  """The folder of what `tests.evaluations_everywhere` writes, and what it prints."""
  output = tmp_path_factory.mktemp("evaluations")
  runs = "one:1,pod:2:*/samples/000000010_10.*,pod:3"
  done = command("tests.evaluations_everywhere", pipeline, output, runs)
  assert done.returncode == 0, done.stderr
  return output, done.stdout


@pytest.mark.parametrize(
  "kind", ["generation", "reconstruction", "latents", "solvers", "frontier", "sweep"]
)
def test_evaluations(evaluations, kind):
  output, printed = evaluations
  assert "left by pod:2:*/samples/000000010_10.*: ['reference', " in printed
  one, pod = (told((output / run / f"{kind}.json").read_text()) for run in ("one", "pod"))
  assert one == pod


def told(text):
  """What an evaluation's JSON says but for machine and time."""
  found = json.loads(text)
  del found["run"]
  for point in found.get("points", ()):
    point.pop("seconds", None)
  return found


def test_statistics(evaluations):
  output, _ = evaluations
  one, pod = (np.load(output / run / "statistics.npz") for run in ("one", "pod"))
  assert set(one) == set(pod) == {"about", "size", "mu", "sigma", "mu_s", "sigma_s"}
  for name in one:
    np.testing.assert_array_equal(one[name], pod[name])


def test_evaluations_in_a_bucket(evaluations, command, pipeline):
  """By two processes, of a model and latents that are there: as on a disk, and nothing else."""
  here = evaluations[0] / "one"
  with FakeGcs() as gcs:
    for name in ("diffusion", "latents"):
      gcs.copy(pipeline / name, name)
    before = {*gcs.objects}
    words = ("tests.evaluations_everywhere", "gs://bucket", "gs://bucket/found", "pod:2")
    done = command(*words, **gcs.variables)
    assert done.returncode == 0, done.stderr
  there = {x.removeprefix("found/pod/"): gcs.objects[x][0] for x in {*gcs.objects} - before}
  files = {path.relative_to(here): path for path in here.rglob("*") if path.is_file()}
  assert {*there} == {str(name) for name in files if name.parts[0] != "cache"}
  for name, content in there.items():
    if name.endswith(".npz"):
      found, expected = np.load(io.BytesIO(content)), np.load(here / name)
      assert all(np.array_equal(found[key], expected[key]) for key in expected), name
    elif name.startswith("sweep.points/"):
      assert content == (here / name).read_bytes(), name
    elif name.endswith(".json"):
      found, expected = told(content), told((here / name).read_text())
      if name == "latents.json":
        assert found["latents"].pop("path") != expected["latents"].pop("path")
      assert found == expected, name


def test_features(evaluations):
  output, _ = evaluations
  one, pod = (
    {path.name: path.read_bytes() for path in (output / run / "cache").iterdir()}
    for run in ("one", "pod")
  )
  assert {name.rpartition(".")[2] for name in one} == {"npy", "json"}
  assert one == pod
