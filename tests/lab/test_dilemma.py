"""The experiment on reconstruction against generation: its configurations, jobs and page."""

from __future__ import annotations

import json

import pytest
from ml_collections import FrozenConfigDict

import configs.base
from configs.lab import dilemma
from launch.engine import configuration
from launch.lab.dilemma import checks, graph, page, predictors
from launch.lab.dilemma.results import Results, Space
from launch.lab.jobs import Record, digests, run
from vavae_jax.common.errors import InputError

SIZES = ("cifar", "tiny")


def experiment(size, /, **changes):
  config = dilemma.get_config(size)
  config.update(changes)
  return FrozenConfigDict(config)


@pytest.mark.parametrize("size", SIZES)
def test_every_job_has_a_configuration_that_stands_and_what_it_needs(size, tmp_path):
  """Every configuration that a job names is complete, and models fit their latents."""
  checks.check(experiment(size))
  found = graph.jobs_of(experiment(size), tmp_path)
  digests(found, tmp_path)  # each after what it needs
  for job in found:
    given = [word for word in job.words if word.startswith("--config=")]
    if job.words[0] not in ("launch.train", "launch.cached_features"):
      assert not given
      continue
    config = dilemma.get_config(given[0].partition(":")[2])
    configuration.resolve(config, configs.base.KEYS[config.task])
    if config.task == "diffusion":
      shape, width = job.name.split("/")[2::2][:2]
      assert shape == f"f{32 // config.model.input_size}d{config.model.in_channels}"
      assert width == f"w{config.model.hidden_size}"
  kinds = {job.kind for job in found}
  assert kinds >= {"judge", "second", "features", "tokenizer", "diffusion", "curve", "gaussian"}


def test_what_answers_soonest_comes_first(tmp_path):
  """All seeds of the first spaces before the others, and each seed of all before the next one."""
  jobs = graph.jobs_of(experiment("cifar"), tmp_path)
  runs = [job.name.removeprefix("curve/") for job in jobs if job.kind == "curve"]
  by_seeds = [
    f"{space}/seed{first}.{seed}"
    for spaces in (dilemma.FIRST, dilemma.THEN)
    for seed in (0, 1)
    for first in (0, 1)
    for space in spaces
  ]
  assert runs == by_seeds
  # What is compared differs in the teacher alone, and plain has every weight that aligned has.
  for spaces in (dilemma.FIRST, dilemma.THEN):
    aligned = {x.partition("/")[2] for x in spaces if x.startswith("aligned/")}
    assert aligned == {x.partition("/")[2] for x in spaces if x.startswith("plain/")}
  names = [job.name for job in jobs]
  assert len({*names}) == len(names)
  assert names.count("tokenizer/shortcut/f8d128/kl1e-6/seed0") == 1  # of two widths


def test_tokenizers_differ_by_what_their_name_says_alone():
  def found(*words):
    return dict(configuration.flat(dilemma.tokenizer("cifar", *words).to_dict()))

  def changed(*words):
    return {key for key, value in found(*words).items() if value != aligned[key]}

  aligned = found("aligned", "f8d16", "kl1e-6")
  assert changed("plain", "f8d16", "kl1e-6") == {"teacher.name", "teacher.centre"}
  assert changed("aligned", "f8d16", "kl0.05") == {"loss.kl_weight"}
  assert changed("aligned", "f8d48", "kl1e-6") == {"model.embed_dim", "model.z_channels"}
  assert changed("aligned", "f16d16", "kl1e-6") == {"model.patch_size"}
  linear = {"model.linear_shortcut", "model.final_norm"}
  assert changed("shortcut", "f8d16", "kl1e-6") == {"teacher.name", "teacher.centre", *linear}
  assert not aligned["model.linear_shortcut"]
  assert len(aligned["model.ch_mult"]) == 1


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("cifra", "'cifra' is not one of cifar"),
    ("cifar,tiny", "exclude each other"),
    ("cifar,tokenizer,plain,f8d4", "takes variant and shape and kl beside the size; check kl"),
    ("cifar,diffusion,aligned,f8d4,w64", "check variant"),
    ("cifar,judge,f8d4", "takes judge beside the size; check shape"),
    ("cifar,second", "the experiment takes nothing beside the size"),
  ],
)
def test_arguments_that_mean_nothing_are_refused(argument, message):
  with pytest.raises(ValueError, match=message):
    dilemma.get_config(argument)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"spaces": ("plain/f8d4/kl0",)}, "'plain/f8d4/kl0', which is not VARIANT/fPdZ/klW/wD"),
    ({"more_spaces": ("best/f8d4/kl0/w64",)}, "'best' is not one of cifar"),
    ({"spaces": ("plain/f8d4/kl1e/w64",)}, "could not convert string to float"),
    ({"spaces": ("plain/f9d4/kl0/w64",)}, "its cells must divide 32"),
    ({"spaces": ("plain/f8d4/kl0/w65",)}, "65"),
    ({"more_spaces": ("plain/f16d8/kl1e-6/w64",)}, "one or more, each once"),
    ({"spaces": ()}, "one or more, each once"),
    ({"seeds": (0, 0)}, "one or more, each once"),
    ({"steps": (4, 2)}, "give multiples of 2, ascending"),
    ({"steps": (2, 3)}, "give multiples of 2, ascending"),
    ({"cells": 10}, "must be 50 or more"),
    ({"size": "tinny"}, "choose one of cifar"),
    ({"source": "folder:/nowhere"}, "nowhere"),
  ],
)
def test_what_cannot_be_run_is_refused_at_once(changes, message):
  def begin(config):
    checks.check(config)
    checks.check_parts(config)

  with pytest.raises(InputError, match=message):
    begin(experiment("tiny", **changes))


def test_a_teacher_without_weights_is_refused_before_any_job(monkeypatch):
  monkeypatch.setitem(dilemma.VARIANTS, "aligned", {"teacher.name": "dinov2_vitb14"})
  with pytest.raises(InputError, match="dinov2_vitb14"):
    checks.check_parts(experiment("tiny"))


def test_a_training_is_identified_by_what_its_configuration_sets(tmp_path, monkeypatch):
  """Not by how samples are drawn of it, which the jobs that draw say."""

  def found():
    return digests(graph.jobs_of(experiment("tiny"), tmp_path), tmp_path)

  before = found()
  monkeypatch.setitem(dilemma.VARIANTS, "aligned", {"loss.cos_weight": 0.1})
  changed = {name for name, digest in found().items() if digest != before[name]}
  assert changed
  assert all("aligned" in name or name.startswith("features") for name in changed)
  monkeypatch.undo()
  usual = dilemma.diffusion

  def other(*arguments, **options):
    config = usual(*arguments, **options)
    config.sample.num_steps = 7
    return config

  monkeypatch.setattr(dilemma, "diffusion", other)
  kinds = {name.partition("/")[0] for name, digest in found().items() if digest != before[name]}
  assert kinds == {"curve"}


TESTED = {"test_source": "embedded:emoji", "seeds": (0, 1)}
SPACE, WIDTH = "plain/f16d8/kl1e-6", "w64"
ROW = "| plain | f16d8 | 1e-6 | 64 | 2 | 20.25 | 3.0000 | - | 12.000 ± 2.828 | 8.000 | 4.000 |"


@pytest.fixture
def measured(tmp_path):
  """A workdir with some results: of two diffusion models on one tokenizer, and of the rest none."""
  jobs = graph.jobs_of(experiment("tiny", **TESTED), tmp_path / "run")
  record = Record(tmp_path / "run", jobs)

  def write(name, **content):
    path = tmp_path / "run" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    record.add(next(job for job in jobs if job.name == name), 60.0, done=True)

  for seed, distance in enumerate((10.0, 14.0)):
    last = {"fd_emoji": distance, "fd_emoji_means": 8.0, "fd_emoji_covariances": 4.0}
    last |= {"step": 4, "class_accuracy": 0.5, "second_fd_emoji2": 6.0}
    points = [{"step": 2, "fd_emoji": 50.0}, last]
    write(f"curve/{SPACE}/{WIDTH}/seed0.{seed}", points=points)
  write(f"reconstruction/{SPACE}/seed0", figures={"psnr": 20.25, "ssim": 0.5, "rfd_emoji": 3.0})
  write(f"gaussian/{SPACE}/seed0", figures={"fd_emoji": 13.0, "class_accuracy": 0.25})
  real = {"fd_emoji": 0.5, "second_fd_emoji2": 0.25}
  write("real", figures=real, samples={"pictures": 1234})
  return tmp_path / "run"


def test_the_page_shows_what_there_is_and_keeps_what_a_person_wrote(measured, tmp_path):
  config, file = experiment("tiny", **TESTED), tmp_path / "page.md"
  jobs = graph.jobs_of(config, measured)
  page.write(config, measured, jobs, file, "the command")
  first = file.read_text()
  assert f"{ROW} 50.0 ± 0.0 | 6.000 ± 0.000 | 13.000 | 25.0 | - |" in first
  assert "| aligned | f16d8 | 1e-6 | 64 | 0 | - |" in first
  assert "| plain | f16d8 | 1e-6 | 64 | 50.000 ± 0.000 | 12.000 ± 2.828 |" in first
  assert (tmp_path / "page_frontier.png").stat().st_size > 1_000
  file.write_text(f"before {first} after")
  page.write(config, measured, jobs, file, "another command")
  second = file.read_text()
  assert second.startswith("before ")
  assert second.endswith(" after")
  assert second == f"before {first} after".replace("the command", "another command")
  file.write_text("a page of another kind")
  with pytest.raises(InputError, match="has no place for results"):
    page.REGION.check(file)
  with pytest.raises(InputError, match="a folder; give the name of a file"):
    page.REGION.check(tmp_path)
  with pytest.raises(InputError, match="has no place for results"):
    page.write(config, measured, jobs, file, "the command")
  assert file.read_text() == "a page of another kind"


def test_the_page_shows_nothing_that_was_measured_otherwise(measured, tmp_path):
  config, file = experiment("tiny", num_samples=301, **TESTED), tmp_path / "page.md"
  page.write(config, measured, graph.jobs_of(config, measured), file, "the command")
  assert "| plain | f16d8 | 1e-6 | 64 | 0 | 20.25 | 3.0000 | - | - |" in file.read_text()


def test_the_best_weight_of_each_side_is_compared():
  """Plain at its own best KL weight, not at that of aligned; and not by a wider model."""

  def space(variant, kl, *distances, width=64):
    figures = {"fd_cifar": [*distances]}
    return Space(variant, "f8d4", kl, width, {"psnr": [30.0]}, {}, {5: figures})

  spaces = [space("plain", "0.05", 3.0), space("plain", "1e-6", 2.0, 2.2)]
  spaces += [space("aligned", "0.05", 1.0, 1.4), space("aligned", "1e-6", 1.5)]
  spaces.append(space("plain", "1e-6", 0.5, width=128))
  (line, _) = page.best(spaces, "fd_cifar", "FD-CIFAR")
  assert "plain 2.100 ± 0.141, 30.00 dB (KL weight 1e-6, 2 models)" in line
  assert "aligned 1.200 ± 0.283, 30.00 dB (KL weight 0.05, 2 models)" in line


def test_quick_figures_are_ranked_by_how_they_predict_long_runs(tmp_path):
  """Probes come last; tokenizers of another model's width do not count."""
  spaces = [f"plain/f16d{channels}/kl0/w64" for channels in (1, 2, 3, 4)]
  changes = {"spaces": (*spaces, "plain/f16d5/kl0/w128"), "more_spaces": (), "probe_pictures": 60}
  config, run = experiment("tiny", **changes), tmp_path / "run"
  jobs = graph.jobs_of(config, run)
  assert [job.kind for job in jobs[-5:]] == ["probe"] * 5
  assert predictors.section(Results(config, run, jobs)) == []
  record = Record(run, jobs)
  told = [(2, 9, 1.0), (1, 8, 2.0), (3, 7, 3.0), (4, 6, 4.0), (0, 99, 9.0)]
  for space, (loss, share, distance) in zip(config.spaces, told, strict=True):
    content = {
      f"probe/{graph.tokenizer_of(space)}/seed0": {
        "figures": {"loss": loss, "linear_in_pixels": share, "same": 1, "fd_emoji_means": share},
        "seconds": 120,
      },
      f"curve/{space}/seed0.0": {"points": [{"step": 4, "fd_emoji": distance}]},
    }
    for name, note in content.items():
      path = run / f"{name}.json"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(note))
      record.add(next(job for job in jobs if job.name == name), 60.0, done=True)
  text = predictors.section(Results(config, run, jobs))
  assert "width 64. A probe took 2.0 minutes" in text[0]
  assert text[-3:-1] == ["| `linear_in_pixels` | -1.00 | 0 | 4 |", "| `loss` | +0.80 | 0.2 | 4 |"]


def test_the_command_writes_its_page_and_shows_how_it_was_called(command, measured, tmp_path):
  file = tmp_path / "page.md"
  settings = [f"--config.{name}={value}" for name, value in TESTED.items()]
  words = ("--config=configs/lab/dilemma.py:tiny", f"--workdir={measured}", *settings)
  done = command("launch.lab.dilemma", *words, "--page", str(file), "--page_only")
  assert done.returncode == 0, done.stderr
  assert ROW in file.read_text()
  assert "\npython -m launch.lab.dilemma --config=configs/lab/dilemma.py:tiny" in file.read_text()
  file.write_text("a page of another kind")
  done = command("launch.lab.dilemma", *words, f"--page={file}")
  assert (done.returncode, "has no place for results" in done.stderr) == (2, True)
  assert not (measured / "logs").exists()  # refused before any job


def test_one_chain_of_jobs_runs_by_the_released_commands(environment, monkeypatch, tmp_path):
  """From the judge and the teacher's features to samples of a diffusion model, and their page."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  config = experiment("tiny", spaces=("aligned/f16d8/kl1e-6/w64",), more_spaces=(), second=False)
  jobs = graph.jobs_of(config, tmp_path)
  run(jobs, tmp_path, 2)
  page.write(config, tmp_path, jobs, tmp_path / "dilemma.md", "the command")
  text = (tmp_path / "dilemma.md").read_text()
  row = next(line for line in text.splitlines() if "| aligned | f16d8 |" in line)
  assert row.count(" - ") == 1  # the second judge's
  assert (tmp_path / "dilemma_samples.png").stat().st_size > 1_000
  assert (tmp_path / "dilemma_curves.png").stat().st_size > 1_000
