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
from pathlib import Path
from configs import quickstart
from launch import train

config = quickstart.tokenizer(tiny=True)
config.data.source = "npz:pictures.npz"
config.teacher.name = "moments"
train.train(config, Path("tokenizer"))
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
  lines = (tree / "tokenizer" / "metrics.jsonl").read_text().splitlines()
  metrics = {name: value for line in lines for name, value in json.loads(line).items()}
  assert np.isfinite(metrics["vf_cos"])
