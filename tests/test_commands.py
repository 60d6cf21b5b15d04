"""Bad input: a message that names it, before anything compiles, and nothing on disk is changed."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict
from safetensors.numpy import load_file, save_file

import launch.__main__
import launch.quickstart
from configs import base, quickstart
from launch import restore, tasks
from launch.encode import encode
from launch.engine import configuration, console, loop, ownership
from launch.evaluation.sample_files import read_samples
from launch.evaluation.training import _Distance
from launch.prepare import prepare
from launch.sample import sample_set
from launch.train import _say_unreached, train
from lightningdit_jax.store.latents import MANIFEST, STATISTICS, LatentStore
from tests import cases
from tests.conftest import ROOT
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json
from vavae_jax.data import changes

BENCHMARKS = ("steps", "page", "parts", "loading", "fid")
EVALUATIONS = (
  *("generation", "reconstruction", "latents", "sweep", "solvers", "frontier", "statistics"),
)
COMMANDS = (
  *(module.removeprefix("launch.") for module in launch.__main__.COMMANDS.values()),
  *(f"lab.benchmark {name}" for name in BENCHMARKS),
)
WEIGHTS = cases.FOLDER / "formats"
TINY = "--config=configs/quickstart.py:tokenizer,tiny"


def changed(config: ConfigDict, **changes) -> ConfigDict:
  with config.unlocked(), config.ignore_type():
    for key, value in changes.items():
      *parents, last = key.split("__")
      place = config
      for parent in parents:
        place = place[parent]
      place[last] = value
  return config


def contents(folder: Path) -> dict[str, bytes]:
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_refused(config: ConfigDict, workdir: Path, named: str) -> None:
  with pytest.raises(InputError, match=named):
    train(config, workdir / "new")
  assert not (workdir / "new").exists()


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"task": "tokeniser"}, "config.task is 'tokeniser'; choose one of"),
    ({"model__chh": 3}, r"config\.model\.chh is not .*did you mean config\.model\.ch\?"),
    ({"learning": 3}, r"config\.learning is not a configuration key"),
    ({"model__ch": "wide"}, r"config\.model\.ch is 'wide'; give an integer in"),
    ({"model__ch": 10}, r"config\.model cannot be built"),
    ({"model__patch_size": 0}, r"config\.model\.patch_size is 0"),
    ({"data__image_size": 16}, "too small"),
    ({"optimizer__decay_steps": 5}, "decay_steps is 5, .*num_steps is 6.* Set decay_steps to 6"),
    ({"optimizer__warmup_steps": 6}, "decay_steps is 6, but the warm-up alone takes 6"),
    ({"data__image_size": 72}, "image_size is 72.*multiple of its downsampling 16, such as"),
    ({"data__image_size": 0}, "image_size is 0"),
    ({"data__source": "embedded:cats"}, "embedded:cats"),
    ({"data__source": "folder:no/such/folder"}, "no/such/folder does not exist"),
    ({"data__held_out": 1.0}, r"held_out is 1\.0"),
    ({"data__held_out": 0.999}, "has 2 pictures for training, fewer than one batch of 8"),
    ({"teacher__name": "resnet"}, "resnet"),
    ({"teacher__weights": "no/such/file.pth"}, "no/such/file.pth"),
    (
      {"model__patch_size": 8},
      "feature for every 16 pixels along each axis, the model a latent for every 8",
    ),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"teacher__dtype": "bf16"}, "choose one of float32, bfloat16"),
    ({"train": "decoder"}, "name the weights"),
    ({"teacher__cache": "features"}, 'set config.data.crop to "center"'),
    ({"data__valid_source": "folder:no/such/folder"}, "no/such/folder does not exist"),
    ({"loss__kl_weight": -1.0}, r"give a number in \[0, 1e9\]"),
    ({"loss__disc_bn_group": 3}, "must divide config.batch_size 8"),
    ({"loss__disc_loss": "wgan"}, "choose one of hinge, vanilla"),
    (
      {"loss__perceptual_weight": 1.0, "perceptual__vgg": "no/vgg.pth"},
      "no/vgg.pth.*richzhang/PerceptualSimilarity",
    ),
    ({"teacher__name": "dinov2_vitl14"}, "No file of weights is given.*dinov2_vitl14"),
  ],
)
def test_wrong_tokenizer_settings_are_refused(tmp_path, changes, named):
  assert_refused(changed(quickstart.tokenizer(tiny=True), **changes), tmp_path, named)


def test_a_missing_key_is_named(tmp_path):
  config = quickstart.tokenizer(tiny=True)
  del config.model["ch"]
  assert_refused(config, tmp_path, r"lacks model\.ch")


def test_a_folder_without_pictures_is_refused(tmp_path):
  (tmp_path / "data" / "cat").mkdir(parents=True)
  (tmp_path / "data" / "cat" / "notes.txt").write_text("no picture")
  config = changed(quickstart.tokenizer(tiny=True), data__source=f"folder:{tmp_path / 'data'}")
  assert_refused(config, tmp_path, f"{tmp_path / 'data'} has no pictures")


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"latents__path": "no/such/store"}, "no/such/store holds no latent shards"),
    ({"latents__sha256": "0" * 64}, "trained on other latents"),
    ({"model__in_channels": 32}, "4x4 with 48 channels, config.model expects 4x4 with 32"),
    ({"model__input_size": 8}, "another tokenizer"),
    ({"model__num_classes": 8}, r"has 9 classes, but config\.model\.num_classes is 8"),
    ({"model__num_heads": 5}, "config.model cannot be built"),
    ({"batch_size": 66}, "has 65 latents, fewer than one batch of 66"),
    ({"sample__method": "leap"}, "config.sample.method is 'leap'; choose one of"),
    ({"sample__num_steps": 1}, "num_steps is 1"),
    ({"sample__cfg_channels": 49}, "cfg_channels is 49"),
    ({"sample__batch_size": 0}, "batch_size is 0"),
    ({"tokenizer": "no/such/workdir"}, "no/such/workdir does not exist; give a workdir, a model"),
  ],
)
def test_wrong_diffusion_settings_are_refused(pipeline, tmp_path, changes, named):
  config = changed(quickstart.diffusion(tiny=True), latents__path=str(pipeline / "latents"))
  assert_refused(changed(config, **changes), tmp_path, named)


@pytest.fixture
def store(pipeline, tmp_path):
  """A copy of the latents, to be spoilt."""
  return Path(shutil.copytree(pipeline / "latents", tmp_path / "latents"))


def refused_store(store: Path, named: str) -> None:
  config = changed(quickstart.diffusion(tiny=True), latents__path=str(store))
  assert_refused(config, store.parent, named)


def test_latents_without_statistics_are_refused(store):
  (store / STATISTICS).unlink()
  refused_store(store, "no statistics.*was not finished")


def test_statistics_of_another_tokenizer_are_refused(store):
  save_file({"mean": np.zeros((1, 32, 1, 1)), "std": np.ones((1, 32, 1, 1))}, store / STATISTICS)
  refused_store(store, "have 32 channels, its latents 48")


def test_a_damaged_shard_is_named(store):
  shard = store / "latents_rank00_shard001.safetensors"
  shard.write_bytes(shard.read_bytes()[:1000])
  refused_store(store, f"{shard} cannot be read")


def test_shards_of_two_tokenizers_are_refused(store):
  tensors = load_file(store / "latents_rank00_shard001.safetensors")
  for name in ("latents", "latents_flip"):
    tensors[name] = tensors[name][:, :32].copy()
  save_file(tensors, store / "latents_rank00_shard001.safetensors")
  refused_store(store, "disagree")


def test_a_workdir_of_another_configuration_is_refused(pipeline, pictures):
  config = quickstart.tokenizer(tiny=True)
  changed(config, data__source=f"folder:{pictures}", optimizer__b1=0.75)
  before = contents(pipeline / "tokenizer")
  with pytest.raises(InputError, match=r"config\.optimizer\.b1: .* there, 0\.75 now"):
    train(config, pipeline / "tokenizer")
  assert contents(pipeline / "tokenizer") == before


def test_a_workdir_is_loaded_as_what_it_is(pipeline, tmp_path):
  with pytest.raises(InputError, match="workdir of a tokenizer, but a diffusion is needed"):
    restore.load(pipeline / "tokenizer", "diffusion")
  with pytest.raises(InputError, match="is not a training's workdir"):
    restore.load(pipeline, "tokenizer")
  with pytest.raises(InputError, match=r"no checkpoint of step 3 \(there: \[4, 6\]\)"):
    restore.load(pipeline / "tokenizer", "tokenizer", 3)


def test_latents_are_decoded_only_by_their_tokenizer(pipeline, diffusion, tmp_path):
  other = tmp_path / "other"
  shutil.copytree(pipeline / "tokenizer", other)
  shutil.rmtree(other / "checkpoints" / "6")  # an earlier state is another tokenizer
  with pytest.raises(InputError, match="no checkpoint of step 6"):
    restore.tokenizer_of(diffusion, other)
  assert restore.tokenizer_of(diffusion).workdir == pipeline / "tokenizer"


def test_the_tokenizer_of_latents_is_known_by_its_weights(diffusion, store):
  manifest = json.loads((store / MANIFEST).read_text())
  manifest["tokenizer"]["sha256"] = "0" * 64
  (store / MANIFEST).write_text(json.dumps(manifest))
  with pytest.raises(InputError, match="is not the one that made the latents"):
    restore.tokenizer_of_latents(LatentStore(store))


def test_files_that_are_no_samples_are_refused(tmp_path):
  path = tmp_path / "samples.npz"
  for named in ("is not a file of pictures", "float64"):
    with pytest.raises(InputError, match=named):
      read_samples(path)
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3)))


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"diffusion__optimizer__warm_up": 3}, r"config\.diffusion\.optimizer\.warm_up is not"),
    ({"diffusion__model__num_heads": 5}, "num_heads=5"),
    ({"diffusion__sample__method": "leap"}, r"sample\.method is 'leap'; choose one of"),
    ({"diffusion__latents__path": "mine"}, r"latents\.path is 'mine'"),
    ({"tokenizer__model__embed_dim": 32}, r"\(4, 4, 32\), config\.diffusion takes \(4, 4, 48\)"),
    ({"encode__batch_size": 0}, r"config\.encode\.batch_size is 0"),
    ({"sample__num_samples": 3}, r"config\.sample\.num_samples is 3"),
    ({"diffusion__model__num_classes": 8}, r"has 9 classes, .*num_classes is 8; set it to 9"),
    ({"diffusion__batch_size": 1668}, r"has 1667 pictures .* config\.diffusion\.batch_size = 1668"),
    ({"tokenizer__data__held_out": 0.0005}, "has 1 held-out picture, .* at least 2"),
    ({"tokenizer__data__held_out": 0.0}, "has 0 held-out pictures, .* at least 2"),
    ({"diffusion__latents__valid_path": "no/such"}, "no/such holds no latent shards"),
    ({"diffusion__tokenizer": "mine"}, r"config\.diffusion\.tokenizer is 'mine'"),
    ({"diffusion__evaluate_samples": 1}, "evaluate_samples is 1"),
    ({"diffusion__init_from": "no/such.pt"}, r"init_from: no/such\.pt does not exist"),
    ({"diffusion__init_from": str(WEIGHTS / "vavae_lightning.ckpt")}, "not a LightningDiT's"),
    (
      {"diffusion__init_from": str(WEIGHTS / "lightningdit_bare_state_dict.pt")},
      "does not fit this model|of another architecture",
    ),
  ],
)
def test_quickstart_checks_all_stages_before_the_first(tmp_path, changes, named):
  config = changed(quickstart.pipeline(tiny=True), **changes)
  with pytest.raises(InputError, match=named):
    launch.quickstart.run(config, tmp_path / "new")
  assert not (tmp_path / "new").exists()


def test_quickstart_names_keys_as_its_configuration_has_them(pictures, tmp_path):
  config = changed(quickstart.pipeline(tiny=True), tokenizer__data__source=f"folder:{pictures}")
  config.tokenizer.data.split = "name"
  note = changes.check(tmp_path, config.tokenizer.data)
  note["source"]["listing"] = "another"
  write_json(tmp_path / "tokenizer" / changes.NOTE, note)
  with pytest.raises(InputError, match=r"by --config\.tokenizer\.data\.changed=allow"):
    launch.quickstart.run(config, tmp_path)


@pytest.mark.parametrize("name", ["report.html", "samples.npz", "generation.json"])
def test_quickstart_checks_the_files_of_all_stages_before_the_first(tmp_path, name):
  (tmp_path / name).mkdir()
  with pytest.raises(InputError, match=f"{name} is to be a file"):
    launch.quickstart.run(quickstart.pipeline(tiny=True), tmp_path)
  assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_set_that_the_disk_cannot_hold_is_refused_at_once(
  diffusion, tokenizer, pictures, tmp_path, monkeypatch
):
  monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=0))
  for start, what in (
    (lambda: prepare(f"folder:{pictures}", tmp_path / "set"), "pictures"),
    (lambda: encode(tokenizer, tmp_path / "latents"), "latents"),
    (lambda: sample_set(diffusion, tokenizer, tmp_path / "x.npz", num_samples=2), "samples"),
  ):
    with pytest.raises(InputError, match=f"MiB are needed for the {what}"):
      start()
  assert not (tmp_path / "x.parts").exists()


def test_latents_that_cannot_be_finished_are_refused_at_once(tokenizer, tmp_path):
  (tmp_path / MANIFEST).mkdir()
  with pytest.raises(InputError, match=f"{MANIFEST} is to be a file"):
    encode(tokenizer, tmp_path)
  assert list(tmp_path.iterdir()) == [tmp_path / MANIFEST]


@pytest.mark.parametrize("name", ["x.npz", "x.json", "x.png"])
def test_samples_that_cannot_be_written_are_refused_at_once(name, diffusion, tokenizer, tmp_path):
  (tmp_path / name).mkdir()
  with pytest.raises(InputError, match=f"{name} is to be a file"):
    sample_set(diffusion, tokenizer, tmp_path / "x.npz", num_samples=2)
  assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_pictures_of_a_distance_are_missed_before_training(tokenizer, tmp_path):
  assert _Distance(tokenizer, 2, tmp_path / "x.npz")
  data = tokenizer.config.data.to_dict() | {"source": "folder:no/such"}
  lost = FrozenConfigDict({"data": data})
  with pytest.raises(InputError, match="no/such does not exist"):
    _Distance(dataclasses.replace(tokenizer, config=lost), 2, tmp_path / "x.npz")


def test_a_disk_that_fills_up_ends_with_the_command_that_resumes(monkeypatch, capsys):
  def encode():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "shard")

  def run(main, argv, flags_parser):
    del flags_parser
    flags.FLAGS.mark_as_parsed()
    main(argv)

  monkeypatch.setattr(console.app, "run", run)
  monkeypatch.setattr(signal, "signal", lambda *given: None)
  monkeypatch.setattr(sys, "argv", ["encode"])
  with pytest.raises(SystemExit) as ended:
    console.run_command(encode)
  assert ended.value.code == 2
  told = capsys.readouterr().err
  assert "No space left on device: 'shard'; free some space, then resume with: cd " in told


def test_lists_and_tuples_are_the_same_configuration(tmp_path):
  config = quickstart.tokenizer(tiny=True)
  frozen = configuration.resolve(config, base.KEYS["tokenizer"])
  configuration.claim_workdir(tmp_path, frozen)
  configuration.check_workdir(tmp_path, frozen)


@pytest.mark.parametrize("task", base.KEYS)
def test_a_training_from_before_some_keys_goes_on(task, tmp_path):
  config, path = getattr(base, task)(), tmp_path / configuration.NAME
  for section, keys in configuration.LATER[task].items():
    config[section].update(keys)
  frozen = configuration.resolve(config, base.KEYS[task])
  configuration.claim_workdir(tmp_path, frozen)
  noted = json.loads(path.read_text())
  noted.pop("evaluate_probe", None)
  for section, keys in configuration.LATER[task].items():
    noted[section] = {k: x for k, x in noted[section].items() if k not in keys}
  path.write_text(json.dumps({k: x for k, x in noted.items() if x != {}}))
  assert configuration.check_workdir(tmp_path, frozen) == {}


def test_only_named_keys_may_change_when_a_run_goes_on(tmp_path):
  schema = quickstart.diffusion()
  configuration.claim_workdir(tmp_path, tasks.frozen(schema))
  schema.model.use_checkpoint = not schema.model.use_checkpoint
  changed = tasks.frozen(schema)
  configuration.check_workdir(tmp_path, changed, ["model.use_checkpoint"])
  with pytest.raises(InputError, match="use_checkpoint: False there, True now"):
    configuration.check_workdir(tmp_path, changed)


def test_a_decay_may_end_with_the_training_wherever_that_ends(tmp_path):
  config = quickstart.diffusion()
  configuration.claim_workdir(tmp_path, tasks.frozen(config))
  config.num_steps = 8_000
  found = configuration.check_workdir(tmp_path, tasks.frozen(config))
  assert found == {"optimizer.decay_steps": (4_000, 8_000)}
  config.optimizer.decay_steps = 9_000
  with pytest.raises(InputError, match="decay_steps: 4000 there, 9000 now"):
    configuration.check_workdir(tmp_path, tasks.frozen(config))


@pytest.mark.parametrize(
  ("task", "steps", "said"),
  [
    ("diffusion", 600, ""),
    ("diffusion", 599, "599: training ends short of config.optimizer.decay_steps=600"),
    ("diffusion", 500, "600, config.transport.lognorm_until=500, config.route.until=500"),
    ("tokenizer", 2_000, ""),
    ("tokenizer", 1_800, "1800: training ends short of config.stages.disc_start=(1800,)"),
  ],
)
def test_a_schedule_that_is_cut_short_is_told(task, steps, said, capsys):
  config = quickstart.get_config(task)
  config.num_steps = steps
  if task == "diffusion":
    config.optimizer.decay_steps = 600
    config.transport.lognorm_until = config.route.until = 500
    config.route.share = 0.5
  _say_unreached(tasks.resolve(config))
  printed = capsys.readouterr().out
  assert said in printed
  assert bool(said) == bool(printed)


def test_a_training_may_change_the_options_that_leave_the_numbers(monkeypatch, tmp_path):
  given = {}
  monkeypatch.setattr(loop, "run", lambda *_, **options: given.update(options))
  train(quickstart.tokenizer(tiny=True), tmp_path)
  names = {"use_checkpoint", "remat_policy", "attention", "scan_unroll", "reduce_dtype"}
  assert {*given["may_change"]} == {f"model.{name}" for name in names}


# As a person meets them: real processes, forks of one that has imported the libraries.


@pytest.fixture(scope="module")
def outcomes(forked, pipeline, pictures, tmp_path_factory):
  """What wrong command lines end with, by name."""
  root = tmp_path_factory.mktemp("commands")
  new = f"--workdir={root / 'new'}"
  spoilt = Path(shutil.copytree(pictures, root / "pictures"))
  picture = sorted(spoilt.rglob("*.png"))[30]
  picture.write_bytes(picture.read_bytes()[:200])
  (root / "file").write_text("no folder")
  lines = {
    "no such key": ["launch.train", TINY, new, "--config.model.chh=3"],
    "no such group": ["launch.quickstart", new, "--config.tokenizer.modell.ch=3"],
    "no such file": ["launch.train", "--config=configs/nothing.py", new],
    "no such argument": ["launch.train", "--config=configs/quickstart.py:nonsense", new],
    "no such flag": ["launch.train", TINY, new, "--nonsense=3"],
    "an empty workdir": ["launch.train", TINY, "--workdir="],
    "a word too many": ["launch.train", TINY, new, "again"],
    "an empty word": ["launch.convert", str(pipeline / "tokenizer"), ""],
    "no such file at home": ["launch.convert", "~/nothing_here", "x"],
    "a model in a bucket": ["launch.export", "--workdir=x", "--output=gs://bucket/model"],
    "no name on the hub": [
      "launch.export",
      "--workdir=x",
      f"--output={root / 'new'}",
      "--push=a b",
    ],
    "an empty key": ["launch.train", TINY, new, "--config.data.source="],
    "nothing to evaluate": ["launch.evaluate", "everything", f"--output={root / 'new'}"],
    "no such class": [
      *("launch.sample", f"--workdir={pipeline / 'diffusion'}", "--labels=3,9"),
      f"--output={root / 'new.npz'}",
    ],
    "two samplers": [
      *("launch.sample", f"--workdir={pipeline / 'diffusion'}", "--published", "--method=heun"),
      f"--output={root / 'new.npz'}",
    ],
    "no folder": [
      *("launch.encode", f"--workdir={pipeline / 'tokenizer'}", f"--output={root / 'file' / 'x'}"),
    ],
    "unreadable picture": [
      *(
        "launch.train",
        TINY,
        f"--workdir={root / 'begun'}",
        f"--config.data.source=folder:{spoilt}",
      ),
      *("--config.data.held_out=0.0", "--config.evaluate_every_steps=0"),
      *("--config.num_steps=20", "--config.optimizer.decay_steps=20"),
    ],
  }
  lines |= _owned(root, pipeline)
  libraries = "grain,launch.evaluate,launch.quickstart"
  ended = dict(zip(lines, forked(lines.values(), libraries), strict=True))
  assert not (root / "new").exists()
  assert not (root / "new.npz").exists()
  assert not (root / "begun").exists()
  assert [path.name for path in (root / "owned").iterdir()] == [".owner"]
  return ended, picture


def _owned(root, pipeline):
  """Commands whose output is another process's, which is this one."""
  noted = {"machine": ownership._machine(), "process": (pid := os.getpid())}
  note = json.dumps(noted | {"began": ownership._began(pid)})
  (root / "owned").mkdir()
  (root / "later" / "latents").mkdir(parents=True)
  for path in ("owned/.owner", ".owned.owner", "later/latents/.owner"):
    (root / path).write_text(note)
  output = f"--output={root / 'owned'}"
  return {
    "train": ["launch.train", TINY, f"--workdir={root / 'owned'}"],
    "quickstart": ["launch.quickstart", f"--workdir={root / 'owned'}"],
    "its latents": ["launch.quickstart", f"--workdir={root / 'later'}"],
    "prepare": ["launch.prepare", "--source=embedded:emoji", output],
    "encode": ["launch.encode", f"--workdir={pipeline / 'tokenizer'}", output],
    "sample": ["launch.sample", f"--workdir={pipeline / 'diffusion'}", f"{output}.npz"],
    "evaluate": ["launch.evaluate", "frontier", "--point=a:b:c", output],
    "convert": ["launch.convert", str(pipeline / "tokenizer"), str(root / "owned.npz")],
  }


@pytest.mark.parametrize(
  ("name", "told"),
  [
    ("no such key", "config.model.chh is not a configuration key; did you mean config.model.ch?"),
    ("no such group", "config.tokenizer.modell.ch is not a configuration key; did you mean"),
    ("no such file", "configs/nothing.py"),
    ("no such argument", "'nonsense' is none of"),
    ("no such flag", "there is no flag --nonsense; see python -m launch.train --help"),
    ("an empty workdir", "--workdir is empty"),
    ("a word too many", "Unexpected argument 'again'"),
    ("an empty word", "An argument is empty"),
    ("no such file at home", f"error: {Path.home()}/nothing_here does not exist"),
    ("a model in a bucket", "gs://bucket/model: only trainings, latents, samples and evaluations"),
    ("no name on the hub", "a b could not be pushed (Repo id must"),
    ("an empty key", "config.data.source is ''; give a text that is not empty"),
    ("nothing to evaluate", "invalid choice: 'everything'"),
    ("no such class", "--labels is '3,9': There is no class 9; they are 0 to 8."),
    ("two samplers", "--published and --method exclude each other"),
    ("no folder", "Not a directory"),
    ("unreadable picture", "The picture {picture} cannot be read"),
    *(
      (name, "is being written by `None`, process {process} on")
      for name in (
        *("train", "quickstart", "its latents", "prepare"),
        *("encode", "sample", "evaluate", "convert"),
      )
    ),
  ],
)
def test_a_wrong_command_line_ends_with_one_line(outcomes, name, told):
  ended, picture = outcomes
  done = ended[name]
  assert done.returncode == 2, done.stderr
  assert done.stderr.startswith("error: ")
  assert told.format(picture=picture, process=os.getpid()) in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1


# Each takes a tenth of a second or more to import.
SLOW = {
  "diffrax",
  "grain",
  "jinja2",
  "matplotlib",
  "orbax.checkpoint",
  "scipy.stats",
  "sklearn",
  "tensorboardX",
}


def test_help_of_every_command_says_what_it_does_without_slow_imports(forked):
  answers = forked([[*f"launch.{name}".split(), "--help"] for name in COMMANDS], imported="jax")
  for name, done in zip(COMMANDS, answers, strict=True):
    module = ROOT / "launch" / name.replace(".", "/").replace(" ", "/")
    file = module / "__main__.py" if module.is_dir() else module.with_suffix(".py")
    source = file.read_text()
    docstring = source.split('"""')[1].strip()
    told = " ".join(done.stdout.split())
    assert " ".join(docstring.split()) in told, name
    assert any(flag in told for flag in ("--workdir: ", "--output: ", "--to: ", "subcommands:"))
    assert ("--config: " in told) == ("define_flag(" in source), name
    if name == "sample":
      assert "(default: the model's own, usually 250)" in told
      assert 'Choose one of "", Mean, Tweedie, Euler.' in told  # as they are to be given
    assert "--trace_after" not in told, name  # --helpfull has what all commands share
    assert (done.returncode, done.stderr) == (0, "")
    assert "launch.engine.console" in done.modules
    assert not SLOW & done.modules, name


def test_every_command_tells_the_next_one():
  for name in COMMANDS:
    if not name.startswith(("lab.", "studio")):  # which end with a page, or when they are stopped
      path = ROOT / "launch" / name
      path = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
      assert "console.say_next(" in path.read_text(), name


@pytest.mark.parametrize("words", ["launch", "launch.sample --helpfull"])
def test_a_reader_that_stops_reading_is_no_error(words, environment):
  reader, writer = os.pipe()
  os.close(reader)
  with open(writer, "w") as gone:
    done = subprocess.run(
      [sys.executable, "-m", *words.split()],
      env=environment,
      cwd=ROOT,
      stdout=gone,
      stderr=subprocess.PIPE,
      text=True,
    )
  assert (done.returncode, done.stderr) == (0, "")


def test_help_is_no_error_for_a_reader_that_stops_reading_by_any_command(forked):
  lines = [*(f"launch.{name}" for name in COMMANDS), "launch"]
  lines += [f"launch.evaluate {name}" for name in EVALUATIONS]
  words = [[*line.split(), "--help"] for line in lines]
  answers = forked(words, "launch.evaluate,launch.quickstart", READER="gone")
  for line, done in zip(lines, answers, strict=True):
    assert (done.returncode, done.stderr) == (0, ""), line


GIVEN = "launch.sample --workdir=a --output=a.npz "
WRONG_FLAGS = {
  "launch.sample": "--workdir and --output are missing; give --workdir=RUNS/diffusion "
  "--output=RUNS/samples.npz",
  "launch.evaluate": "NAME is missing; choose one of generation, reconstruction, ",
  f"launch.train {TINY}": "--workdir is missing; give --workdir=runs/tokenizer",
  "launch.sample --workdir": "--workdir has no value; give --workdir=RUNS/diffusion",
  f"{GIVEN}--seed=-1": "--seed is -1; give an integer in [0, 4294967295]",
  f"{GIVEN}--seed={10**20}": f"--seed is {10**20}; give an integer in [0, 4294967295]",
  f"{GIVEN}--num_samples={10**14}": f"is {10**14}; give an integer in [1, 100000000]",
  f"{GIVEN}--num_samples ten": "--num_samples is ten; give an integer in [1, 100000000]",
  f"{GIVEN}--cfg_scale=x:y": "--cfg_scale is x:y; give a number",
  f"{GIVEN}--png=7": "--png is 7; give True or False",
  f"{GIVEN}--trace_after=-1": "--trace_after is -1; give a number in [0, inf)",
  "launch.evaluate reconstruction --image_size=-64": "is -64; give an integer in [0, inf)",
  "launch.evaluate generation --image_size=-64": "is -64; give an integer in [0, inf)",
  "launch.lab.equivalence --image_size=0": "--image_size is 0; give an integer in [16, inf)",
  "launch.lab.equivalence --seed=-1": "--seed is -1; give an integer in [0, 4294967295]",
  "launch.convert --to=pth": '--to is pth; choose one of "", folder, safetensors, pt',
  "launch.lab.plan --output=gs://b/x": "gs://b/x: only trainings, latents, samples and evalu",
  f"launch.train {TINY} --config.optimizer=3": "is a section; give one of its keys, --config.op",
  f"launch.train {TINY} --config.data.flip=x": "--config.data.flip is x; give True or False",
  f"launch.train {TINY} --config.num_steps=x": "--config.num_steps is x; give an integer; see doc",
}


def test_what_is_wrong_with_a_flag_is_said_in_our_words_by_every_command(forked):
  every = (*COMMANDS, *(f"evaluate {name}" for name in EVALUATIONS))
  named = [name for name in every if name not in ("evaluate", "lab.benchmark")]
  unknown = {
    f"launch.{name} --nonsense=3": "there is no flag --nonsense; see python -m launch."
    f"{name} --help"
    for name in named
  }
  cases = WRONG_FLAGS | unknown
  answers = forked([line.split() for line in cases], imported="launch.evaluate,launch.quickstart")
  for (line, told), done in zip(cases.items(), answers, strict=True):
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert told in done.stderr, line
