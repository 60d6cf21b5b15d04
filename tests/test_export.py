"""Model folders, and trained models from Python: the same samples as the commands', anywhere."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import ExifTags, Image

from launch import export, restore
from launch.evaluation.sample_files import class_sheet
from launch.evaluation.training import exports
from launch.sample import make_sampler
from launch.train import _on_latents
from lightningdit_jax import Pipeline
from lightningdit_jax.checks import check_store
from lightningdit_jax.store.latents import LatentStore
from lightningdit_jax.store.space import NOTE, labels_for
from tests import fake_hub
from tests.conftest import ROOT
from vavae_jax import Tokenizer, folder, tiling
from vavae_jax.common import functional, mesh
from vavae_jax.common.errors import InputError


@pytest.fixture(scope="module")
def pipe(diffusion, tokenizer):
  """The tiny pipeline's model."""
  return restore.for_use(diffusion, tokenizer)


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory):
  """Its folder, which nobody changes."""
  path = tmp_path_factory.mktemp("saved") / "model"
  pipe.save(path)
  return path


@pytest.fixture
def model(saved, tmp_path):
  """A copy of the folder."""
  return shutil.copytree(saved, tmp_path / "model")


def rewrite(path, **values):
  config = json.loads((path / folder.CONFIG).read_text())
  for name, value in values.items():
    inner = config
    *above, last = name.split("__")
    for key in above:
      inner = inner[key]
    inner[last] = value
  (path / folder.CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
  ("method", "routed"), [("euler", {}), ("heun", {"guide_routed": 0.5}), ("dopri5", {})]
)
def test_samples_are_those_of_the_command(diffusion, tokenizer, method, routed):
  words = {"steps": 4, "method": method, "guidance": 2.5, "interval_start": 0.2, **routed}
  config = ConfigDict(diffusion.config.to_dict())
  config.route.update(first=0, last=0)
  diffusion = dataclasses.replace(diffusion, config=FrozenConfigDict(config))
  pipe = restore.for_use(diffusion, tokenizer)
  space, settings = restore.space_of(diffusion), pipe.settings(**words)
  run = make_sampler(diffusion.config, space, tokenizer, settings, 3, mesh.make_mesh())
  expected = run(diffusion.params, np.arange(3), np.array([1, 1, 4]))
  drawn = pipe.sample([pipe.class_names[1], 1, 4], seed=3, progress=False, **words)
  assert np.abs(np.stack(drawn).astype(int) - expected).max() <= 1


@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_samples_with_a_guide_are_those_of_the_command(diffusion, tokenizer, method):
  weaker = restore.load(diffusion.workdir, "diffusion", ema=0.0)
  pipe, guide = (restore.for_use(each, tokenizer) for each in (diffusion, weaker))
  words = {"steps": 3, "method": method, "guidance": 2.5, "interval_start": 0.0}
  space, chosen = restore.space_of(diffusion), pipe.settings(guide, **words)
  run = make_sampler(diffusion.config, space, tokenizer, chosen, 0, mesh.make_mesh(), weaker)
  expected = run(diffusion.params, np.arange(2), np.array([1, 4]))
  drawn = pipe.sample([1, 4], guide=guide, progress=False, **words)
  assert np.abs(np.stack(drawn).astype(int) - expected).max() <= 1
  if method == "heun":
    *_, last = pipe.watch([1, 4], guide=guide, shown=1, **words)
    assert last == drawn
  with pytest.raises(InputError, match="A guide is given, but guidance is 1"):
    pipe.sample([1], guide=guide, guidance=1, interval_start=0.0)
  assert drawn != pipe.sample([1, 4], progress=False, **words)


def test_a_folder_gives_the_same_pictures_wherever_it_is(pipe, model):
  words = {"num": 2, "steps": 3, "progress": False}
  assert Pipeline.load(model).sample([0, 3], **words) == pipe.sample([0, 3], **words)


def test_a_trajectory_ends_with_the_sample(pipe):
  ways = pipe.sample([2, 5], steps=4, trajectory=True, progress=False)
  assert [len(way) for way in ways] == [3, 3]
  assert [way[-1] for way in ways] == pipe.sample([2, 5], steps=4, progress=False)
  assert [*map(list, zip(*pipe.watch([2, 5], steps=4), strict=True))] == ways


def test_a_trajectory_runs_in_batches(pipe, monkeypatch):
  taken, way = [], Pipeline._way

  def watched(self, chosen, seed, batch, guide):
    taken.append(len(batch["label"]))
    return way(self, chosen, seed, batch, guide)

  monkeypatch.setattr(Pipeline, "_way", watched)
  words = {"steps": 3, "trajectory": True, "progress": False}
  ways = pipe.sample([2, 5, 1], batch_size=2, **words)
  assert taken == [2, 2]
  assert ways[2] == pipe.sample([2, 5, 1], batch_size=3, **words)[2]


def test_the_mesh_of_watching_is_not_that_of_who_watches(pipe, caplog):
  def set_mesh():
    return not jax.sharding.get_abstract_mesh().empty

  def step(watcher):
    return next(watcher, None), set_mesh()

  list(pipe.watch([2, 5], steps=4))
  watchers = [pipe.watch([2, 5], steps=4), pipe.watch([0, 1], steps=4)]
  with ThreadPoolExecutor(1) as other, jax.log_compiles():
    for place in range(4):  # the last of which ends both
      for watcher in watchers:
        frame, is_set = other.submit(step, watcher).result() if place % 2 else step(watcher)
        assert (frame is not None) == (place < 3)
        assert not is_set
    assert not other.submit(set_mesh).result()
  assert not set_mesh()
  assert "Compiling" not in caplog.text


def test_nothing_compiles_when_a_slider_moves(pipe, caplog):
  pipe.sample([0], steps=3, guidance=2.0, progress=False)
  with jax.log_compiles():
    for steps, guidance, start, seed in ((5, 3.0, 0.1, 1), (2, 1.5, 0.5, 2**32 - 1)):
      settings = {"steps": steps, "guidance": guidance, "interval_start": start}
      pipe.sample([1], seed=seed, progress=False, **settings)
  assert "Compiling" not in caplog.text


@pytest.mark.parametrize(
  ("classes", "words", "message"),
  [
    (["2 Animals"], {}, "There is no class '2 Animals'; there are 2 Animals & Nature"),
    ([9], {}, "There is no class 9; they are 0 to 8"),
    ([], {}, "There are no classes"),
    ([0], {"stepz": 3}, "stepz is no setting of sampling; they are"),
    ([0], {"steps": 1}, "^steps is 1; give"),
    ([0], {"num_steps": 1}, "^num_steps is 1; give"),
    ([0], {"seed": -1}, "seed is -1"),
    ([0], {"trajectory": True, "method": "dopri5"}, "give another method"),
    ([0], {"noise": np.zeros((2, 4, 4, 48))}, "noise is .* these samples need"),
    ([0], {"noise": np.full((1, 4, 4, 48), np.nan)}, "noise has numbers that are not finite"),
    ([0], {"noise": [[1.0, 2.0], [3.0]]}, "noise is no array of numbers .setting an array element"),
    ([0], {"guide": "runs/guide"}, "guide is 'runs/guide'; give a Pipeline, as of Pipeline.load"),
    (np.zeros((2, 2), int), {}, "There is no class array"),
    ([0.5], {}, "There is no class 0.5; give a name, or a number below 9"),
    (None, {}, "There is no class None"),
    ([0], {"guidance": 2.0, "cfg_scale": 5.0}, "guidance is cfg_scale by another name"),
    ([0], {"guidance": 1, "guide_routed": 0.5}, "guide_routed is 0.5, but guidance is 1 and"),
  ],
)
def test_what_cannot_be_sampled_is_named(pipe, classes, words, message):
  with pytest.raises(InputError, match=message):
    pipe.sample(classes, progress=False, **words)


@pytest.mark.parametrize("count", [0, -3, 1.5])
def test_a_count_of_noises_that_cannot_be_is_named(pipe, count):
  with pytest.raises(InputError, match=f"count is {count}; give an integer in"):
    pipe.noise(0, count)


@pytest.mark.parametrize(
  ("latents", "message"),
  [
    (5, r"A latent is \(\); this"),
    ("x.npy", "A latent is no array of numbers .could not"),
    ([[[1.0, 2.0], [3.0]]], "A latent is no array of numbers .setting an array element"),
  ],
)
def test_what_is_no_latent_is_named(pipe, latents, message):
  with pytest.raises(InputError, match=message):
    pipe.tokenizer.decode(latents)


def test_one_class_and_numbers_of_numpy_are_as_good_as_lists_and_pythons(pipe):
  words = {"steps": 3, "progress": False}
  expected = pipe.sample([2], num=2, seed=5, **words)
  assert pipe.sample(np.int64(2), num=np.int64(2), seed=np.uint32(5), **words) == expected
  assert pipe.sample("2 Animals & Nature", num=2, seed=5, **words) == expected
  assert pipe.sample(2, noise=pipe.noise(5).tolist(), **words) == pipe.sample(2, seed=5, **words)


def test_bfloat16_halves_the_weights_and_is_near(pipe, saved, tmp_path):
  pipe.save(tmp_path / "small", dtype="bfloat16")
  sizes = [(path / "tokenizer.safetensors").stat().st_size for path in (saved, tmp_path / "small")]
  assert sizes[1] < 0.55 * sizes[0]
  small = Pipeline.load(tmp_path / "small").sample([1], steps=3, progress=False)
  assert (
    np.abs(np.asarray(small[0], float) - pipe.sample([1], steps=3, progress=False)[0]).mean() < 8
  )


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format_version": 2}, "format_version 2, but this version of the project reads 1"),
    ({"diffusion__model__rope": True}, r"diffusion\.model\.rope is unknown; known are attention"),
    ({"diffusion__model__depth": 3}, "asks for"),
    ({"tokenizer__model__ch": "16"}, r"tokenizer\.model\.ch is '16'; give an integer"),
    ({"extra": 1}, "extra is unknown"),
    ({"class_names": [1]}, "class_names is no list of names"),
    ({"files__diffusion.safetensors": "0" * 64}, "is not the file that config.json names"),
  ],
)
def test_what_a_folder_may_not_say_is_refused_by_name(model, change, message):
  rewrite(model, **change)
  with pytest.raises(InputError, match=message):
    Pipeline.load(model)


def test_a_folder_that_was_not_copied_whole_says_what_is_missing(model):
  (model / folder.STATISTICS).unlink()
  with pytest.raises(InputError, match="not copied whole: it has no latents_stats"):
    Pipeline.load(model)


def test_a_folder_of_other_things_is_not_replaced(pipe, model, tmp_path):
  other = tmp_path / "other"
  for path, message in ((other, "is no model folder"), (model, "other files than a model's, mine")):
    path.mkdir(exist_ok=True)
    before = {*path.iterdir(), path / "mine.txt"}
    (path / "mine.txt").touch()
    with pytest.raises(InputError, match=message):
      pipe.save(path)
    assert {*path.iterdir()} == before


def test_a_folder_that_cannot_be_replaced_stays(pipe, model, monkeypatch):
  before = (model / folder.CONFIG).read_bytes()
  rename = Path.rename

  def fail(path, target):
    if path.name == "new":
      raise KeyboardInterrupt
    return rename(path, target)

  monkeypatch.setattr(Path, "rename", fail)
  with pytest.raises(KeyboardInterrupt):
    pipe.save(model)
  assert (model / folder.CONFIG).read_bytes() == before
  assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_folder_with_another_tokenizer_is_refused(pipe, model, tmp_path):
  params = jax.tree.map(lambda x: x + 1, pipe.tokenizer.params)
  Tokenizer(pipe.tokenizer.config, params).save(tmp_path / "other")
  for load in (
    lambda: Pipeline.load(model, tokenizer=tmp_path / "other"),
    lambda: restore.tokenizer_of(restore.load(model, "diffusion"), tmp_path / "other"),
  ):
    with pytest.raises(InputError, match="is not the one that made the latents"):
      load()
  pipe.tokenizer.save(tmp_path / "same", dtype="bfloat16")
  assert Pipeline.load(model, tokenizer=tmp_path / "same").class_names == pipe.class_names


def test_pictures_of_any_kind_and_size_come_back(tokenizer, tmp_path):
  own = restore.for_use(tokenizer)
  own.save(tmp_path / "tokenizer")
  own = Tokenizer.load(tmp_path / "tokenizer")
  picture = Image.effect_noise((70, 40), 50)
  picture.save(tmp_path / "1.png")
  array = np.asarray(picture.convert("RGB"))
  one = own.encode(picture)
  assert one.shape == (2, 4, own.channels)
  for same in (array, tmp_path / "1.png", str(tmp_path / "1.png")):
    np.testing.assert_array_equal(own.encode(same), one)
  assert own.decode(one).size == (64, 32)
  several = own.encode([picture, Image.new("L", (32, 32)), array])
  assert [z.shape[:2] for z in several] == [(2, 4), (2, 2), (2, 4)]
  assert [again.size for again in own.decode(several)] == [(64, 32), (32, 32), (64, 32)]
  turned = Image.Exif()
  turned[ExifTags.Base.Orientation] = 6
  picture.save(tmp_path / "turned.png", exif=turned)
  upright = own.encode(tmp_path / "turned.png")
  np.testing.assert_array_equal(own.encode(Image.open(tmp_path / "turned.png")), upright)
  assert upright.shape == (4, 2, own.channels)
  np.testing.assert_array_equal(own.encode(jax.numpy.asarray(array)), one)
  with pytest.raises(InputError, match=r"A latent is \(0, 4, "):
    own.decode(one[:0])
  with pytest.raises(InputError, match="a cell of this tokenizer has 16 x 16"):
    own.encode(Image.new("RGB", (8, 40)))


def test_a_large_picture_runs_in_tiles_that_hardly_differ(tokenizer, monkeypatch):
  own = restore.for_use(tokenizer)
  picture = Image.effect_noise((48, 1040), 50).convert("RGB")
  given = []

  def watched(model, image, **tiles):
    given.extend([image, *jax.tree.leaves(nnx.state(model))])
    return encode_tiled(model, image, **tiles)

  encode_tiled = tiling.encode_tiled
  monkeypatch.setattr(tiling, "encode_tiled", watched)
  tiled = own.encode(picture)
  # Weights are on the devices before the first tile, and the picture never is as a whole.
  assert [type(x) is np.ndarray for x in given] == [True, *[False] * (len(given) - 1)]
  monkeypatch.setattr("vavae_jax.tokenizer._LARGEST", 2048)
  whole = own.encode(picture)
  assert tiled.shape == whole.shape == (65, 3, own.channels)
  assert 0 < np.abs(tiled - whole).mean() < 0.2 * np.abs(whole).mean()


@pytest.mark.parametrize("limit", [2, 1])
def test_large_pictures_of_one_size_share_devices_and_halve_as_small_ones_do(
  tokenizer, monkeypatch, limit
):
  own = restore.for_use(tokenizer)
  pictures = np.random.default_rng(0).integers(256, size=(3, 32, 48, 3), dtype=np.uint8)
  for name, value in (("LARGEST", 32), ("TILE", 2), ("OVERLAP", 0), ("PIXELS_AT_ONCE", 2 * 32**2)):
    monkeypatch.setattr(f"vavae_jax.tokenizer._{name}", value)
  z = np.stack([own.encode(picture) for picture in pictures])
  again = np.stack([own.decode(each) for each in z])
  taken = []

  def watched(run):
    def watch(model, x):
      if not isinstance(x, jax.core.Tracer):
        taken.append(len(x))
        assert x.sharding.mesh == own._devices
        if len(x) > limit:
          raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
      return run(model, x)

    return watch

  for name in ("_moments", "_decode"):
    monkeypatch.setattr(tiling, name, watched(getattr(tiling, name)))
  np.testing.assert_allclose(own.encode(pictures), z, atol=1e-5)
  assert np.abs(np.stack(own.decode(z)).astype(int) - again).max() <= 1
  assert max(taken) == 2


def test_a_moved_workdir_samples_without_its_latents(pipeline, tmp_path, pipe):
  shutil.copytree(pipeline / "diffusion", tmp_path / "diffusion")
  shutil.copytree(pipeline / "tokenizer", tmp_path / "tokenizer")
  config = json.loads((tmp_path / "diffusion" / "config.json").read_text())
  config["latents"]["path"] = str(tmp_path / "gone")
  (tmp_path / "diffusion" / "config.json").write_text(json.dumps(config))
  note = json.loads((tmp_path / "diffusion" / "latents.json").read_text())
  note["tokenizer"]["workdir"] = str(tmp_path / "was" / "tokenizer")
  (tmp_path / "diffusion" / "latents.json").write_text(json.dumps(note))
  diffusion = restore.load(tmp_path / "diffusion", "diffusion")
  moved = restore.for_use(diffusion, restore.tokenizer_of(diffusion))
  assert moved.sample([1], steps=3, progress=False) == pipe.sample([1], steps=3, progress=False)
  words = {"steps": 3, "progress": False}
  own = Pipeline.load(tmp_path / "diffusion")
  assert own.sample([1], **words) == pipe.sample([1], **words)
  assert own.origin == pipe.origin
  (tmp_path / "diffusion" / "latents.json").unlink()  # as a training of before
  config["latents"]["path"] = str(pipeline / "latents")
  (tmp_path / "diffusion" / "config.json").write_text(json.dumps(config))
  assert Pipeline.load(tmp_path / "diffusion").space.tokenizer == pipe.space.tokenizer
  shutil.rmtree(tmp_path / "tokenizer")
  with pytest.raises(InputError, match="is gone; give --tokenizer=WORKDIR"):
    restore.tokenizer_of(diffusion)


def test_a_tokenizer_that_nobody_noted_is_not_said_to_be_gone(pipeline, tmp_path):
  workdir = shutil.copytree(pipeline / "diffusion", tmp_path / "diffusion")
  note = json.loads((workdir / NOTE).read_text())
  (workdir / NOTE).write_text(json.dumps(note | {"tokenizer": {}}))
  for load in (
    lambda: restore.tokenizer_of(restore.load(workdir, "diffusion")),
    lambda: Pipeline.load(workdir),
  ):
    with pytest.raises(InputError, match="does not say which tokenizer made its latents; give"):
      load()


def test_commands_take_a_folder_as_they_take_a_workdir(saved, diffusion, tokenizer):
  for task, mine in (("diffusion", diffusion), ("tokenizer", tokenizer)):
    loaded = restore.load(saved, task)
    assert loaded.sha256 == mine.sha256
    assert loaded.step == mine.step
    assert loaded.config.model == mine.config.model
  assert restore.tokenizer_of(restore.load(saved, "diffusion")).sha256 == tokenizer.sha256
  expected = functional.fingerprint(tokenizer.params["autoencoder"])
  assert functional.fingerprint(restore.load(saved, "tokenizer").params["autoencoder"]) == expected
  with pytest.raises(InputError, match="it holds no classifier"):
    restore.load(saved, "classifier")
  with pytest.raises(InputError, match="has the weights of step 6 alone, and not of 4"):
    restore.load(saved, "diffusion", 4)


def test_what_is_pushed_to_the_hub_comes_back(command, saved, pipeline, environment, tmp_path):
  with fake_hub.running(tmp_path / "hub") as address:
    hub = fake_hub.variables(address, tmp_path / "cache")
    words = ("launch.export", f"--workdir={saved}", "--samples=1", "--push=me/model")
    words += (f"--evaluations={pipeline / 'generation.json'}",)
    done = command(*words, f"--output={tmp_path / 'out'}", **hub)
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "hub" / "me" / "model" / folder.CARD).read_text()
    assert "Pipeline.load(" in card
    assert "| fd_efficientnet |" in card
    assert "efficientnet_lite0; not FID" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / folder.CONFIG).read_text()
    refused = command(*words, f"--output={tmp_path / 'out'}", **hub | {"HF_TOKEN": "wrong"})
    assert refused.returncode == 2
    assert "me/model could not be pushed (Client error '401" in refused.stderr
    load = "from lightningdit_jax import Pipeline; print(Pipeline.load('me/model').class_names)"
    run = {"cwd": ROOT, "env": environment | hub, "capture_output": True, "text": True}
    online = subprocess.run([sys.executable, "-c", load], check=True, **run)
    assert "Animals & Nature" in online.stdout
  offline = subprocess.run([sys.executable, "-c", load], check=True, **run)
  assert offline.stdout == online.stdout


def test_every_command_takes_a_name_of_the_hub_as_it_takes_a_folder(
  forked, saved, pictures, tmp_path
):
  shutil.copytree(saved, tmp_path / "hub" / "me" / "model")
  (tmp_path / "hub" / "me" / "other").mkdir()
  (tmp_path / "hub" / "me" / "other" / "config.json").write_text("{}")
  model, out = "--workdir=me/model", f"--output={tmp_path}"
  lines = {
    "sample": ["launch.sample", model, f"{out}/x.npz", "--num_samples=2", "--num_steps=2"],
    "encode": ["launch.encode", model, f"{out}/latents", f"--source=folder:{pictures}"],
    "export": ["launch.export", "--workdir=hf:me/model", f"{out}/copy", "--samples=0"],
    "convert": ["launch.convert", "me/model", f"{tmp_path}/x.safetensors", "--part=diffusion"],
  }
  wrong = {
    "me/private": "(the hub has no such model, or it is private and the token does not open it)",
    "me/gated": "(its owner admits people one by one: ask on its page)",
    "me/other": "me/other on the Hugging Face hub is no model folder",
  }
  lines |= {x: ["launch.export", f"--workdir={x}", f"{out}/none"] for x in wrong}
  wrong["sweep"] = "me/model has checkpoints of the steps [6], no others"
  lines["sweep"] = ["launch.evaluate", "sweep", model, f"{out}/sweep", "--grid=step=4"]
  lines["sweep"] += ["--reference=x.npz", "--protocol=efficientnet_lite0"]
  imported = "launch.evaluate,launch.quickstart"
  with fake_hub.running(tmp_path / "hub") as address:
    hub = fake_hub.variables(address, tmp_path / "cache")
    answers = dict(zip(lines, forked(lines.values(), imported, **hub), strict=True))
    new = hub | {"HF_HOME": str(tmp_path / "new")}  # what was fetched serves on
    refused = forked([lines["export"]], imported, **new | {"HF_TOKEN": "wrong"})[0]
  gone = forked([lines["export"]], imported, **new)[0]
  for name in lines.keys() - wrong.keys():
    assert answers[name].returncode == 0, answers[name].stderr
    assert "\nnext: python -m launch." in answers[name].stdout
  assert f"next: python -m launch.studio --model={tmp_path / 'copy'}\n" in answers["export"].stdout
  told = {name: answers[name] for name in wrong}
  told |= {"token": refused, "offline": gone}
  wrong |= {"token": "401 Unauthorized", "offline": "(the hub is not reached, and nothing of it is"}
  for name, done in told.items():
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert wrong[name] in done.stderr
  noted = json.loads((tmp_path / "latents" / "manifest.json").read_text())["tokenizer"]
  assert noted["workdir"] == "hf:me/model"  # so that sampling finds it, wherever the cache is
  kept = [path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")]
  assert {*kept} == {path.name for path in saved.iterdir()} | {"config.json"}


def test_training_exports_the_best_step_and_no_worse_one(diffusion, pipeline, tmp_path):
  config = ConfigDict(diffusion.config)
  config.update(export="best", keep_best="validation/mse", tokenizer=str(pipeline / "tokenizer"))
  config.sample.num_steps = 2
  shutil.copy(pipeline / "diffusion" / "latents.json", tmp_path)
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 3, "validation/mse": 1.5}\n{"step": 6, "validation/mse": 2.5}\n'
  )
  every, write = exports(FrozenConfigDict(config), tmp_path)["export"]
  assert every == config.evaluate_every_steps
  state = types.SimpleNamespace(step=6, ema={"0.5": diffusion.params})
  write(state)
  assert not (tmp_path / "model").exists()
  state.step = 3
  write(state)
  loaded = restore.load(tmp_path / "model", "diffusion")
  assert (loaded.step, loaded.ema, loaded.sha256) == (3, 0.5, diffusion.sha256)
  again = export.load(tmp_path / "model", "", None, None)
  export.export(again, tmp_path / "again", workdir=tmp_path / "model", samples=0)
  for name in ("model", "again"):
    card = (tmp_path / name / folder.CARD).read_text()
    assert "| validation/mse | 2.5 | while training, step 6 |" in card
    assert f"- data: latents of {len(LatentStore(pipeline / 'latents')):,} pictures" in card


def test_evaluations_stay_on_the_card_of_the_same_weights_and_leave_that_of_others(
  tokenizer, tmp_path, capsys
):
  own, model = restore.for_use(tokenizer), tmp_path / "model"
  result = {"evaluation": "reconstruction", "figures": {"psnr": 20.5}, "run": {"commit": "abc"}}
  (tmp_path / "r.json").write_text(json.dumps(result))

  def card(path, model, **more):
    export.export(model, path, workdir=tokenizer.workdir, samples=0, **more)
    return (path / folder.CARD).read_text()

  shown = "## Evaluation: reconstruction\n\n| figure | value |\n|---|---|\n| psnr | 20.5 |"
  assert shown in card(model, own, evaluations=[tmp_path / "r.json"])
  for path, again in (
    (model, restore.for_use(tokenizer)),  # as a training does at its end
    (tmp_path / "other", Tokenizer.load(model)),
  ):
    assert shown in card(path, again)
  (tmp_path / "r.json").write_text(json.dumps(result | {"figures": {"psnr": 21.5}}))
  newer = card(model, own, evaluations=[tmp_path / "r.json"])
  assert ("| psnr | 21.5 |" in newer, newer.count("## Evaluation")) == (True, 1)
  later = Tokenizer(own.config, jax.tree.map(lambda x: x + 1, own.params))
  assert "Evaluation" not in card(model, later)
  assert f"other weights leave the card of {model}: reconstruction\n" in capsys.readouterr().out


OTHER, STEP_4 = "0" * 64, "diffusion, step 4, average 0.5"


@pytest.mark.parametrize(
  ("about", "told"),
  [
    ({"samples": {"diffusion": OTHER, "diffusion_step": 4, "ema": 0.5}}, STEP_4),
    ({"samples": {"tokenizer": OTHER}}, "tokenizer"),
    ({"tokenizer": {"sha256": OTHER, "step": 6}}, "tokenizer, step 6"),
  ],
)
def test_an_evaluation_of_other_weights_is_refused(pipe, tmp_path, about, told):
  own = {"diffusion": pipe.origin["sha256"], "tokenizer": pipe.tokenizer.sha256}
  result = {"evaluation": "reconstruction", "figures": {"psnr": 20.5}}
  path = tmp_path / "r.json"
  same = {"samples": own, "tokenizer": {"sha256": own["tokenizer"]}}
  for each in (pipe, pipe.tokenizer):
    path.write_text(json.dumps(result | about))
    with pytest.raises(InputError, match=f"other weights .{told}. than those of the model"):
      export._evaluated(path, each)
  path.write_text(json.dumps(result | same))
  assert export._evaluated(path, pipe)["figures"] == [("psnr", "20.5")]


GOOD = {"kind": "reconstruction", "figures": [["psnr", "20.5"]], "protocol": "by hand"}


@pytest.mark.parametrize(
  ("evaluations", "message"),
  [
    (5, r"tokenizer\.origin\.evaluations is 5"),
    ([{"kind": "reconstruction"}], r"tokenizer\.origin\.evaluations\[?0?\]? is "),
    (["no JSON"], "is damaged .origin.evaluations"),
    (["[" * 2_000], "is damaged .origin.evaluations"),
    (["3"], "is damaged .origin.evaluations"),
    ([json.dumps(GOOD | {"figures": [["psnr", 20.5]]})], "is damaged .origin.evaluations"),
    ([json.dumps({"kind": "reconstruction"})], "is damaged .origin.evaluations"),
  ],
)
def test_evaluations_changed_by_hand_are_one_line_of_the_folder_read_or_replaced(
  tokenizer, tmp_path, evaluations, message
):
  own, model = restore.for_use(tokenizer), tmp_path / "model"
  own.save(model)
  rewrite(model, tokenizer__origin__evaluations=evaluations)
  with pytest.raises(InputError, match=message) as replaced:
    export.export(own, model, workdir=tokenizer.workdir, samples=0)
  with pytest.raises(InputError, match=message):
    export.export(Tokenizer.load(model), tmp_path / "other", workdir=model, samples=0)
  assert str(model / folder.CONFIG) in str(replaced.value)
  assert "\n" not in str(replaced.value)


@pytest.mark.parametrize("damage", [{"samples": "cats"}, {"run": []}, {"network": 1}])
def test_a_result_changed_by_hand_is_one_line(tokenizer, tmp_path, damage):
  result = {"evaluation": "reconstruction", "figures": {"psnr": 20.5}} | damage
  (tmp_path / "r.json").write_text(json.dumps(result))
  with pytest.raises(InputError, match=f"r.json is damaged .{next(iter(damage))}: "):
    export.export(
      restore.for_use(tokenizer),
      tmp_path / "model",
      workdir=tokenizer.workdir,
      samples=0,
      evaluations=[tmp_path / "r.json"],
    )


def test_labels_are_named_or_numbered_and_sheets_name_them(tmp_path):
  names = ("cat", "dog", "7")
  np.testing.assert_array_equal(labels_for("dog,0,cat", 4, 3, 0, names), [1, 0, 0, 1])
  with pytest.raises(InputError, match=r"has 3 classes, but .* is 10"):
    labels_for("balanced", 4, 10, 0, names)
  with pytest.raises(InputError, match="There is no class 'dogs'; there are dog"):
    labels_for("dogs", 4, 3, 0, names)
  odd = ("1", "cat, wild", "dog")
  np.testing.assert_array_equal(labels_for('1,2,"cat, wild",dog', 4, 3, 0, odd), [0, 2, 1, 2])
  np.testing.assert_array_equal(labels_for("cat, wild", 2, 3, 0, odd), [1, 1])
  pictures = np.full((6, 8, 40, 3), 200, np.uint8)
  sheet = class_sheet(pictures, np.array([0, 1, 2, 2, 1, 0]), names)
  assert sheet.shape == (3 * (8 + 14), 2 * 40, 3)
  assert [bool((sheet[22 * i : 22 * i + 14] < 100).any()) for i in range(3)] == [True] * 3


def test_the_number_of_classes_is_that_of_the_latents(diffusion, pipeline, tmp_path):
  config = ConfigDict(diffusion.config)
  config.latents.path = str(pipeline / "latents")
  config.model.num_classes = 1000
  store = LatentStore(pipeline / "latents")
  assert _on_latents(FrozenConfigDict(config), store, tmp_path).model.num_classes == 9
  for count in (8, 10):
    config.model.num_classes = count
    with pytest.raises(InputError, match=f"has 9 classes, but config.model.num_classes is {count}"):
      check_store(FrozenConfigDict(config), store)


def test_a_workdir_from_before_there_was_a_note_loads_by_its_latents(pipeline, tmp_path):
  workdir = shutil.copytree(pipeline / "diffusion", tmp_path / "diffusion")
  (workdir / NOTE).unlink()
  assert Pipeline.load(workdir).class_names == Pipeline.load(pipeline / "diffusion").class_names
