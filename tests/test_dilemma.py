"""The experiment on reconstruction against generation: its configurations, jobs and page."""

from __future__ import annotations

import json

import pytest
from ml_collections import FrozenConfigDict

import configs.base
from configs import dilemma
from launch import dilemma as command_module
from launch import dilemma_page, jobs
from launch.engine import configuration
from vavae_jax.errors import InputError

SIZES = ("cifar", "emoji", "gpu", "tiny")


def experiment(size, **changes):
  config = dilemma.get_config(size)
  config.update(changes)
  return FrozenConfigDict(config)


@pytest.mark.parametrize("size", SIZES)
def test_every_job_has_a_configuration_that_stands_and_what_it_needs(size, tmp_path):
  """Every configuration that a job names is complete, and models fit their latents."""
  found = command_module.jobs_of(experiment(size), tmp_path)
  names = [job.name for job in found]
  assert len(set(names)) == len(names)
  before: set[str] = set()
  for job in sorted(found, key=lambda job: names.index(job.name)):
    assert {*job.needs} <= {*names}
    before.add(job.name)
    given = [word for word in job.words if word.startswith("--config=")]
    if job.words[0] != "launch.train":
      assert not given
      continue
    config = dilemma.get_config(given[0].partition(":")[2])
    configuration.resolve(config, getattr(configs.base, config.task)())
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
    ("cifra", "'cifra' is none of: cifar"),
    ("cifar,emoji", "exclude each other"),
    ("cifar,tokenizer", "take a width such as d16"),
    ("cifar,diffusion,aligned,d4", "aligned is of a tokenizer"),
    ("cifar,judge,d4", "nothing else"),
    ("cifar,tokenizer,d4,long", "long is of a diffusion model"),
  ],
)
def test_arguments_that_mean_nothing_are_refused(argument, message):
  with pytest.raises(ValueError, match=message):
    dilemma.get_config(argument)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"ablations": ("no_sense",)}, "names 'no_sense'; there are"),
    ({"ablations": ("no_cos", "plain")}, "a name twice, or one of plain and aligned"),
    ({"widths": (4, 4)}, "two widths or more"),
    ({"seeds": ()}, "a seed"),
    ({"source": "folder:/nowhere"}, "nowhere"),
  ],
)
def test_what_cannot_be_run_is_refused_at_once(changes, message):
  with pytest.raises(InputError, match=message):
    command_module.check(experiment("tiny", **changes))


@pytest.fixture
def measured(tmp_path):
  """A workdir with some results: of seed 0 and 1 of plain d4, and of the rest nothing."""

  def write(name, **content):
    path = tmp_path / "run" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))

  for seed, distance in enumerate((10.0, 14.0)):
    write(f"samples/plain/d4/seed{seed}", figures={"fd_emoji": distance})
  write("reconstruction/plain/d4", figures={"psnr": 20.25, "ssim": 0.5, "rfd_emoji": 3.0})
  write("curve/plain/d4/seed0", points=[{"step": 2, "fd_emoji": 50.0}])
  write("samples/plain/d8/long", figures={"fd_emoji": 7.25})
  write("curve/plain/d8/long", points=[{"step": 4, "fd_emoji": 8.0}, {"step": 16, "fd_emoji": 7}])
  write("real", figures={"fd_emoji": 0.5}, samples={"pictures": 1234})
  return tmp_path / "run"


def test_the_page_shows_what_there_is_and_keeps_what_a_person_wrote(measured, tmp_path):
  config, page = experiment("tiny"), tmp_path / "page.md"
  dilemma_page.write(config, measured, page, "the command")
  first = page.read_text()
  assert "| plain | 4 | 20.25 | 0.500 | 3.00 | 12.00 ± 2.83 | - |" in first
  assert "| aligned | 4 | - |" in first
  assert "| plain, 16 steps | 8 | - | - | - | 7.25 | - |" in first
  assert "1,234 real pictures that nobody trained on have 0.500." in first
  assert (tmp_path / "page_frontier.png").stat().st_size > 1_000
  page.write_text(f"before {first} after")
  dilemma_page.write(config, measured, page, "another command")
  second = page.read_text()
  assert second.startswith("before ")
  assert second.endswith(" after")
  assert second == f"before {first} after".replace("the command", "another command")
  page.write_text("a page of another kind")
  with pytest.raises(InputError, match="has no place for results"):
    dilemma_page.write(config, measured, page, "the command")
  assert page.read_text() == "a page of another kind"


def test_one_chain_of_jobs_runs_by_the_released_commands(environment, monkeypatch, tmp_path):
  """From the judge to the samples of one diffusion model, and its page."""
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  config = experiment("tiny", ablations=())
  chain = [
    job
    for job in command_module.jobs_of(config, tmp_path)
    if job.name in ("judge", "reference") or ("plain/d4" in job.name and "seed1" not in job.name)
  ]
  jobs.run(chain, tmp_path, 2)
  dilemma_page.write(config, tmp_path, tmp_path / "dilemma.md", "the command")
  row = next(
    line for line in (tmp_path / "dilemma.md").read_text().splitlines() if "| plain | 4 |" in line
  )
  assert row.count(" - ") == 0
  assert (tmp_path / "dilemma_samples.png").stat().st_size > 1_000
  assert (tmp_path / "dilemma_curves.png").stat().st_size > 1_000
