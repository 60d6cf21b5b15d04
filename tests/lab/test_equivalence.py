"""launch.lab.equivalence: arrays, tolerances, errors; our side plays the reference, too."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from launch.lab.equivalence import comparison
from launch.lab.equivalence.cases import Settings
from launch.report.html import write_page
from tests import cases
from vavae_jax.common.errors import InputError
from vavae_jax.weights.state_dicts import read_state_dict

TOKENIZER = str(cases.FOLDER / "formats" / "vavae_lightning.ckpt")
TINY = str(cases.FOLDER / "formats" / "lightningdit_bare_state_dict.pt")
CHECKOUT = os.environ.get("LIGHTNINGDIT", "")


def settings(tmp_path, **changes) -> Settings:
  (tmp_path / "models").mkdir(exist_ok=True)
  (tmp_path / "models" / "lightningdit.py").touch()
  given = {"model": "LightningDiT-B/1", "checkpoint": TINY, "steps": 1} | changes
  return Settings(**{"reference": tmp_path, "torch_python": sys.executable} | given)


@pytest.fixture(scope="module")
def computed():
  """What our side gave, by settings and dtype: it compiles for long."""
  return {}


@pytest.fixture
def played(monkeypatch, computed):
  """The other side: what ours computes, changed by a function of (key, array)."""
  make_case = comparison.make_case

  def remembered(given):
    case = make_case(given)

    def run(weights, dtype):
      key = given.steps, given.trajectory, dtype
      if key not in computed:
        computed[key] = case.run(weights, dtype)
      return computed[key]

    return dataclasses.replace(case, run=run)

  def play(change):
    @contextlib.contextmanager
    def process(python, script, job, needs):
      case = remembered(play.settings)
      ours = case.run(read_state_dict(job["weights"]), job["dtype"])
      arrays = {k: np.asarray(x, np.float32) for k, x in ours.items()}
      named = {f"{k}/name" if k.startswith("layer/") else k: x for k, x in arrays.items()}
      np.savez(job["outputs"], **{k: change(k, x) for k, x in named.items()})
      yield types.SimpleNamespace(about={"torch": "0", "replaced": "nothing"})

    monkeypatch.setattr(comparison, "TorchProcess", process)
    monkeypatch.setattr(comparison, "make_case", remembered)

  return play


def test_every_layer_loss_gradient_and_parameter_is_compared(played, tmp_path):
  played(lambda key, x: x)
  played.settings = settings(tmp_path)
  rows, _ = comparison.compare(played.settings)
  assert all(row.holds and row.max_abs == 0 for row in rows)
  counts = {what: int(n) for what, n, *_ in comparison.summary(rows)}
  for dtype in ("float32", "bfloat16"):
    # The embedding of the time, one block, the head; 27 tensors, three of them constants.
    assert counts[f"{dtype} layer"] == 3
    assert counts[f"{dtype} gradient"] == counts[f"{dtype} parameter"] == 24
    assert all(counts[f"{dtype} {group}"] == 1 for group in ("loss", "trajectory", "output"))


@pytest.mark.parametrize("wrong", [lambda x: x * 1.01, lambda x: np.full_like(x, np.nan)])
def test_one_wrong_array_does_not_hold(played, tmp_path, wrong):
  bad = "gradient/blocks.0.attn.qkv.weight"
  played(lambda key, x: wrong(x) if key == bad else x * np.float32(1 + 1e-6))
  played.settings = settings(tmp_path)
  rows, about = comparison.compare(played.settings)
  failed = [row for row in rows if not row.holds and row.dtype == "float32"]
  assert [f"{row.group}/{row.name}" for row in failed] == [bad]
  lines = {line[0]: line for line in comparison.summary(rows)}
  assert lines["float32 gradient"][-1] == "NO"
  assert lines["float32 gradient"][4] == "blocks.0.attn.qkv.weight"
  write_page(tmp_path / "page.html", "title", comparison.sections(rows, about))
  page = (tmp_path / "page.html").read_text()
  assert "Difference by layer" in page
  assert "blocks.0.attn.qkv.weight" in page


def test_what_would_compare_nothing_is_refused(tmp_path):
  with pytest.raises(InputError, match="lpips is compared in float32, not in bfloat16"):
    comparison.compare(
      settings(tmp_path, model="lpips", checkpoint="", dtypes=("bfloat16",), image_size=32)
    )


@pytest.mark.parametrize(
  ("model", "checkpoint", "message"),
  [
    ("f16d32", TINY, "is a LightningDiT, and --model=f16d32 needs a tokenizer f16d32"),
    ("LightningDiT-B/1", TOKENIZER, "is a tokenizer f.*, and --model=LightningDiT-B/1 needs a"),
    ("dinov2_vits14", TINY, "needs a teacher dinov2_vits14"),
  ],
)
def test_weights_of_another_model_are_refused(model, checkpoint, message, tmp_path):
  with pytest.raises(InputError, match=message):
    comparison.compare(settings(tmp_path, model=model, checkpoint=checkpoint, image_size=32))


def test_training_needs_the_other_checkout(tmp_path):
  with pytest.raises(InputError, match="CompVis/taming-transformers"):
    comparison.compare(settings(tmp_path, model="f16d32_training", checkpoint="", taming="/no"))


def test_a_kinked_row_is_judged_by_its_rms():
  rows = [
    comparison.Row("gradient", "innocent", "float32", 1.0, 0.5, 1e-3, 5e-3, kinked=True),
    comparison.Row("gradient", "guilty", "float32", 1.0, 0.1, 2e-2, 5e-3, kinked=True),
  ]
  (line,) = comparison.summary(rows)
  assert line[4] == "guilty"
  assert line[-1] == "NO"
  row = dataclasses.replace(rows[0], rms=np.nan).to_dict()
  assert json.dumps(row, allow_nan=False)


def test_sides_that_do_not_compute_the_same_are_refused(played, tmp_path):
  played(lambda key, x: x)
  played.settings = settings(tmp_path, trajectory=0, steps=0)
  with pytest.raises(InputError, match=r"gradient/.*on one of them only"):
    comparison.compare(settings(tmp_path, trajectory=0))


def test_an_interpreter_without_pytorch_is_refused(tmp_path, capfd):
  case = settings(tmp_path)
  with pytest.raises(InputError, match="interpreter with torch"):
    comparison.compare(dataclasses.replace(case, torch_python=sys.executable))
  assert "torch" in capfd.readouterr().err
  with pytest.raises(InputError, match="models/lightningdit"):
    comparison.compare(dataclasses.replace(case, reference=Path("/nowhere")))


@pytest.mark.torch
@pytest.mark.skipif(not CHECKOUT, reason="LIGHTNINGDIT names no checkout of the reference")
@pytest.mark.parametrize(
  "changes", [{}, {"model": "lpips", "checkpoint": "", "image_size": 64, "batch_size": 1}]
)
def test_the_reference_itself(tmp_path, changes):
  given = settings(tmp_path, **changes)
  rows, about = comparison.compare(dataclasses.replace(given, reference=Path(CHECKOUT)))
  assert all(row.holds for row in rows), comparison.summary(rows)
  json.dumps(about)
