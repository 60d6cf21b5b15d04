"""The table of options beyond the paper: its rows, jobs and page."""

from __future__ import annotations

import json

import pytest
from ml_collections import FrozenConfigDict

from configs.lab import beyond
from configs.lab.beyond import Row
from launch.lab.beyond import checks, graph, page, rows
from launch.lab.jobs import Record, digests
from vavae_jax.common.errors import InputError


def experiment(size="tiny", /, **changes):
  config = beyond.get_config(size)
  config.update(changes)
  return FrozenConfigDict(config)


@pytest.mark.parametrize("size", beyond.SIZES)
def test_every_row_is_a_configuration_and_jobs_follow_what_they_need(size, tmp_path):
  config = experiment(size, source="embedded:emoji", test_source="")
  checks.check(config)
  jobs = graph.jobs_of(config, tmp_path)
  digests(jobs, tmp_path)
  names = [job.name for job in jobs]
  assert len({*names}) == len(names)
  assert "diffusion/beyond/guidance/seed0" not in names  # the baseline's
  model = beyond.diffusion(size)
  assert model.keep_every_steps % model.log_every_steps == 0  # the seconds of each checkpoint


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"rows": ("muon",)}, "give baseline and then some of"),
    ({"rows": ("baseline", "moun")}, "give baseline and then some of"),
    ({"rows": ("baseline", "muon", "muon")}, "each once"),
    ({"steps": (4, 2)}, "multiples of 1, ascending"),
    ({"size": "huge"}, "choose one of cifar"),
    ({"tokenizer": "plain/f8d16"}, "not VARIANT/fPdZ/klW"),
    ({"tokenizer": "plain"}, "not VARIANT/fPdZ/klW"),
    ({"source": "folder:/nowhere"}, "nowhere"),
  ],
)
def test_what_cannot_be_run_is_refused_at_once(changes, message):
  with pytest.raises(InputError, match=message):
    checks.check(experiment(**changes))


def test_a_change_that_is_not_possible_is_named(monkeypatch):
  monkeypatch.setitem(beyond.ROWS, "odd", Row({"optimizer.moun": True}))
  with pytest.raises(InputError, match=r"config\.optimizer\.moun"):
    checks.check(experiment(rows=("baseline", "odd")))


def test_a_combined_row_has_the_changes_of_all():
  row = rows.row_of("muon+tread+autoguidance")
  changes = {**beyond.ROWS["muon"].training, **beyond.ROWS["tread"].training}
  assert (row.training, row.guide, row.longer) == (changes, True, 1.5)
  assert row.sampling == beyond.ROWS["autoguidance"].sampling


def test_a_map_begins_with_the_weights_of_the_baseline_of_its_seed(tmp_path):
  config = experiment(rows=("baseline", "map_1_step", "map_4_steps"), steps=(4,), seeds=(0, 1))
  jobs = {job.name: job for job in graph.jobs_of(config, tmp_path)}
  assert "diffusion/beyond/map_4_steps/seed1" not in jobs  # both sample one
  job, start = jobs["diffusion/beyond/map_1_step/seed1"], "diffusion/beyond/baseline/seed1"
  assert start in job.needs
  assert {f"--config.init_from={tmp_path / start}", "--config.num_steps=1"} <= {*job.words}


@pytest.mark.parametrize("argument", ["huge", "cifar,tokenizer", "cifar,diffusion,f8"])
def test_an_argument_that_is_none_is_refused(argument):
  with pytest.raises(ValueError, match="is none of cifar"):
    beyond.get_config(argument)


def test_the_diffusion_model_is_of_the_latents_of_the_tokenizer():
  config = experiment(
    "cifar", tokenizer="plain/f16d128/kl1e-6", source="embedded:emoji", test_source=""
  )
  checks.check(config)
  model = rows.diffusion_of(config, "baseline").model
  assert (model.input_size, model.in_channels) == (2, 128)


def test_what_excludes_each_other_is_not_combined():
  """An early head reads all tokens."""
  names = ["muon", "tread", "internal_guidance", "autoguidance"]
  assert rows.together(experiment(), names) == "muon+tread+autoguidance"
  assert rows.together(experiment(), names[2:0:-1]) == "internal_guidance"


def test_guidance_costs_what_it_computes():
  """Twice as much where another prediction is taken."""
  config = experiment(rows=("baseline", "guidance"))
  plain = page.sampling_cost(rows.diffusion_of(config, "baseline"), False)
  always = FrozenConfigDict(
    rows.diffusion_of(config, "baseline").to_dict()
    | {
      "sample": beyond.diffusion("tiny").sample.to_dict()
      | {"cfg_scale": 2.0, "cfg_interval_start": 0.0}
    }
  )
  assert page.sampling_cost(always, False) == pytest.approx(2 * plain, rel=1e-3)
  assert page.sampling_cost(always, True) == pytest.approx(2 * plain, rel=1e-3)


ROWS = ("baseline", "muon", "tread", "autoguidance", "map_4_steps")
SEEDS = {"seeds": (0, 1), "rows": ROWS, "steps": (1, 4)}
SPEEDS = {"baseline": 2.0, "muon": 1.0, "tread": 2.8}  # steps a second
LAST = {"baseline": (10.0, 10.2), "muon": (9.0, 9.1), "tread": (9.5, 9.6), "autoguidance": (10, 10)}


def test_the_table_is_at_equal_steps_and_at_equal_time_and_winners_are_combined(tmp_path):
  config, run = experiment(test_source="", **SEEDS), tmp_path / "run"

  def complete():
    """Gives all jobs a result that have none."""
    for job in (jobs := graph.jobs_of(config, run)):
      record = Record(run, jobs)
      if record.is_done(job):
        continue
      job.output.parent.mkdir(parents=True, exist_ok=True)
      parts = job.name.split("/")
      if job.kind == "diffusion":
        job.output.mkdir()
        speed = min(SPEEDS.get(name, 9.0) for name in parts[2].split("+"))
        lines = [
          {
            "step": step,
            "steps_per_second": speed,
            "images_per_second": 8 * speed,
            "model_tflops_per_second": 0.016 * speed,
          }
          for step in range(1, 7)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (job.output / "metrics.jsonl").write_text(text)
      elif job.kind == "figures":
        last = LAST.get(parts[2], (8.0, 8.1))[int(parts[3][4:])]
        steps = next(x for x in job.words if x.startswith("--grid=step=")).split("=")[2]
        points = [
          {"step": step, "fd_emoji": last + 10 * (4 - step), "class_accuracy": 0.5}
          for step in map(int, steps.split(","))
        ]
        job.output.write_text(json.dumps({"points": points}))
      else:
        job.output.write_text(json.dumps({"figures": {"fd_emoji": 20.0, "class_accuracy": 0.25}}))
      record.add(job, 60.0, done=True)
    return {job.name for job in jobs}

  first = complete()
  assert "figures/beyond/muon/seed0/equal_time" not in first  # how fast it is was not known
  second = complete()
  assert "figures/beyond/muon/seed0/equal_time" in second  # half as fast as the baseline
  assert "figures/beyond/autoguidance/seed0/equal_time" not in second  # trained as the baseline
  third = complete()
  assert "diffusion/beyond/muon+tread/seed1" in third
  complete()
  assert complete() == {job.name for job in graph.jobs_of(config, run)}
  page.write(config, run, tmp_path / "beyond.md", "the command")
  text = (tmp_path / "beyond.md").read_text()
  lines = [line.split(" | ") for line in text.splitlines() if line[0:1] == "|"]
  table = {cells[0]: cells for cells in reversed(lines)}  # the first of two
  assert table["| baseline"][1:4] == ["40.100 ± 0.141", "10.100 ± 0.141", "10.100 ± 0.141 (4)"]
  assert ["| baseline", "50.0 ± 0.0", "50.0 ± 0.0 |"] in lines
  assert table["| muon"][2:4] == ["9.050 ± 0.071", "29.050 ± 0.071 (2)"]
  assert table["| tread"][3] == "-10.450 ± 0.071 (6)"
  assert table["| muon + tread"][2] == "8.050 ± 0.071"
  assert table["| map_4_steps"][1:4] == ["-", "38.050 ± 0.071", "-"]  # after a quarter, of step 1
  assert table["| muon"][5:7] == ["1000.0 ± 0.0", "2.00"]
  assert "not trained: 20.000, class accuracy 25.0 %." in text
