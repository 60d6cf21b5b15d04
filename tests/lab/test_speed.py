"""launch.lab.benchmark page: its measurements are ones, and its page shows what came of them."""

from __future__ import annotations

import importlib
import json
import subprocess
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from configs.lab import speed as sizes
from launch.engine.configuration import flat
from launch.lab import markdown
from launch.lab.benchmark import baseline, rows, steps
from launch.lab.benchmark import page as speed
from launch.lab.jobs import run
from tests.conftest import ROOT
from vavae_jax.common.errors import InputError


def configuration_of(flags):
  """What a measurement's flags configure, refusing what the configuration does not have."""
  (path,) = [word.partition("=")[2] for word in flags if word.startswith("--config=")]
  file, _, argument = path.partition(":")
  module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
  config = module.get_config(argument)
  known = dict(flat(config.to_dict()))
  for word in flags:
    if word.startswith("--config."):
      key, _, value = word.removeprefix("--config.").partition("=")
      config.update_from_flattened_dict({key: type(known[key])(value)})
  return config


@pytest.mark.parametrize("size", ["gpu", "cpu", "tiny"])
def test_every_measurement_is_of_a_configuration_that_can_be(size):
  measurements = sizes.get_config(size).measurements
  names = [each["name"] for each in measurements]
  assert len({*names}) == len(names)
  assert all(name.replace("_", "").isalnum() for name in names)
  assert {each["group"] for each in measurements} == {"paths", *speed.PLOTS}
  for each in measurements:
    given = dict(word.lstrip("-").split("=") for word in each["flags"])
    assert given["what"] in steps.WHAT
    config = configuration_of(each["flags"])
    for batch in given.get("batch_sizes", "8").split(","):
      rows.resolved(config, given["what"], int(batch), "xla")
      assert int(batch) % max(each["devices"], 1) == 0
    # The reference takes one device.
    assert size != "gpu" or not each["reference"] or each["devices"] == 1


def test_a_size_that_is_none_is_refused():
  with pytest.raises(ValueError, match="'huge' is none of gpu, cpu, tiny"):
    sizes.get_config("huge")


def row(speed, share, **more):
  figures = {"what": "train", "dtype": "bfloat16", "attention": "cudnn", "batch_size": 8}
  figures |= {"images_per_second": speed, "model_tflops_per_second": 2.0 * speed}
  figures |= {"least_gib": 0.25, "share_of_matmul": share, "share_of_ceiling": 2 * share}
  return figures | {"program_gib": 3.0} | more


def result(*rows, copy=10.0):
  about = {"commit": "abc", "date": "today", "device": "1 x H200", "jax": "1", "asked": "a.py"}
  about |= {"matmul_tflops_per_second": {"bfloat16": 700.0}, "copy_gib_per_second": copy}
  return about | {"rows": list(rows)}


def test_the_page_shows_ceilings_gaps_and_ratios_and_names_what_is_missing(tmp_path):
  config = sizes.get_config("tiny")
  beside = {"torch_images_per_second": 250.0, "times_torch": 2.0}
  results = {
    "train": result(row(500.0, 0.25, **beside)),
    "batch_tiny": result(row(3.0, 0.1), row(4.0, 0.2) | {"batch_size": 16}, copy=30.0),
    "devices_1": result({"what": "train", "batch_size": 2, "out_of_memory": True}),
  }
  page = tmp_path / "page.md"
  page.write_text(f"mine\n{speed.REGION.begin}\nold\n{speed.REGION.end}\nmine, too\n")
  speed.write_page(config, results, page, "python -m launch.lab.benchmark page")
  text = page.read_text()
  assert text.startswith("mine\n<!-- speed")
  assert text.endswith("<!-- end of speed -->\nmine, too\n")
  assert "old" not in text
  line = next(line for line in text.splitlines() if line.startswith("| train"))
  cells = [cell.strip() for cell in line.strip("|").split("|")]
  assert cells == [
    *("train", "bfloat16", "cudnn", "8", "2", "0.25", "500", "1,000"),
    *("25%", "50%", "2", "3", "250", "2"),
  ]
  assert "a product 700 TFLOP/s in bfloat16; a copy 10 to 30 GiB/s" in text
  assert "Not measured, or failed: sample, model_32," in text
  assert (tmp_path / "page_growth.png").stat().st_size > 1000


def test_what_does_not_fit_says_so_in_the_table():
  cells = speed._cells("train", {"dtype": "bfloat16", "batch_size": 8, "out_of_memory": True})
  assert len(cells) == 1 + len(speed.COLUMNS)
  assert cells[3:] == ["8", "", "", "out of memory", *[""] * 7]
  theirs = speed._cells("train", row(1.0, 0.5, torch_out_of_memory=True))
  assert theirs[-2:] == ["out of memory", ""]


def test_sampling_and_decoding_are_shown_together():
  beside = {"torch_images_per_second": 2.0, "times_torch": 1.0}
  sample = ("sample", row(4.0, 0.5, **beside) | {"what": "sample"})
  decode = ("decode", row(12.0, 0.5, **beside) | {"what": "decode"})
  lines = speed._pictures([sample, decode])
  assert (
    lines[2] == "| sample, bfloat16 | 3 | 1 | 3 |"
  )  # 1 / (1 / 4 + 1 / 12) and 1 / (1 / 2 + 1 / 2)
  assert speed._pictures([sample]) == []


def one_measurement(name):
  kept = [each for each in sizes.get_config("tiny").measurements if each["name"] == name]
  return ConfigDict({"size": "tiny", "measurements": tuple(kept)})


def test_a_measurement_is_a_command_that_runs_and_is_known_again(tmp_path):
  config = one_measurement("devices_2")
  jobs = speed.jobs_of(config, tmp_path, ())
  assert speed.results_of(jobs, tmp_path) == {}
  run(jobs, tmp_path, 1)
  (measured,) = baseline.ratios_of(speed.results_of(jobs, tmp_path)["devices_2"])
  assert measured["device"].startswith("2 x cpu, ")
  assert measured["config"].startswith("configs/quickstart.py:diffusion,tiny ")
  assert measured["share_of_matmul"] > 0
  # Of other flags, or with the reference elsewhere, it is another one.
  others = speed.jobs_of(sizes.get_config("cpu"), tmp_path, ())
  assert "devices_2" not in speed.results_of(others, tmp_path)


def test_devices_that_are_not_there_are_left_out(monkeypatch):
  done = subprocess.CompletedProcess([], 0, stdout="WARNING\ngpu 2\n")
  monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
  config = sizes.get_config("gpu")
  names = [each["name"] for each in speed._fitting(config).measurements]
  gone = {each["name"] for each in config.measurements} - {*names}
  assert gone == {"devices_4", "devices_8"}
  done.stdout = "cpu 1\n"
  assert len(speed._fitting(config).measurements) == len(config.measurements)


def test_what_failed_keeps_no_ratio_from_the_baseline(tmp_path, command):
  """Of two measurements one has a reference that does not start."""
  workdir, kept = tmp_path / "runs", tmp_path / "baseline.json"
  flags = ("--config=configs/lab/speed.py:tiny", f"--workdir={workdir}", f"--update={kept}")
  done = command("launch.lab.benchmark", "page", *flags, "--reference=/nowhere")
  assert done.returncode == 2
  assert "--reference is /nowhere, which has no models/lightningdit.py" in done.stderr
  assert not (workdir / "results").exists()
  results = workdir / "results"
  config = sizes.get_config("tiny")
  jobs = speed.jobs_of(config, workdir.absolute(), ())
  results.mkdir()
  record = speed.Record(workdir.absolute(), jobs)
  for job in jobs:
    about = {"asked": job.name, "processor": "an i486"}
    job.output.write_text(json.dumps(result(row(3.0, 0.1)) | about))
    record.add(job, 1.0, done=True)
  jobs[0].output.unlink()
  done = command("launch.lab.benchmark", "page", *flags, "--page_only")
  assert done.returncode == 0, done.stderr
  assert [each["config"] for each in baseline.read(kept)] == ["sample"]
  done = command("launch.lab.benchmark", "page", *flags[:2], f"--compare={kept}", "--page_only")
  assert done.returncode == 2
  assert "has results of abc, and this is" in done.stderr


def test_results_of_code_that_changed_since_are_not_compared(monkeypatch, tmp_path):
  """No commit tells one state of it from another."""
  monkeypatch.setattr(speed, "FLAGS", SimpleNamespace(compare="x", update="", page_only=False))
  kept = {"a": {"commit": "abc-dirty"}}
  for now in ("abc-dirty", "unknown", "abc"):
    monkeypatch.setattr(speed, "commit", lambda now=now: now)
    with pytest.raises(InputError, match=f"has results of abc-dirty, and this is {now}"):
      speed._check_kept(tmp_path, kept)
  speed._check_kept(tmp_path, {"a": {"commit": "abc"}})


def test_the_stored_baseline_is_of_configurations_that_are_there():
  rows = baseline.read(ROOT / "docs" / "lab" / "baseline.json")
  assert {"train", "sample", "encode", "decode", "fid"} <= {row["what"] for row in rows}
  for row in rows:
    path, *changes = row["config"].split(" ")
    configuration_of((f"--config={path}", *changes))
    assert any(row.get(name) for name in baseline.RATIOS)


def test_a_page_without_the_place_is_refused(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("mine\n")
  region = markdown.Region("<!-- a -->", "<!-- b -->", "A")
  with pytest.raises(InputError, match="no place for results: a line <!-- a --> and below it"):
    region.check(page)
  region.write(tmp_path / "new.md", ["text", ""])
  assert (tmp_path / "new.md").read_text() == "# A\n\n<!-- a -->\n\ntext\n\n<!-- b -->\n"


def test_a_markdown_table_aligns_numbers():
  lines = markdown.table(("what", "n"), [("a", "1")])
  assert lines == ["| what | n |", "| --- | ---: |", "| a | 1 |"]
