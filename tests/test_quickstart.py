"""The whole pipeline as a person runs it, undisturbed and killed in the middle of each stage."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from launch import restore
from launch.engine.writers import read_metrics
from lightningdit_jax.store.latents import LatentStore
from lightningdit_jax.store.space import NOTE
from tests.conftest import ROOT, repeatable_metrics
from vavae_jax import training
from vavae_jax.assets import load_emoji
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import read_note, write_json

# Of each stage the file that is about to be there when the process dies, somewhere in its middle.
KILLS = [
  "tokenizer/checkpoints/4",
  "latents/latents_rank00_shard001.safetensors",
  "diffusion/checkpoints/4",
  "samples.parts/000000009_9.npy",
  "generation.json",
  "report.html",
]
FIGURES = ["reconstruction.json", "generation.json", "samples.npz", "reconstruction.png"]


def content(path: Path) -> object:
  """Of a file, but for when and how it was made."""
  if path.suffix != ".json":
    return path.read_bytes()
  return {name: value for name, value in json.loads(path.read_text()).items() if name != "run"}


def test_pipeline_leaves_what_it_promises(pipeline):
  figures = json.loads((pipeline / "generation.json").read_text())
  assert figures["samples"]["pictures"] == 18
  assert figures["figures"]["fd_efficientnet"] > 0
  page = (pipeline / "report.html").read_text()
  assert "FD-EfficientNet" in page
  assert "http://" not in page.replace("http://www.w3.org", "")
  assert list((pipeline / "latents").glob("*shard003.safetensors"))
  assert not (pipeline / "samples.parts").exists()


def test_the_figures_of_a_tokenizer_are_those_that_it_announces(pipeline):
  config = restore.load(pipeline / "tokenizer", "tokenizer").config
  written = {name for line in read_metrics(pipeline / "tokenizer") for name in line if "/" in name}
  assert written - {"reconstruction/took_seconds"} == {*training.figures(config)}


def test_second_start_of_a_finished_run_computes_nothing_again(command, quickstart, pipeline):
  kept = [
    *(pipeline / "tokenizer").rglob("checkpoints/6/*/*"),
    *(pipeline / "diffusion").rglob("checkpoints/6/*/*"),
    *(pipeline / "latents").glob("*shard*"),
    pipeline / "samples.npz",
  ]
  before = {path: path.stat().st_mtime_ns for path in kept}
  figures = {name: content(pipeline / name) for name in FIGURES}
  done = command(*quickstart(pipeline))
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("already has all 6 steps") == 2
  assert {path: path.stat().st_mtime_ns for path in kept} == before
  assert {name: content(pipeline / name) for name in FIGURES} == figures


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_python_of_the_pages_runs(page, pipeline, tmp_path, monkeypatch):
  """On a model whose classes are called as those of the pictures that the package carries."""
  monkeypatch.chdir(tmp_path)
  model = shutil.copytree(pipeline / "diffusion", "runs/quickstart/diffusion")
  note = read_note(Path(model, NOTE))
  write_json(Path(model, NOTE), note | {"class_names": load_emoji()[3]})
  Path("model").symlink_to(model)
  lines = re.search(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)[1]
  found: dict = {}
  exec(lines, found)
  assert len(found["pictures"]) == 8
  assert found["again"].size == found["pictures"][0].size


@pytest.fixture(scope="module")
def killed(command, quickstart, tmp_path_factory) -> Path:
  """A workdir whose run was killed once in each stage and started again each time."""
  workdir = tmp_path_factory.mktemp("killed")
  for name in KILLS:
    done = command("tests.killed", f"*/{name}", *quickstart(workdir))
    assert done.returncode == -signal.SIGKILL, (name, done.stderr)
    assert not (workdir / name).exists()
  done = command(*quickstart(workdir))
  assert done.returncode == 0, done.stderr
  return workdir


def test_a_run_killed_in_every_stage_ends_with_the_same_figures(pipeline, killed):
  for name in FIGURES:
    assert content(killed / name) == content(pipeline / name), name


def test_a_run_killed_in_every_stage_tells_the_same_story(pipeline, killed):
  for part in ("tokenizer", "diffusion"):
    assert repeatable_metrics(killed / part) == repeatable_metrics(pipeline / part)


def test_a_run_killed_in_every_stage_has_the_same_latents(pipeline, killed):
  shards = sorted((pipeline / "latents").glob("*.safetensors"))
  assert len(shards) == 5  # four of 65 pictures, and the statistics
  for shard in shards:
    assert (killed / "latents" / shard.name).read_bytes() == shard.read_bytes()


@pytest.mark.parametrize(
  ("name", "read"),
  [
    ("tokenizer/config.json", lambda root: restore.load(root / "tokenizer", "tokenizer")),
    ("tokenizer/metrics.jsonl", lambda root: read_metrics(root / "tokenizer")),
    ("latents/manifest.json", lambda root: LatentStore(root / "latents").manifest),
    ("samples.json", lambda root: read_note(root / "samples.json")),
  ],
)
def test_a_note_that_a_hand_damaged_is_named(pipeline, tmp_path, name, read):
  (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
  for shard in (pipeline / "latents").iterdir() if "latents" in name else ():
    (tmp_path / "latents" / shard.name).symlink_to(shard)
  (tmp_path / name).unlink(missing_ok=True)
  (tmp_path / name).write_text((pipeline / name).read_text().replace(":", "", 1))
  with pytest.raises(InputError, match=rf"{Path(name).name}.* is damaged .*line 1|column"):
    read(tmp_path)
