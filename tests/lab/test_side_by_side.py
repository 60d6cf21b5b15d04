"""launch.lab.equivalence training: its jobs, states of either side, and what its page says."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
from configs.lab import training as recipes
from launch.engine import configuration
from launch.lab.benchmark.loading import make_store
from launch.lab.equivalence import handover, judging, pieces, side_by_side, side_page
from launch.lab.equivalence.side_results import Results, distances
from launch.lab.jobs import Record, digests
from launch.lab.reference import Checkouts
from lightningdit_jax import training
from lightningdit_jax.positions import position_embedding
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json
from vavae_jax.metrics.distribution import Gaussian
from vavae_jax.weights.torch_writer import write_torch_file

CHECKOUT = os.environ.get("LIGHTNINGDIT", "")
POSITIONS = position_embedding(4, 4, 32)[None]


def settings(root: Path, size: str = "tiny", reference: str = "") -> pieces.Settings:
  checkouts = Checkouts(Path(reference), "", sys.executable, compiled=False)
  return side_by_side.settings_of(FrozenConfigDict(recipes.get_config(size)), root, checkouts)


@pytest.mark.parametrize("size", recipes.SIZES)
def test_every_job_has_a_configuration_that_stands_and_what_it_needs(size, tmp_path):
  jobs = side_by_side.graph_of(settings(tmp_path, size))
  digests(jobs, tmp_path)  # each after what it needs
  for job in jobs:
    found = [word.partition(".py:")[2] for word in job.words if word.startswith("--config=")]
    argument = "".join(found)
    if job.words[0] == "launch.train":
      config = recipes.get_config(argument)
      configuration.resolve(config, configs.base.KEYS[config.task])
      assert config.task == "tokenizer" or config.num_steps == 2 * config.keep_every_steps
    elif "piece" in job.words:
      assert any(word.startswith("--piece=") for word in job.words)
  kinds = {"fed", "theirs", "ours", "initial"}
  if not recipes.of_tokenizers(size):
    kinds |= {"judged", "continued", "to_ours", "to_theirs"}
  assert {job.kind for job in jobs} >= kinds


def test_distances_are_to_the_latents_that_are_there_now(tmp_path, monkeypatch):
  """Not to those of a folder before it was encoded anew."""
  rows = np.random.default_rng(0).normal(size=(50, 1, 1, 3))

  class Store:
    def __init__(self, _):
      self.sha256 = str(rows.mean())

    def __len__(self):
      return len(rows)

  monkeypatch.setattr(judging, "LatentStore", Store)
  monkeypatch.setattr(judging, "_normalised", lambda settings, store, chosen: rows[chosen])
  for shift in (0.0, 1.0):
    rows += shift
    for _ in range(2):
      found = judging._gaussian(settings(tmp_path))
      np.testing.assert_allclose(found.mean, rows.mean((0, 1, 2)), rtol=1e-6)


def state_of(config):
  """A state of ours after two steps, with random numbers."""
  draw = np.random.default_rng(0)

  def some(x):
    return jnp.full_like(x, 2) if x.dtype == jnp.int32 else draw.standard_normal(x.shape, x.dtype)

  return jax.tree.map(some, jax.eval_shape(lambda: training.init_state(config, jax.random.key(0))))


def checkpoint_of(path: Path) -> dict:
  """What torch.load gives of the reference's checkpoint with a state of `handover.write`."""
  with np.load(path) as file:
    parts = {part: {} for part in ("model", "ema", "exp_avg", "exp_avg_sq")}
    for key in set(file.files) - {"step"}:
      part, _, name = key.partition("/")
      parts[part][name] = file[key]
  names = sorted(parts["model"])
  # Moments by the number of the parameter, of which the first, the positions, has none.
  moments = {i: {kind: parts[kind][x] for kind in handover.MOMENTS} for i, x in enumerate(names, 1)}
  positions = {"pos_embed": POSITIONS}
  weights = {x: {**positions, **{k: parts[x][k] for k in names}} for x in ("model", "ema")}
  return weights | {"opt": {"state": moments}}


def test_a_state_survives_the_way_to_the_reference_and_back(tmp_path, monkeypatch):
  config = settings(tmp_path).config
  state = state_of(config)
  handover.write(tmp_path / "state.npz", state, config)
  content = checkpoint_of(tmp_path / "state.npz")
  monkeypatch.setattr(handover, "read_content", lambda path: content)
  chex.assert_trees_all_equal(handover.read(Path("x.pt"), 2, config), state)
  del content["ema"]
  with pytest.raises(InputError, match="has no ema; give a checkpoint"):
    handover.read(Path("x.pt"), 2, config)


def made(root: Path, shift: float) -> pieces.Settings:
  """A workdir with every job done, in which ours is the reference's but for a shift."""
  given = settings(root)
  jobs = side_by_side.graph_of(given)
  weights = {"blocks.0.attn.qkv.weight": np.ones((2, 3), np.float32)}
  record = Record(root, jobs)
  for job in jobs:
    by = shift * (job.name.startswith("ours") or job.name.endswith(("by_ours", "fed/ours")))
    by += 0.01 * ("seed1" in job.name)
    folder = job.output.parent if job.output.suffix or job.output.name.isdigit() else job.output
    folder.mkdir(parents=True, exist_ok=True)
    losses = {step: 1 / step + by for step in (2, 4)}
    lines = [json.dumps({"step": step, "mse": x}) for step, x in losses.items()]
    note = {"torch": "0", "replaced": ["nothing"], "count": 5, "distance": 1.0}
    if job.kind == "fed":
      for step in given.snapshots:
        np.savez(folder / f"{step}.npz", **{k: x * step + by for k, x in weights.items()})
    elif job.kind == "judged":
      note = {"mse": [1 + by] * 8, "cosine": [0.5 + by] * 8, "norm": 3 + by}
      note |= {"plain": 2 + by, "guided": 3 + by}
      samples = np.random.default_rng(0).standard_normal((9, 1, 1, 2)) + by
      np.savez(job.output.with_suffix(".npz"), plain=samples, guided=samples)
    elif job.words[0] == "launch.train":
      (root / job.name).mkdir(parents=True, exist_ok=True)
      (root / job.name / "metrics.jsonl").write_text("\n".join(lines))
    elif job.output.name == "about.json":
      write_json(folder / "losses.json", losses)
    if job.output.suffix == ".json":
      write_json(job.output, note)
    elif not job.output.exists():
      job.output.touch()
    record.add(job, 1.0, done=True)
  write_torch_file(root / "initial.pt", weights)
  return given


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_the_page_tells_whether_the_sides_agree(shift, tmp_path, monkeypatch):
  monkeypatch.setattr(judging, "_gaussian", lambda _: Gaussian(np.zeros(2), np.eye(2)))
  given = made(tmp_path, shift)
  jobs = side_by_side.graph_of(given)
  page = tmp_path / "page.md"
  side_page.write(given, jobs, page, "the command")
  rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
  verdicts = {row[0]: row[-1] for row in rows if row[-1] in ("yes |", "no |")}
  assert len(verdicts) == 15  # losses, at eight times too, the norm, both distances
  assert {*verdicts.values()} == ({"no |"} if shift else {"yes |"})
  series = distances(Results(given, jobs))
  assert series["ours"][-1][1] == pytest.approx(shift / 4)
  assert series["threads"][-1][1] == 0
  assert {path.name for path in tmp_path.glob("page_*.png")} == {
    *("page_fed.png", "page_losses.png", "page_continued.png")
  }


def test_the_reference_has_one_average(tmp_path):
  config = ConfigDict(settings(tmp_path).config.to_dict())
  config.optimizer.ema_decays = (0.9, 0.99)
  with pytest.raises(InputError, match="has one average"):
    handover.write(tmp_path / "x.npz", None, FrozenConfigDict(config))


@pytest.mark.torch
@pytest.mark.skipif(not CHECKOUT, reason="LIGHTNINGDIT names no checkout of the reference")
def test_fed_with_its_draws_ours_takes_the_references_steps_and_goes_on_with_its_state(tmp_path):
  given = settings(tmp_path, reference=CHECKOUT)
  config = ConfigDict(given.config.to_dict())
  config.model.num_classes = 1000  # as the store's
  given = given._replace(config=FrozenConfigDict(config))
  make_store(tmp_path / "latents", 40, (4, 4, 4))
  record = str(tmp_path / "fed" / "theirs" / "record.npz")
  pieces.initial(given, tmp_path / "initial.pt")

  def run(piece, name: str, **options) -> None:
    output = tmp_path / "fed" / name / "about.json"
    output.parent.mkdir(parents=True)
    piece(given, output, **options)

  run(pieces.theirs, "theirs", seed=0, fed=True)
  run(pieces.ours_fed, "ours", record=record)
  checkpoint = str(tmp_path / "fed" / "theirs" / "run" / "checkpoints" / "0000002.pt")
  run(pieces.ours_fed, "to_ours", record=record, checkpoint=checkpoint)
  state = str(tmp_path / "fed" / "ours" / "state.npz")
  run(pieces.theirs, "to_theirs", seed=0, fed=True, replay=record, state=state)
  found = Results(given, ())
  expected = found.parameters("theirs", 4)
  for name in ("ours", "to_ours", "to_theirs"):
    chex.assert_trees_all_close(found.parameters(name, 4), expected, atol=2e-5)
