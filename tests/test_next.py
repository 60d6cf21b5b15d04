"""The command that a command tells to follow it can be given: it comes to where its work begins."""

from __future__ import annotations

import re
import shlex
import shutil

import pytest

from launch.convert import convert
from launch.evaluation.features import EFFICIENTNET
from tests import cases

FORMATS = cases.FOLDER / "formats"


@pytest.fixture(scope="module")
def told(forked, pipeline, pictures, tmp_path_factory):
  """{name of a command: the words of the lines that it told, which were given and did no wrong}."""
  root = tmp_path_factory.mktemp("next")
  convert(str(FORMATS / "vavae_lightning.ckpt"), root / "vae")
  latents = shutil.copytree(pipeline / "latents", root / "latents")
  (root / "statistics").mkdir()
  shutil.copy(FORMATS / "latents" / "latents_stats.pt", root / "statistics")
  diffusion, tokenizer = (f"--workdir={pipeline / name}" for name in ("diffusion", "tokenizer"))
  own = f"--tokenizer={pipeline / 'tokenizer'}"
  judged = (f"--reference={pictures}", f"--protocol={EFFICIENTNET}")
  dit, tiny = FORMATS / "lightningdit_bare_state_dict.pt", "configs/quickstart.py:diffusion,tiny"
  starts = {
    "latents": ["evaluate", "latents", f"--latents={latents}"],
    "reconstruction": ["evaluate", "reconstruction", tokenizer, "--step=4", "--protocol=none"],
    "generation": ["evaluate", "generation", diffusion, "--step=4", "--ema=0.0", own, *judged],
    "gaussians": ["evaluate", "generation", f"--gaussians={latents}", "--num_samples=9", *judged],
    "solvers": ["evaluate", "solvers", diffusion, "--step=4", "--ema=0.0", "--grid=num_steps=2"],
    "statistics.npz": ["evaluate", "statistics", *judged, "--image_size=32"],
    "probe": ["evaluate", "probe", tokenizer, "--step=4"],
    "convert": ["convert", dit],
    "statistics alone": ["convert", dit, f"--latents={root / 'statistics'}"],
    "train": ["train", f"--config={tiny}", "--config.model.in_channels=8"],
  }
  starts["train"].append(f"--config.latents.path={FORMATS / 'latents'}")  # of an unknown tokenizer
  outputs = {"convert": "{}", "train": "--workdir={}", "evaluate": "--output={}"}
  lines = {
    name: [f"launch.{words[0]}", *words[1:], outputs[words[0]].format(root / name)]
    for name, words in starts.items()
  }
  here = {
    "--tokenizer=TOKENIZER": root / "vae",
    "--latents=LATENTS": root / "statistics",
    "--output=LATENTS": root / "encoded",
    "--workdir=DIFFUSION": pipeline / "diffusion",
    "--samples=SAMPLES.npz": pipeline / "samples.npz",
  }
  found = {}
  while lines:
    words = [["tests.without_work", *line] for line in lines.values()]
    answers = forked(words, "launch.evaluate,launch.quickstart")
    asked, lines = lines, {}
    for (name, line), done in zip(asked.items(), answers, strict=True):
      assert done.returncode == 0, (name, line, done.stderr)
      if name in starts or "launch.convert" in line:
        (after,) = re.findall("^next: python -m (.*)$", done.stdout, re.MULTILINE)
        found[name] = shlex.split(after)
        lines[f"{name}, next"] = [
          f"{word.partition('=')[0]}={here[word]}" if word in here else word for word in found[name]
        ]
    lines.pop("train, next", None)  # there is no checkpoint
  return found


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("latents", "launch.train --config.model.input_size=4 --config.batch_size=64"),
    ("reconstruction", "launch.export --step=4"),
    ("generation", "launch.export --step=4 --ema=0.0"),
    ("gaussians", "launch.evaluate generation --num_samples=9"),
    ("solvers", "launch.sample --step=4 --ema=0.0"),
    ("statistics.npz", "launch.evaluate generation"),
    ("probe", "launch.encode --step=4"),
    ("convert", "launch.convert --latents=LATENTS --tokenizer=TOKENIZER"),
    ("convert, next", "launch.sample"),
    ("statistics alone", "launch.sample --tokenizer=TOKENIZER"),
    ("train", "launch.sample --tokenizer=TOKENIZER"),
  ],
)
def test_a_command_tells_one_that_can_be_given(told, name, words):
  assert {*words.split()} <= {*told[name]}
  assert ("--tokenizer=TOKENIZER" in told[name]) == ("--tokenizer=TOKENIZER" in words)
