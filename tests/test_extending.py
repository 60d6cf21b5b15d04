"""The diffs of docs/extending.md apply, each alone and all together, and do what the page says."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text()
# Of each section with a diff: its heading and the diff.
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?```diff\n(.*?)```", TEXT, re.M | re.S))
FOLDERS = ("vavae_jax", "lightningdit_jax", "launch", "configs")
# One process, which imports and compiles once: each stage begins where the one before ended.
RUN = """
import runpy
import sys
from pathlib import Path

import jax
from configs import quickstart
from launch import encode, restore, sample, train

config = quickstart.tokenizer(tiny=True)
config.update(num_steps=2, evaluate_every_steps=0)
config.data.source = "npz:pictures.npz"
config.teacher.name = "moments"
config.loss.l2_weight = 1.0
train.train(config, Path("tokenizer"))
tokenizer = restore.load(Path("tokenizer"), "tokenizer")
encode.encode(tokenizer, Path("latents"), batch_size=8)

config = quickstart.diffusion(tiny=True)
config.update(num_steps=2, evaluate_every_steps=0)
config.latents.path = "latents"
config.model.update(use_layer_scale=True, num_classes=3)
config.transport.update(prediction="data", path_type="Smooth", use_cosine_loss=False)
train.train(config, Path("diffusion"))
diffusion = restore.load(Path("diffusion"), "diffusion")
assert "layer_scale" in str(jax.tree.structure(diffusion.params))
sample.sample_set(diffusion, tokenizer, Path("samples.npz"), num_samples=2)

words = "reconstruction --workdir=tokenizer --protocol=none --output=reconstruction"
sys.argv = ["launch.evaluate", *words.split()]
runpy.run_module("launch.evaluate", run_name="__main__", alter_sys=True)
"""


def apply(diff: str, folder: Path, *options: str) -> None:
  done = subprocess.run(
    ["git", "apply", *options, "-"],
    cwd=folder,
    input=diff,
    text=True,
    capture_output=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def metrics(workdir: Path) -> dict[str, float]:
  """The last value of each metric."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {name: value for line in lines for name, value in json.loads(line).items()}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
  """A copy of the code, outside of any repository."""
  folder = tmp_path_factory.mktemp("extended")
  for name in FOLDERS:
    ignored = shutil.ignore_patterns("__pycache__", "moved")
    shutil.copytree(ROOT / name, folder / name, ignore=ignored)
  return folder


def test_each_change_applies_alone(tree):
  assert len(SECTIONS) == len(re.findall("^## ", TEXT, re.M))
  for name, diff in SECTIONS.items():
    apply(diff, tree, "--check")
    files = re.findall(r"^\+\+\+ b/(\S+)", diff, re.M)
    assert len(files) <= 2, f"{name} touches {files}"


def test_all_changes_together_train_and_sample(tree, environment):
  for diff in SECTIONS.values():
    apply(diff, tree)
  draw = np.random.default_rng(0)
  np.savez(
    tree / "pictures.npz",
    arr_0=draw.integers(0, 256, (24, 32, 32, 3), np.uint8),
    arr_1=np.arange(24) % 3,
  )
  done = subprocess.run(
    [sys.executable, "-c", RUN],
    cwd=tree,
    env={**environment, "PYTHONPATH": str(tree)},
    text=True,
    capture_output=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  found = metrics(tree / "tokenizer")
  assert np.isfinite([found["vf_cos"], found["l2"]]).all()
  assert np.isfinite(metrics(tree / "diffusion")["mse"])
  with np.load(tree / "samples.npz") as samples:
    assert samples["arr_0"].shape == (2, 64, 64, 3)
  figures = json.loads((tree / "reconstruction.json").read_text())["figures"]
  assert figures["psnr_worst"] <= figures["psnr"]
