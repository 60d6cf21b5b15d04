"""Workdirs, samples and evaluations in a bucket, by the real clients and a stand-in server."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from launch import restore
from launch.encode import encode
from launch.engine.parts import Parts
from launch.evaluation import drawn, probe, training
from launch.evaluation.frontier import frontier
from launch.evaluation.output import Output
from launch.evaluation.sample_files import read_samples
from lightningdit_jax.store import fetching, latents
from tests.conftest import CLOCK, ROOT, start_job
from tests.fake_gcs import FakeGcs
from tests.survive import ended
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place

SETTINGS = "log_every_steps=5,num_steps="
CHECKPOINTS = "lr[1e-4]/checkpoints/"


@pytest.fixture
def gcs():
  with FakeGcs() as server:
    yield server


def told(text):
  lines = [json.loads(line) for line in text.splitlines()]
  return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def test_a_run_in_a_bucket_goes_on_from_its_newest_sound_checkpoint(gcs, command, tmp_path):
  words = ("tests.toy_task", "gs://bucket/lr[1e-4]", 0, 10)
  gcs.write("lr[1e-4]/checkpoints/10/params/_METADATA", b"{}")  # of a first save that was killed
  gcs.write("lr1/checkpoints/10/params/_METADATA", b"{}")  # a neighbour, if that were a pattern
  done = command(*words, SETTINGS + "20", **gcs.variables)
  assert done.returncode == 0, done.stderr
  steps = {name.split("/")[2] for name in gcs.objects if name.startswith(CHECKPOINTS)}
  assert steps == {"10", "20"}
  # One bit of the newest, and a folder of a save that was killed.
  largest = max(
    (name for name in gcs.objects if "/20/params/" in name), key=lambda x: len(gcs.objects[x][0])
  )
  content = bytearray(gcs.objects[largest][0])
  content[len(content) // 2] ^= 1
  gcs.write(largest, bytes(content))
  gcs.write("lr[1e-4]/checkpoints/25/params/_METADATA", b"{}")
  done = command(*words, SETTINGS + "40", **gcs.variables)
  assert done.returncode == 0, done.stderr
  assert "the checkpoint of step 20 is damaged (params/" in done.stdout
  steps = {name.split("/")[2] for name in gcs.objects if name.startswith(CHECKPOINTS)}
  assert steps == {"30", "40", "damaged-20"}
  assert "lr1/checkpoints/10/params/_METADATA" in gcs.objects
  local = command("tests.toy_task", tmp_path / "run", 0, 10, SETTINGS + "40")
  assert local.returncode == 0, local.stderr
  metrics = (tmp_path / "run" / "metrics.jsonl").read_text()
  assert told(gcs.objects["lr[1e-4]/metrics.jsonl"][0].decode()) == told(metrics)
  assert any(name.startswith("lr[1e-4]/tensorboard/events") for name in gcs.objects)


def test_samples_and_evaluations_are_made_in_a_bucket(
  gcs, command, environment, pipeline, tmp_path
):
  """Of a model there, by two processes; a file that was not finished is none."""
  model = pipeline / "diffusion"
  gcs.copy(model, "run")
  before = {*gcs.objects}
  words = ("launch.sample", "--num_samples=9", "--batch_size=4")
  there = ("--workdir=gs://bucket/run", "--output=gs://bucket/x.npz")
  for process in start_job((*words, *there), environment | gcs.variables, 2):
    code, printed = ended(process)
    assert code == 0, printed
  done = command(*words, f"--workdir={model}", f"--output={tmp_path / 'x.npz'}")
  assert done.returncode == 0, done.stderr
  pictures, _ = read_samples(tmp_path / "x.npz")
  with np.load(io.BytesIO(gcs.objects["x.npz"][0])) as stored:
    np.testing.assert_array_equal(stored["arr_0"], pictures)
  words = ("launch.evaluate", "generation", "--protocol=efficientnet_lite0")
  both = ("--samples=gs://bucket/x.npz", f"--reference={pipeline / 'samples.npz'}")
  done = command(*words, *both, "--output=gs://bucket/found", **gcs.variables)
  assert done.returncode == 0, done.stderr
  assert json.loads(gcs.objects["found.json"][0])["figures"]["fd_efficientnet"] > 0
  made = {f"x.{kind}" for kind in ("npz", "json", "png")}
  made |= {f"found.{kind}" for kind in ("json", "png", "html")}
  assert {*gcs.objects} - before == made


def test_an_object_whose_writing_fails_is_none(gcs):
  script = (
    "from vavae_jax.common.files import atomic_file, place\n"
    "with atomic_file(place('gs://bucket/x')) as file:\n"
    "  file.write(b'half')\n"
    "  raise KeyboardInterrupt\n"
  )
  words = [sys.executable, "-c", script]
  done = subprocess.run(words, cwd=ROOT, env=os.environ | gcs.variables, check=False)
  assert done.returncode == -signal.SIGINT
  assert not gcs.objects


@pytest.fixture
def workdir(gcs, monkeypatch):
  """One in the bucket, for this process."""
  for name, value in gcs.variables.items():
    monkeypatch.setenv(name, value)
  return place("gs://bucket/run")


def test_a_file_is_removed_by_one_request(gcs, workdir):
  gcs.write("run/x", b"")
  (workdir / "x").unlink(missing_ok=True)
  assert not gcs.objects
  (workdir / "x").unlink(missing_ok=True)
  assert gcs.asked == ["DELETE", "DELETE"]
  with pytest.raises(FileNotFoundError):
    (workdir / "x").unlink()


def test_samples_of_a_stopped_evaluation_are_in_the_bucket(gcs, workdir):
  parts = Parts(workdir / "samples.parts", 5, 2, ".x.safetensors")
  gcs.write("run/samples.parts_of_a_neighbour", b"")
  calls = []

  def sample(index):
    calls.append(index.tolist())
    return np.uint8(index)[:, None, None, None]

  first = drawn.draw(sample, lambda pictures: {"pool": pictures}, parts, mesh.make_mesh(), 3)
  next(first)
  first.close()
  assert list(gcs.objects)[1:] == ["run/samples.parts/000000000_2.x.safetensors"]
  list(drawn.draw(sample, lambda pictures: {"pool": pictures}, parts, mesh.make_mesh(), 3))
  assert calls == [[0, 1], [2, 3], [4]]
  assert [part.start for part in parts.there()] == [0, 2, 4]
  drawn.remove(parts.folder)
  assert list(gcs.objects) == ["run/samples.parts_of_a_neighbour"]


def test_evaluations_in_a_bucket_are_joined_there(gcs, workdir):
  reconstruction = {"evaluation": "reconstruction", "figures": {"psnr": 25.0}, "pictures": {}}
  judged = {"network": {}, "samples": {"pictures": 9}, "reference": {}}
  generation = {"evaluation": "generation", "figures": {"fid": 9.0}} | judged
  gcs.write("run/a.json", json.dumps(reconstruction).encode())
  gcs.write("run/b.json", json.dumps(generation).encode())
  words = ["plain/d16:gs://bucket/run/a.json:gs://bucket/run/b.json"]
  frontier(words, Output(workdir / "both", "frontier"), "psnr", "fid")
  (point,) = json.loads(gcs.objects["run/both.json"][0])["points"]
  assert point == {"name": "plain/d16", "reconstruction: psnr": 25.0, "generation: fid": 9.0}
  assert {"run/both.png", "run/both.html"} < {*gcs.objects}


def test_a_probe_stands_among_those_of_a_bucket(gcs, workdir):
  for name, kind in (("a/b", probe.KIND), ("c", probe.KIND), ("a/d", "sweep")):
    note = {"evaluation": kind, "figures": {"loss": 1.5}}
    gcs.write(f"run/{name}.json", json.dumps(note).encode())
  c = {"c": {"loss": 1.5}}
  assert probe.read_others([str(workdir)]) == c | {"a/b": {"loss": 1.5}}
  assert probe.read_others([f"{workdir}/c.json"]) == c


def test_latents_are_made_in_a_bucket_and_read_there(gcs, workdir, tokenizer, tmp_path):
  """As on a disk to the byte, by a run that goes on where another was stopped."""
  settings = {"batch_size": 8, "shard_size": 20, "dtype": "bfloat16"}
  output = workdir / "latents[1]"
  encode(tokenizer, tmp_path / "here", **settings)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(latents, "finish_store", _interrupt)
    with pytest.raises(KeyboardInterrupt):
      encode(tokenizer, output, **settings)
  for name in [name for name in gcs.objects if "shard002" in name]:
    del gcs.objects[name]
  there = encode(tokenizer, output, **settings)
  expected = {path.name: path.read_bytes() for path in (tmp_path / "here").iterdir()}
  found = {name.removeprefix("run/latents[1]/"): x for name, (x, _) in gcs.objects.items()}
  assert found == expected
  here = latents.LatentStore(tmp_path / "here")
  for index in (0, 41, 64):
    np.testing.assert_array_equal(there[index]["latent"], here[index]["latent"])
  copied = fetching.open_store(str(output), str(tmp_path / "cache"))
  assert copied.sha256 == here.sha256 == there.sha256


def _interrupt(*_):
  raise KeyboardInterrupt


def test_a_training_in_a_bucket_exports_its_model_there(gcs, workdir, tokenizer, tmp_path):
  for _ in range(2):
    training._export(restore.for_use(tokenizer), workdir)
    by_age = sorted(gcs.objects, key=lambda name: gcs.objects[name][1])
    assert by_age[-1] == "run/model/config.json"  # without which it is no model folder yet
  for name, (content, _) in gcs.objects.items():
    path = tmp_path / name.removeprefix("run/")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
  assert restore.load(tmp_path / "model", "tokenizer").sha256 == tokenizer.sha256


def test_a_url_of_no_bucket_is_refused():
  with pytest.raises(InputError, match="ftp:// is not one of gs, s3, az"):
    place("ftp://host/run")
