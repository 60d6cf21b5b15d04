"""A workdir in a bucket: written, damaged, resumed, by the real clients and a stand-in server."""

from __future__ import annotations

import json

import pytest

from tests.conftest import CLOCK
from tests.fake_gcs import FakeGcs
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


def test_a_url_of_no_bucket_is_refused():
  with pytest.raises(InputError, match="ftp:// is not one of gs, s3, az"):
    place("ftp://host/run")
