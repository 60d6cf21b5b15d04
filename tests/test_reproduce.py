"""launch.reproduce, whole, on stand-ins of every published file, and on the absence of the real."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from PIL import Image
from safetensors.numpy import save_file

from configs import base
from launch import restore
from launch.convert import convert
from launch.engine.checkpoint import save_weights
from launch.evaluation.features import CLASSIFIER, load_network
from launch.evaluation.pictures import Array
from launch.evaluation.reference import statistics_of
from launch.reproduce import __main__ as command
from launch.reproduce import checks, estimates
from launch.reproduce.checked import CAUSES, Checked
from launch.reproduce.given import Given
from launch.reproduce.needs import needs, reads
from launch.reproduce.recipes import config_of
from launch.reproduce.records import RECORDS, File, Pictures, Record, Tokenizer
from lightningdit_jax.store import fetching
from tests import cases
from tests.conftest import ROOT, start_job
from tests.survive import ended
from vavae_jax import classification
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import sha256_of
from vavae_jax.data import images

FORMATS = cases.FOLDER / "formats"
VAE, DIT = FORMATS / "vavae_lightning.ckpt", FORMATS / "lightningdit_train_checkpoint.pt"
SIDE, CLASSES, EACH = 16, 5, 4
TOKENIZER = """
from configs import base

def get_config():
  config = base.tokenizer()
  config.model.update(embed_dim=8, z_channels=8, ch=32, ch_mult=(1, 2, 2), num_res_blocks=1)
  config.model.update(attn_resolutions=(64,), resolution=256)
  config.data.image_size = 16
  config.batch_size, config.num_steps, config.log_every_steps = 4, 2, 1
  config.teacher.name, config.loss.perceptual_weight, config.loss.disc_weight = "", 0.0, 0.0
  config.stages.update(
    epochs=(0.0,), vf_weight=(0.0,), cos_margin=(0.0,), distmat_margin=(0.0,), disc_start=(0,)
  )
  config.evaluate_every_steps = 0
  return config
"""
DIFFUSION = """
from configs import base

def get_config():
  config = base.diffusion()
  config.model.update(
    input_size=4, in_channels=8, hidden_size=32, depth=1, num_heads=2, num_classes=5
  )
  config.dtype, config.batch_size, config.num_steps, config.log_every_steps = "float32", 4, 3, 1
  config.evaluate_every_steps = 0
  config.sample.update(num_steps=3, batch_size=8)
  config.published.num_samples = 10
  return config
"""


@dataclasses.dataclass(frozen=True)
class Published:
  """A made-up publication: records, and a person's flags that name all its files."""

  sampled: Record
  rebuilt: Record
  files: Given
  statistics: dict[str, np.ndarray]
  arrays: dict[str, np.ndarray]  # of FID's reference

  def given_with(self, record: Record | None = None, **changes) -> Given:
    """The flags of its files that a number reads, and `changes`; by default that of samples."""
    given = dataclasses.replace(self.files, **changes)
    read = reads(record or self.sampled, given)
    unread = [flag for flag in read if not read[flag] and flag not in changes]
    return dataclasses.replace(given, **dict.fromkeys(unread, ""))

  @property
  def given(self) -> Given:
    return self.given_with()


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Published:
  """Random weights in the published formats, with all that belongs to them."""
  root = tmp_path_factory.mktemp("published")
  for name, text in (("tokenizer", TOKENIZER), ("diffusion", DIFFUSION)):
    (root / f"{name}.py").write_text(text)
  coarse = np.random.default_rng(0).integers(0, 256, (CLASSES * EACH, 4, 4, 3), np.uint8)
  picture_BHWC = coarse.repeat(4, 1).repeat(4, 2)
  for i, picture in enumerate(picture_BHWC):
    folder = root / "pictures" / f"class{i // EACH}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(folder / f"{i}.png")
  config = config_of(str(root / "tokenizer.py"), {})
  convert(str(VAE), root / "vae", config=config)
  tokenizer = restore.load(root / "vae", "tokenizer")

  def encode(x_BHWC: jax.Array) -> jax.Array:
    encoder = restore.autoencoder(tokenizer.config, tokenizer.params)
    return encoder.encode(images.to_float(x_BHWC)).mean

  z_BhwZ = np.asarray(jax.jit(encode)(picture_BHWC))
  statistics = {"mean": z_BhwZ.mean((0, 1, 2)), "std": z_BhwZ.std((0, 1, 2))}
  save_file(statistics, root / "statistics.safetensors")
  judge = base.classifier()
  judge.model.update(width=8, norm_groups=4)
  judge.data.image_size, judge.name, judge.optimizer.ema_decays = SIDE, "tiny", ()
  state = classification.init_state(FrozenConfigDict(judge), jax.random.key(0))
  save_weights(root / "judge", state.params, judge.to_dict())
  network = load_network(CLASSIFIER, str(root / "judge"))
  moments = statistics_of(Array(picture_BHWC), network, "reference").moments["pool"]
  arrays = {"arr_0": picture_BHWC, "mu": moments.mean, "sigma": moments.cov}
  np.savez(root / "reference.npz", **arrays)
  size = len(moments.mean)
  pictures = Pictures(
    "stand-ins", "nowhere", "folder:none", len(picture_BHWC), CLASSES, ("class0", "class4")
  )
  rebuilt = Record(
    "a tokenizer",
    "no table",
    {"rfd_tiny": 1.0, "psnr": 10.0, "ssim": 0.5},
    Tokenizer("f4d8", str(root / "tokenizer.py"), File(sha256=sha256_of(VAE)[:8]), psnr=10.0),
    protocol=CLASSIFIER,
    pictures=pictures,
    validation=dataclasses.replace(pictures, classes=0),
  )
  sampled = dataclasses.replace(
    rebuilt,
    figures={"fd_tiny": 5.0, "precision": 0.5},
    recipe=str(root / "diffusion.py"),
    weights=File(sha256=sha256_of(DIT)[:8]),
    arrays={"arr_0": picture_BHWC.shape, "mu": (size,), "sigma": (size, size)},
    log={1: 3.0, 3: 3.0},
  )
  given = Given(
    tokenizer=str(VAE),
    diffusion=str(DIT),
    statistics=str(root / "statistics.safetensors"),
    reference=str(root / "reference.npz"),
    inception=str(root / "judge"),
    pictures=f"folder:{root / 'pictures'}",
    validation=f"folder:{root / 'pictures'}",
  )
  return Published(sampled, rebuilt, given, statistics, arrays)


def make(record: Record, given: Given, workdir: Path, **options) -> dict:
  """The result's JSON."""
  figures = command.reproduce("number", record, given, workdir, plan=False, **options)
  result = json.loads((workdir / command.RESULT).read_text())
  assert {key: result["figures"][key]["here"] for key in record.figures} == {
    key: figures.get(key) for key in record.figures
  }
  return result


@pytest.fixture(scope="module")
def from_weights(published, tmp_path_factory) -> Path:
  """The workdir of a number that was made from published weights."""
  workdir = tmp_path_factory.mktemp("from_weights")
  make(published.sampled, published.given, workdir)
  return workdir


def test_fid_of_published_weights(published, from_weights):
  result = json.loads((from_weights / command.RESULT).read_text())
  assert result["figures"]["fd_tiny"]["published"] == 5.0
  assert result["figures"]["fd_tiny"]["here"] > 0
  assert result["record"]["weights"]["sha256"] == sha256_of(DIT)[:8]
  assert result["config"]["sample"]["num_steps"] == 3
  assert (result["evaluation"]["samples"]["pictures"], result["allowed"]) == (10, [])
  assert {"command", "commit", "device", "jax"} <= result["run"].keys()
  told = {what: (found, verdict) for what, found, verdict in result["checks"]}
  assert sha256_of(VAE) in told["tokenizer file"][0]
  assert told["statistics file"][1] == "the published one's hash is not publicly known"
  assert all("WRONG" not in verdict for _, verdict in told.values())


def test_figures_are_shown_beside_the_published_ones(published, from_weights, capsys):
  """Also one that was not computed; then comes a command whose files are there."""
  figures = {"fd_tiny": 12.3456}
  command.show_result("tiny", published.sampled, published.given, from_weights, figures)
  shown, _, command_line = capsys.readouterr().out.partition("next: ")
  shown = " ".join(shown.replace("│", " ").split())
  assert "fd_tiny 12.35 5" in shown
  assert "precision - 0.5" in shown
  words = dict(word.split("=", 1) for word in command_line.split() if "=" in word)
  assert Path(words["--workdir"], "checkpoints").is_dir()
  assert Path(words["--tokenizer"], "checkpoints").is_dir()
  assert Path(words["--evaluations"]).is_file()


def test_what_is_done_is_not_done_again(published, from_weights):
  before = {path: path.stat().st_mtime_ns for path in from_weights.rglob("*") if path.is_file()}
  make(published.sampled, published.given, from_weights)
  kept = {path.name for path, time in before.items() if path.stat().st_mtime_ns == time}
  assert {"samples.npz", "samples.json", "config.json", "diffusion.json"} <= kept
  with pytest.raises(InputError, match="begun with another name"):
    command.reproduce("other", published.sampled, published.given, from_weights)


def copy_converted(there: Path, here: Path) -> None:
  """What the command made of the files of weights, as if it had made it here."""
  for name in ("tokenizer", "diffusion", "statistics"):
    shutil.copytree(there / name, here / name)
    shutil.copy(there / f"{name}.json", here)
  for name in ("diffusion.json", "diffusion/config.json"):
    text = (here / name).read_text()
    (here / name).write_text(text.replace(str(there), str(here)))


def test_two_processes_make_the_same_number(published, from_weights, environment, tmp_path):
  """Of what one process has converted; before that they say what to do."""
  (number := tmp_path / "number").write_bytes(pickle.dumps((published.sampled, published.given)))

  def run() -> list[tuple[int, str]]:
    job = start_job(("tests.reproduced", number, tmp_path / "work"), environment, 2)
    return [ended(process) for process in job]

  code, printed = run()[0]
  assert (code, "begin with --check, in one process" in printed) == (2, True), printed
  copy_converted(from_weights, tmp_path / "work")
  for code, printed in run():
    assert code == 0, printed
  for name in ("samples.npz", "samples.json"):
    assert (tmp_path / "work" / name).read_bytes() == (from_weights / name).read_bytes()
  results = (folder / command.RESULT for folder in (from_weights, tmp_path / "work"))
  one, two = (json.loads(result.read_text()) for result in results)
  assert one["figures"] == two["figures"]


def refused(record: Record, given: Given, workdir: Path) -> str:
  with pytest.raises(InputError, match="The number would not come out") as caught:
    checks.check(record, given, workdir)
  return str(caught.value)


def test_everything_that_is_wrong_is_named_at_once(published, from_weights, tmp_path):
  """Other hashes, statistics of normalised latents, another recipe, another reference. Then a file
  given anew is taken, an interrupted conversion made again, and a folder of others not touched.
  """
  copy_converted(from_weights, tmp_path)
  note = json.loads(note_of_model := (tmp_path / "diffusion.json").read_text())
  (tmp_path / "diffusion.json").write_text(json.dumps(note | {"part": "model"}))
  save_file(
    {"mean": np.zeros(8, np.float32), "std": np.ones(8, np.float32)}, tmp_path / "s.safetensors"
  )
  arrays = published.arrays | {"mu": published.arrays["mu"] + 1}
  np.savez(tmp_path / "other.npz", **arrays)
  tokenizer = dataclasses.replace(published.sampled.tokenizer, file=File(sha256="0000"), psnr=27.96)
  record = dataclasses.replace(
    published.sampled,
    tokenizer=tokenizer,
    changes={"model.use_rope": False, "latents.latent_multiplier": 0.18215},
    reference=File(sha256="1111"),
    arrays={**published.sampled.arrays, "mu_s": (2023,)},
    log={80_000: 0.3},
  )
  others = {"reference": str(tmp_path / "other.npz"), "statistics": str(tmp_path / "s.safetensors")}
  given = published.given_with(**others)
  told = refused(record, given, tmp_path)
  wrong = (
    "tokenizer file: the published one's sha256 begins 0000 (tokenizer)",
    "FID's reference: the published one's sha256 begins 1111 (reference)",
    "its arrays: it lacks mu_s (2023,) (reference)",
    "mean feature of 20 pictures: the statistics are of another network or other pictures",
    "latents of these pictures: they are of others, or normalised already",
    "PSNR of 20 pictures: 27.96 dB are published (tokenizer)",
    "config.model.use_rope is True instead of False",
    "config.latents.latent_multiplier is 1.0 instead of 0.18215",
    "the weights are model of the file and no average (model)",
    "mean squared error of these: the published log ends with 0.3 (model)",
  )
  for part in wrong:
    assert part in told, part
  told = refused(record, published.given_with(train=True, **others), tmp_path)
  for part in wrong[:6]:  # all but the model's, before the latents of a training are made
    assert part in told, part
  fetching.open_store.cache_clear()  # as a new process
  (tmp_path / "diffusion.json").write_text(note_of_model.replace('"part"', '"p"'))
  checks.check(published.sampled, published.given, tmp_path)
  (tmp_path / "diffusion.json").unlink()
  with pytest.raises(InputError, match="diffusion is not of this command"):
    checks.check(published.sampled, published.given, tmp_path)


def test_a_file_of_another_number_is_told_by_its_name(tmp_path, capsys):
  """Whose hashes nobody has published, and whose architectures are the same."""
  records = RECORDS["fid2.11"], RECORDS["fid1.35"]
  (tmp_path / records[1].weights.name).write_text("weights")
  right, wrong, allowed = Checked((), None), Checked((), None), Checked(("model",), None)
  right.file("model", "file", tmp_path / records[1].weights.name, records[1].weights)
  right.end()
  wrong.file("model", "file", tmp_path / records[1].weights.name, records[0].weights)
  with pytest.raises(InputError, match=r"needed is lightningdit-xl-imagenet256-64ep\.pt"):
    wrong.end()
  allowed.file("model", "file", tmp_path / records[1].weights.name, records[0].weights)
  allowed.end()
  assert "ALLOWED: its name" in capsys.readouterr().out.replace("\n", " ")


def test_fid_of_a_training(published, tmp_path, capsys, monkeypatch):
  """Latents, training beside the published log, samples, FID; then the latents are given."""
  record = dataclasses.replace(
    published.sampled, log={1: 1e3, 3: 3.0}, tolerance=((2, 0.05), (9, 9.0))
  )
  given = published.given_with(train=True)
  result = make(record, given, tmp_path)
  assert result["log"].keys() == {"1", "3"}
  assert result["log"]["3"]["published"] == 3.0
  assert list(result["seconds"]) == ["Latents", "Training", "Samples", "Evaluation"]
  told = capsys.readouterr().out.replace("\n", " ")
  for part in ("step 1: mse", "WARNING: more than 5% apart", "step 3: mse"):
    assert part in told, part
  assert "more than 900%" not in told
  given_latents = published.given_with(train=True, latents=str(tmp_path / "latents"))
  # The tokenizer of random weights makes latents of more noise than published ones have.
  allowed = dataclasses.replace(given_latents, allow=("tokenizer",))
  again = make(record, allowed, tmp_path / "again")
  assert list(again["seconds"]) == ["Training", "Samples", "Evaluation"]
  assert again["figures"] == result["figures"]
  # Of these latents the records are wrong, and their labels.
  monkeypatch.setattr(checks.probes, "together", lambda *_: None)
  few = dataclasses.replace(record.pictures, count=22, classes=6)
  told = refused(dataclasses.replace(record, pictures=few), given_latents, tmp_path)
  assert "latents: stand-ins has 22 (pictures)" in told
  assert "classes of the latents: 6 are needed (labels)" in told
  named = dataclasses.replace(
    record, pictures=dataclasses.replace(few, ends=("n01440764", "class4"))
  )
  told = refused(named, given, tmp_path)
  assert "pictures: stand-ins has 22 (pictures)" in told
  assert "classes: 6 from n01440764 to class4 are needed (labels)" in told


def test_rfid_of_a_tokenizer(published, tmp_path):
  given = published.given_with(published.rebuilt)
  result = make(published.rebuilt, given, tmp_path)
  assert result["figures"]["rfd_tiny"]["here"] > 0
  assert result["evaluation"]["posterior"] == "sample"
  unknown = dataclasses.replace(published.rebuilt.tokenizer, psnr=0.0)
  told = refused(dataclasses.replace(published.rebuilt, tokenizer=unknown), given, tmp_path)
  assert "PSNR of 20 pictures: 20.0 dB at least are expected (tokenizer)" in told
  train = published.given_with(published.rebuilt, train=True)
  trained = make(published.rebuilt, train, tmp_path / "trained")
  assert list(trained["seconds"]) == ["Training", "Evaluation"]
  assert trained["figures"]["psnr"]["here"] > 0
  # Its training is checked before it starts: there is no teacher's file.
  config = (Path(published.rebuilt.tokenizer.recipe).read_text()).replace(
    "config.teacher.name, ", "config.teacher.name, config.teacher.scale, "
  )
  recipe = tmp_path / "aligned.py"
  recipe.write_text(config.replace('= "", 0.0', '= "dinov2_vits14", 4, 0.0'))
  aligned = Tokenizer("aligned", str(recipe))
  with pytest.raises(InputError, match=r"^Give --teacher: "):
    checks.check(dataclasses.replace(published.rebuilt, tokenizer=aligned), train, tmp_path)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", RECORDS)
def test_every_absent_file_of_a_number_is_named(name, train, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  record, given = RECORDS[name], Given(train=train)
  with pytest.raises(InputError, match=r"^Give --.* and named above"):
    checks.check(record, given, tmp_path)
  told = "".join(capsys.readouterr().out.split())
  for flag, need in needs(record, given).items():
    assert f"--{flag}takesit" in told
    assert (need.file.address or "publishednowhere") in told
    assert all(place in told for place in need.places[:1])


def test_what_nobody_can_change_is_refused(published, tmp_path):
  for word in ("sample.cfg_scale=4", "num_steps=7", "latents.path=x", "published.labels=balanced"):
    with pytest.raises(InputError, match="would change the number; choose of"):
      config_of(published.sampled.recipe, {}, published.given_with(set=(word,)))
  with pytest.raises(InputError, match=r"accumulate_steps is of another kind.* needs int"):
    config_of(published.sampled.recipe, {}, published.given_with(set=("accumulate_steps",)))
  words = (
    "sample.batch_size=4",
    "mesh.fsdp=-1",
    "model.attention=xla",
    "model.use_checkpoint=True",
  )
  config = config_of(published.sampled.recipe, {}, published.given_with(set=words, seed=3))
  assert (config.sample.batch_size, config.mesh.fsdp, config.seed) == (4, -1, 3)
  with pytest.raises(InputError, match="--allow is 'all'; choose of inception"):
    checks.check(published.sampled, published.given_with(allow=("all",)), tmp_path)
  with pytest.raises(InputError, match=r"^--allow=labels: no .* are for inception, reference, t"):
    checks.check(published.sampled, published.given_with(allow=("labels",)), tmp_path)
  with pytest.raises(InputError, match=r"sample.batch_size=2: .* has no sample\.batch_size"):
    config_of(published.rebuilt.tokenizer.recipe, {}, Given(set=("sample.batch_size=2",)))
  given = published.given_with(set=("batch_size=8",), reference="", train=True)
  with pytest.raises(InputError, match="--set=batch_size=8 would change"):  # before a download
    checks.check(published.sampled, given, tmp_path)


@pytest.mark.parametrize(
  ("number", "changes", "told"),
  [
    ("sampled", {"latents": "x"}, "--latents would not .*, or give --train"),
    ("sampled", {"pictures": "x"}, "--pictures would not .*, or give --train"),
    ("sampled", {"teacher": "x", "pictures": "x"}, r"--pictures and --teacher would .* reads\.$"),
    ("sampled", {"train": True, "diffusion": "x"}, "--diffusion would not .*, or --train"),
    ("sampled", {"train": True, "latents": "x", "pictures": "x"}, "--pictures would not"),
    ("sampled", {"diffusion": "runs/xl", "statistics": "x"}, r"--statistics would .* reads\.$"),
    (
      "sampled",
      {"train": True, "latents": "x", "statistics": "x"},
      r"--statistics would .* reads\.$",
    ),
    ("rebuilt", {"reference": "x"}, "--reference would not"),
    ("rebuilt", {"teacher": "x"}, r"--teacher would not .* reads\.$"),
    ("rebuilt", {"train": True, "tokenizer": "x"}, "--tokenizer would not .*, or --train"),
    ("rebuilt", {"train": True, "teacher": "x"}, r"--teacher would not .* reads\.$"),
    ("rebuilt", {"set": ("loader.threads=2",)}, "--set=loader.* would not .*, or give --train"),
    (
      "sampled",
      {"set": ("sample.batch_size=4", "accumulate_steps=2")},
      "^--set=accumulate_steps=2 would not .*, or give --train",
    ),
  ],
)
def test_a_flag_that_nothing_would_read_is_refused(published, number, changes, told, tmp_path):
  record = getattr(published, number)
  with pytest.raises(InputError, match=told):
    checks.check(record, Given(**changes), tmp_path)


@pytest.mark.parametrize(
  ("name", "near"),
  [
    ("table3", "fid2.11, fid5.14, fid1.35, fid2.17"),
    ("table2/f16d32-dinov2/xl", "table2/f16d32-dinov2/XL"),
    ("2.11", "fid2.11"),
  ],
)
def test_a_number_that_is_none_has_its_neighbours_named(name, near):
  with pytest.raises(InputError, match=f"no number '{name}'; did you mean {near}"):
    command.main(name)


def test_the_recipes_of_the_numbers_are_as_published():
  config = config_of(RECORDS["fid2.11"].recipe, RECORDS["fid2.11"].changes)
  sample = config.sample
  assert (sample.method, sample.num_steps, sample.timestep_shift) == ("euler", 250, 0.3)
  assert (sample.cfg_scale, sample.cfg_interval_start, sample.cfg_channels) == (10.0, 0.1, 3)
  assert (config.published.num_samples, config.published.labels) == (50_000, "uniform")
  assert RECORDS["sdvae7.13"] is RECORDS["table1/rope"]
  for name, record in RECORDS.items():
    if record.recipe:
      config = config_of(record.recipe, record.changes)
      own = config_of(record.tokenizer.recipe, {})
      assert config.model.in_channels == own.model.embed_dim, name
      assert config.published.num_samples == (
        10_000 if name.startswith(("table2", "table4", "table5")) else 50_000
      ), name


def test_the_page_has_every_number_and_cause():
  numbers, causes = {}, {}
  for line in (ROOT / "docs" / "reproduce.md").read_text().splitlines():
    name, *cells = (cell.strip().strip("`") for cell in line.strip("|").split("|"))
    if name.startswith("table2/"):
      values = zip(("rfid", "B", "L", "XL"), cells, strict=False)
      numbers |= {f"{name}/{size}": value for size, value in values if value}
    elif line.startswith("| `"):
      (causes if name in CAUSES else numbers)[name] = cells[0]
  assert numbers == {name: f"{record.figure[1]:g}" for name, record in RECORDS.items()}
  assert tuple(causes) == CAUSES


def test_times_are_those_of_the_plan(published, tmp_path, capsys, monkeypatch):
  estimates.show(published.sampled, published.given, tmp_path)
  assert "no estimate" in capsys.readouterr().out
  given = published.given_with(train=True, set=("sample.batch_size=8",))
  plan = {"settings": {}, "needed": 2**33, "available": 2**34, "fits": True, "hours": 1.25}
  split = plan | {"settings": {"accumulate_steps": 2}, "hours": 40.0}
  plans, asked = {"encode": plan, "train": split, "fid50k": plan | {"fits": False}}, []

  def run(words, **_):
    options = dict(word.split("=", 1) for word in words if "=" in word)
    asked.append(options)
    made = {"plans": [{}, plans[options["--what"]]]}
    Path(options["--output"]).write_text(json.dumps(made))
    return subprocess.CompletedProcess(words, 0)

  monkeypatch.setattr(estimates.subprocess, "run", run)
  estimates.show(published.sampled, given, tmp_path, "v6e:4x4")
  estimates.show(published.sampled, given, tmp_path, "v6e:4x4")
  sizes = [options.get("--config.sample.batch_size") for options in asked]
  assert sizes == [None, "8", "8"]  # once: the plans are kept
  told = " ".join(capsys.readouterr().out.replace("│", " ").split())
  assert "encode 1.2 hours 8.0 of 16.0 GiB as given" in told
  assert "train 40.0 hours 8.0 of 16.0 GiB --set=accumulate_steps=2" in told
  assert "fid50k does not fit" in told
  other = published.given_with(set=("mesh.fsdp=-1",))
  estimates.show(published.sampled, other, tmp_path, "v6e:4x4")
  assert asked[-1]["--config.mesh.fsdp"] == "-1"  # and are of these settings
