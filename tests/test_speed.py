"""launch.speed: its measurements are ones, and its page shows what came of them."""

from __future__ import annotations

import importlib
import json

import pytest
from ml_collections import ConfigDict

from configs import speed as sizes
from launch import benchmark, pages, speed
from launch.engine.configuration import flat
from launch.experiment.jobs import run
from vavae_jax.errors import InputError


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
    assert given["what"] in benchmark.WHAT
    config = configuration_of(each["flags"])
    for batch in given.get("batch_sizes", "8").split(","):
      benchmark._resolved(config, given["what"], int(batch), "xla")
      assert int(batch) % max(each["devices"], 1) == 0


def test_a_size_that_is_none_is_refused():
  with pytest.raises(ValueError, match="'huge' is none of gpu, cpu, tiny"):
    sizes.get_config("huge")


def row(speed, share, **more):
  told = {"what": "train", "dtype": "bfloat16", "attention": "cudnn", "batch_size": 8}
  told |= {"images_per_second": speed, "model_tflops_per_second": 2.0 * speed}
  told |= {"least_gib": 0.25, "share_of_matmul": share, "share_of_ceiling": 2 * share}
  return told | {"program_gib": 3.0} | more


def keep(workdir, name, *rows, copy=10.0):
  (workdir / "results").mkdir(exist_ok=True)
  told = {"commit": "abc", "date": "today", "device": "1 x H200", "jax": "1", "asked": "a.py"}
  told |= {"matmul_tflops_per_second": {"bfloat16": 700.0}, "copy_gib_per_second": copy}
  (workdir / "results" / f"{name}.json").write_text(json.dumps(told | {"rows": list(rows)}))


def test_the_page_shows_ceilings_gaps_and_ratios_and_names_what_is_missing(tmp_path):
  config = sizes.get_config("tiny")
  keep(tmp_path, "train", row(500.0, 0.25, torch_images_per_second=250.0, times_torch=2.0))
  keep(tmp_path, "batch_tiny", row(3.0, 0.1), row(4.0, 0.2) | {"batch_size": 16}, copy=30.0)
  keep(tmp_path, "devices_1", {"what": "train", "batch_size": 2, "out_of_memory": True})
  page = tmp_path / "page.md"
  page.write_text(f"mine\n{speed.REGION.begin}\nold\n{speed.REGION.end}\nmine, too\n")
  speed.write_page(config, tmp_path, page, "python -m launch.speed")
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
  assert len(cells) == len(speed.HEADER)
  assert cells[3:5] == ["8", "out of memory"]
  theirs = speed._cells("train", row(1.0, 0.5, torch_out_of_memory=True))
  assert theirs[-2:] == ["out of memory", ""]


def test_a_measurement_is_a_command_that_runs(tmp_path):
  config = sizes.get_config("tiny")
  one = next(each for each in config.measurements if each["name"] == "devices_2")
  config = ConfigDict({"size": "tiny", "measurements": (one,)})
  run(speed.jobs_of(config, tmp_path, ()), tmp_path, 1)
  (job,) = speed.jobs_of(config, tmp_path, ())
  (measured,) = speed._ratios(job)
  assert measured["device"].startswith("2 x cpu, ")
  assert measured["config"].startswith("configs/quickstart.py:diffusion,tiny ")
  assert measured["share_of_matmul"] > 0


def test_a_page_without_the_place_is_refused(tmp_path):
  page = tmp_path / "page.md"
  page.write_text("mine\n")
  region = pages.Region("<!-- a -->", "<!-- b -->", "A")
  with pytest.raises(InputError, match="no place for results: a line <!-- a --> and below it"):
    region.check(page)
  region.write(tmp_path / "new.md", ["text", ""])
  assert (tmp_path / "new.md").read_text() == "# A\n\n<!-- a -->\n\ntext\n\n<!-- b -->\n"
