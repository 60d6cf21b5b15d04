"""The experiment on reconstruction against generation: its configurations, jobs and page."""

from __future__ import annotations

import json

import pytest
from ml_collections import FrozenConfigDict

import configs.base
from configs.lab import dilemma
from launch.engine import configuration
from launch.lab.dilemma import checks, graph, page
from launch.lab.jobs import Record, digests, run
from vavae_jax.common.errors import InputError

SIZES = ("cifar", "emoji", "gpu", "tiny")


def experiment(size, /, **changes):
  config = dilemma.get_config(size)
  config.update(changes)
  return FrozenConfigDict(config)


@pytest.mark.parametrize("size", SIZES)
def test_every_job_has_a_configuration_that_stands_and_what_it_needs(size, tmp_path):
  """Every configuration that a job names is complete, and models fit their latents."""
  found = graph.jobs_of(experiment(size), tmp_path)
  digests(found, tmp_path)  # each after what it needs
  for job in found:
    given = [word for word in job.words if word.startswith("--config=")]
    if job.words[0] != "launch.train":
      assert not given
      continue
    config = dilemma.get_config(given[0].partition(":")[2])
    configuration.resolve(config, configs.base.KEYS[config.task])
    if config.task == "diffusion":
      assert config.num_steps % config.keep_every_steps == 0
      assert config.model.in_channels == int(job.name.split("/")[2][1:])
  assert any(job.name.endswith("/long") for job in found) == experiment(size).long
  assert {job.kind for job in found} >= {"judge", "tokenizer", "diffusion", "samples", "curve"}


def test_tokenizers_differ_by_what_their_name_says_alone():
  plain, aligned, no_cos = (
    dict(configuration.flat(dilemma.tokenizer("cifar", 16, name).to_dict()))
    for name in ("plain", "aligned", "no_cos")
  )
  assert {k for k in plain if plain[k] != aligned[k]} == {"teacher.name"}
  assert {k for k in plain if no_cos[k] != aligned[k]} == {"loss.cos_weight"}
  wide = dict(configuration.flat(dilemma.tokenizer("cifar", 48, "aligned").to_dict()))
  assert {k for k in plain if wide[k] != aligned[k]} == {"model.embed_dim", "model.z_channels"}


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("cifra", "'cifra' is not one of cifar"),
    ("cifar,emoji", "exclude each other"),
    ("cifar,tokenizer", "take a width such as d16"),
    ("cifar,diffusion,aligned,d4", "aligned is for a tokenizer"),
    ("cifar,judge,d4", "no other part"),
    ("cifar,tokenizer,d4,long", "long is for a diffusion model"),
  ],
)
def test_arguments_that_mean_nothing_are_refused(argument, message):
  with pytest.raises(ValueError, match=message):
    dilemma.get_config(argument)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"ablations": ("no_sense",)}, "names 'no_sense'; choose from"),
    ({"ablations": ("no_cos", "plain")}, "a name twice, or one of plain and aligned"),
    ({"widths": (4, 4)}, "2 or more, each once"),
    ({"widths": ()}, "2 or more, each once"),
    ({"seeds": ()}, "1 or more, each once"),
    ({"seeds": (0, 0)}, "1 or more, each once"),
    ({"ablation_seeds": ()}, "1 or more, each once"),
    ({"cells": 10}, "must be 50 or more"),
    ({"cfg_scale": -1.0}, r"must be 1\.0 or more"),
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
  monkeypatch.setitem(dilemma.VARIANTS, "other_teacher", {"teacher.name": "dinov2_vitb14"})
  with pytest.raises(InputError, match="dinov2_vitb14"):
    checks.check_parts(experiment("tiny", ablations=("other_teacher",)))


def test_a_training_is_identified_by_what_its_configuration_sets(tmp_path, monkeypatch):
  """Not by how samples are drawn of it, which the jobs that draw say."""

  def found():
    return digests(graph.jobs_of(experiment("tiny"), tmp_path), tmp_path)

  before = found()
  monkeypatch.setitem(dilemma.VARIANTS, "no_cos", {"loss.cos_weight": 0.1})
  changed = {name for name, digest in found().items() if digest != before[name]}
  assert changed
  assert all("no_cos" in name for name in changed)
  monkeypatch.undo()
  usual = dilemma.diffusion

  def other(*arguments, **options):
    config = usual(*arguments, **options)
    config.sample.num_steps = 7
    return config

  monkeypatch.setattr(dilemma, "diffusion", other)
  kinds = {name.partition("/")[0] for name, digest in found().items() if digest != before[name]}
  assert kinds == {"samples", "guided", "curve"}


TESTED = {"test_source": "embedded:emoji"}


@pytest.fixture
def measured(tmp_path):
  """A workdir with some results: of seed 0 and 1 of plain d4, and of the rest nothing."""
  jobs = graph.jobs_of(experiment("tiny", **TESTED), tmp_path / "run")
  record = Record(tmp_path / "run", jobs)

  def write(name, **content):
    path = tmp_path / "run" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    record.add(next(job for job in jobs if job.name == name), 60.0, done=True)

  for seed, distance in enumerate((10.0, 14.0)):
    write(f"samples/plain/d4/seed{seed}", figures={"fd_emoji": distance})
  write("reconstruction/plain/d4", figures={"psnr": 20.25, "ssim": 0.5, "rfd_emoji": 3.0})
  write("curve/plain/d4/seed0", points=[{"step": 2, "fd_emoji": 50.0}])
  write("samples/plain/d8/long", figures={"fd_emoji": 7.25})
  write("curve/plain/d8/long", points=[{"step": 4, "fd_emoji": 8.0}, {"step": 16, "fd_emoji": 7}])
  write("real", figures={"fd_emoji": 0.5}, samples={"pictures": 1234})
  return tmp_path / "run"


def test_the_page_shows_what_there_is_and_keeps_what_a_person_wrote(measured, tmp_path):
  config, file = experiment("tiny", **TESTED), tmp_path / "page.md"
  jobs = graph.jobs_of(config, measured)
  page.write(config, measured, jobs, file, "the command")
  first = file.read_text()
  assert "| plain | 4 | 20.25 | 0.500 | 3.00 | 12.00 ± 2.83 | - |" in first
  assert "| aligned | 4 | - |" in first
  assert "| plain, 16 steps | 8 | - | - | - | 7.25 | - |" in first
  assert "1,234 real pictures that no training used have 0.500." in first
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
  assert "| plain | 4 | 20.25 | 0.500 | 3.00 | - | - |" in file.read_text()


def test_the_command_writes_its_page_and_shows_how_it_was_called(command, measured, tmp_path):
  file = tmp_path / "page.md"
  settings = [f"--config.{name}={value}" for name, value in TESTED.items()]
  words = ("--config=configs/lab/dilemma.py:tiny", f"--workdir={measured}", *settings)
  done = command("launch.lab.dilemma", *words, "--page", str(file), "--page_only")
  assert done.returncode == 0, done.stderr
  text = file.read_text()
  assert "| plain | 4 | 20.25 | 0.500 | 3.00 | 12.00 ± 2.83 | - |" in text
  assert f"\npython -m launch.lab.dilemma {' '.join(words)}\n" in text
  file.write_text("a page of another kind")
  done = command("launch.lab.dilemma", *words, f"--page={file}")
  assert (done.returncode, "has no place for results" in done.stderr) == (2, True)
  assert not (measured / "logs").exists()  # refused before any job


def test_one_chain_of_jobs_runs_by_the_released_commands(environment, monkeypatch, tmp_path):
  """From the judge to the samples of one diffusion model, and its page."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  config = experiment("tiny", ablations=())
  chain = [
    job
    for job in graph.jobs_of(config, tmp_path)
    if job.name in ("judge", "reference") or ("aligned/d4" in job.name and "seed1" not in job.name)
  ]
  run(chain, tmp_path, 2)
  jobs = graph.jobs_of(config, tmp_path)
  page.write(config, tmp_path, jobs, tmp_path / "dilemma.md", "the command")
  row = next(
    line for line in (tmp_path / "dilemma.md").read_text().splitlines() if "| aligned | 4 |" in line
  )
  assert row.count(" - ") == 0
  assert (tmp_path / "dilemma_samples.png").stat().st_size > 1_000
  assert (tmp_path / "dilemma_curves.png").stat().st_size > 1_000
