"""launch.lab.equivalence training of tokenizers: what both sides begin with, what the page says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs.lab import training as recipes
from launch import train
from launch.engine import loop
from launch.lab.equivalence import side_by_side, tokenizer_page, tokenizer_pieces
from launch.lab.equivalence.side_results import Results
from launch.lab.equivalence.training import LOGGED
from launch.lab.jobs import Record
from launch.lab.reference import Checkouts
from vavae_jax.common.files import write_json
from vavae_jax.weights.torch_writer import write_torch_file

CHECKOUT, TAMING = os.environ.get("LIGHTNINGDIT", ""), os.environ.get("TAMING", "")
JUDGED = f"{tokenizer_pieces.JUDGE}main.0.weight"


def settings(root: Path):
  checkouts = Checkouts(Path(CHECKOUT), TAMING, sys.executable, compiled=False)
  experiment = FrozenConfigDict(recipes.get_config("vavae_tiny"))
  return side_by_side.settings_of(experiment, root, checkouts)


def test_the_reference_gets_the_discriminator_that_a_training_begins_with(tmp_path, monkeypatch):
  config = recipes.get_config("vavae_tiny,tokenizer")
  config.update(seed=3)
  config.model.update(ch=8, ch_mult=(1,), norm_groups=8, attn_resolutions=())
  config.teacher.name, config.loss.perceptual_weight = "", 0.0  # which need files
  begun = []

  def begin(init, shardings):
    def run(key):
      begun.append(jax.jit(lambda key: init(key).discriminator)(key))
      raise KeyboardInterrupt

    return run

  monkeypatch.setattr(loop, "jit_init", begin)
  with pytest.raises(KeyboardInterrupt):
    train.train(config, tmp_path)
  kernel = begun[0]["layers"][0]["conv"]["kernel"]
  found = tokenizer_pieces.fresh_discriminator(FrozenConfigDict(config), 3)[JUDGED]
  np.testing.assert_allclose(found, np.transpose(kernel, (3, 2, 0, 1)), rtol=1e-6)


def made(root: Path, shift: float):
  """A workdir with every job done, in which ours is the reference's but for a shift."""
  given = settings(root)
  jobs = side_by_side.graph_of(given)
  weights = {"encoder.x": np.ones((2, 3), np.float32), JUDGED: np.ones(4, np.float32)}
  noise = {"encoder.x.k.bias": np.ones(9, np.float32)}
  record = Record(root, jobs)
  for job in jobs:
    by = shift * (job.name.startswith("ours") or job.name == "fed/ours") + 0.1 * ("d1" in job.name)
    folder = job.output.parent if job.output.suffix else job.output
    folder.mkdir(parents=True, exist_ok=True)
    if job.kind == "fed":
      for step in given.snapshots:
        moved = {name: x * step + by for name, x in weights.items()}
        np.savez(folder / f"{step}.npz", **moved, **{k: x * by for k, x in noise.items()})
    elif job.kind == "ours":
      lines = [{"step": s, **dict.fromkeys(LOGGED.values(), s - 0.5 + by)} for s in (2, 4)]
      lines += [{"step": s, "reconstruction/psnr": s + by} for s in (2, 4)]
      (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    else:
      logged = {name: [s + by for s in (1, 2, 3, 4)] for name in LOGGED}
      write_json(folder / "losses.json", {"logged": logged, "psnr": {2: 2 + by, 4: 4 + by}})
    if job.output.suffix == ".json":
      write_json(job.output, {"torch": "0", "replaced": ["nothing"]})
    elif not job.output.exists():
      job.output.touch()
    record.add(job, 1.0, done=True)
  write_torch_file(root / "initial.pt", weights)
  return given


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_page_tells_whether_the_sides_agree(shift, tmp_path, monkeypatch):
  monkeypatch.setattr(tokenizer_pieces, "fresh_discriminator", lambda *_: {})
  given = made(tmp_path, shift)
  jobs = side_by_side.graph_of(given)
  page = tmp_path / "page.md"
  tokenizer_page.write(given, jobs, page, "the command")
  rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
  verdicts = [row[-1] for row in rows if row[-1] in ("yes |", "no |")]
  assert len(verdicts) == 2 * len(LOGGED) + 2  # of all and of the last steps, PSNR twice
  assert {*verdicts} == ({"no |"} if shift else {"yes |"})
  for part in tokenizer_page.PARTS:
    series = tokenizer_page.distances(Results(given, jobs), part)
    assert series["ours"][-1][1] == pytest.approx(shift / 4)  # without the biases of keys
    assert series["threads"][-1][1] == 0
    assert series["moved"][-1][1] == pytest.approx(3)
  assert {path.name for path in tmp_path.glob("page_*.png")} == {
    *("page_tokenizer_fed.png", "page_tokenizer_curves.png")
  }


@pytest.mark.torch
@pytest.mark.skipif(not (CHECKOUT and TAMING), reason="LIGHTNINGDIT or TAMING names no checkout")
def test_fed_with_its_draws_ours_takes_the_references_steps(tmp_path):
  given = settings(tmp_path)
  tokenizer_pieces.pictures(given, tmp_path / "pictures.npz")
  tokenizer_pieces.tokenizer_initial(given, tmp_path / "initial.pt")
  theirs, ours = (tmp_path / "fed" / name / "about.json" for name in ("theirs", "ours"))
  tokenizer_pieces.tokenizer_theirs(given, theirs, seed=0, fed=True)
  record = str(theirs.with_name("record.npz"))
  tokenizer_pieces.tokenizer_fed(given, ours, record=record)
  pair = [json.loads(path.read_text()) for path in (theirs.with_name("losses.json"), ours)]
  for name in LOGGED:
    expected, found = (np.array(x["logged"][name]) for x in pair)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3)
