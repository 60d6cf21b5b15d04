"""launch.lab.benchmark steps: what a row holds, and a reference that does not start."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import pytest

from configs import lightningdit, quickstart, vavae_f16d32
from configs.lab import dilemma
from launch.engine import flops
from launch.lab import programs, reference
from launch.lab.benchmark import baseline, measuring, parts, steps
from launch.lab.benchmark import rows as row_module
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError


def tiny():
  config = lightningdit.get_config("B/1")
  config.model.update(hidden_size=32, depth=2, num_heads=2, input_size=4, in_channels=3)
  config.dtype = "float32"
  return config


def measure(**changes):
  settings = {
    "what": ["train"],
    "batch_sizes": [8, 16],
    "attentions": ["xla"],
    "steps": 2,
  }
  return steps.benchmark(tiny(), **(settings | changes))


def checkouts(folder, python=sys.executable):
  return reference.Checkouts(folder, "", python, compiled=False)


def stand_in(folder, monkeypatch):
  """A checkout of the reference, and where the script goes that runs in place of PyTorch's."""
  (folder / "models").mkdir()
  (folder / "models" / "lightningdit.py").touch()
  monkeypatch.setattr(row_module, "SCRIPTS", folder)
  return folder / "steps.py"


def test_each_batch_size_gets_a_row_of_consistent_numbers(monkeypatch):
  monkeypatch.setattr(row_module, "matmul_rate", lambda dtype: 1e9)
  monkeypatch.setattr(row_module, "copy_rate", lambda: 1e3)
  result = measure()
  assert [row["batch_size"] for row in result["rows"]] == [8, 16]
  json.dumps(result)  # goes into a file
  for row in result["rows"]:
    speed = row["batch_size"] / row["seconds"]
    counted = row_module.count(
      row_module.resolved(tiny(), "train", row["batch_size"], "xla"), "train"
    )
    assert row["images_per_second"] == pytest.approx(speed)
    assert row["model_tflops_per_second"] == pytest.approx(speed * counted["tflop_per_image"])
    assert row["fastest"] <= row["seconds"]
    least = row["least_gib"] * 2**30
    assert least > 8 * 4 * 2 * 12 * 32**2  # AdamW and EMA of two blocks, in and out
    # So slow a copy bounds it.
    assert row["share_of_ceiling"] == pytest.approx(least / 1e3 / row["seconds"])
    assert row["share_of_ceiling"] > row["share_of_matmul"]


def test_a_folder_without_the_reference_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"no models/lightningdit\.py"):
    measure(checkouts=checkouts(tmp_path))


def test_an_interpreter_without_what_the_reference_needs_is_refused(tmp_path, capfd):
  (tmp_path / "models").mkdir()
  (tmp_path / "models" / "lightningdit.py").write_text("raise ImportError('not here')\n")
  with pytest.raises(InputError, match="give --torch_python an interpreter with torch"):
    measure(checkouts=checkouts(tmp_path))
  assert "Error" in capfd.readouterr().err


def test_an_interpreter_is_asked_for_what_the_reference_needs(tmp_path):
  with pytest.raises(InputError, match=r"python, which lacks .*torch.*; give an interpreter with"):
    checkouts(tmp_path).check_python()  # the project's own has none of it
  with pytest.raises(InputError, match="--torch_python is /nowhere, which does not start"):
    checkouts(tmp_path, "/nowhere").check_python()


def test_an_interpreter_that_does_not_exist_is_named(tmp_path):
  (tmp_path / "models").mkdir()
  (tmp_path / "models" / "lightningdit.py").touch()
  with pytest.raises(InputError, match="--torch_python is /nowhere/python, which does not start"):
    measure(checkouts=checkouts(tmp_path, "/nowhere/python"))


def test_a_reference_takes_its_steps_in_turn_with_ours(tmp_path, monkeypatch):
  """A script in place of PyTorch's that answers alike."""
  script = stand_in(tmp_path, monkeypatch)
  script.write_text(
    'import sys\nsys.stdin.readline()\nprint(\'{"torch": "3"}\', flush=True)\n'
    "for i, _ in enumerate(sys.stdin): print('{\"seconds\": %f}' % (9 if i % 3 == 0 else 0.5),\n"
    "  flush=True)\n"
  )
  (row,) = measure(checkouts=checkouts(tmp_path), batch_sizes=[8])["rows"]
  assert row["torch"] == "3"
  assert row["torch_images_per_second"] == 8 / 0.5
  assert row["times_torch"] == pytest.approx(0.5 / row["seconds"])


def test_a_part_costs_what_the_step_saves_without_it(monkeypatch):
  """Products stand for steps, which take minutes to compile: one more for each part."""

  def program(config, devices, what, num_images, coded):
    parts = bool(config.teacher.name) + bool(config.loss.disc_weight)
    x = programs.rows((16, 8, 8), jnp.float32, devices)

    def run(x):
      for _ in range(1 + parts * (what == "train")):
        x = x @ x
      return x

    return programs.Program(jax.jit(run), (x,), {}, 1, coded)

  monkeypatch.setattr(parts.programs, "of", program)
  monkeypatch.setattr(
    parts.rows, "prepare", lambda config, devices, program, _: measuring.Prepared(program, devices)
  )
  config = quickstart.tokenizer(tiny=True)  # which has no perceptual network
  result = parts.benchmark(config, steps=2)
  json.dumps(result)  # goes into a file
  seconds, tflops = result["seconds"], result["tflops"]
  names = ["step", "without teacher", "without GAN", "encode", "decode"]
  assert list(seconds) == list(tflops) == names
  for part in ("teacher", "GAN"):
    assert tflops["step"] - tflops[f"without {part}"] == pytest.approx(16 * 2 * 8**3 / 1e12)
    assert result["shares"][part] == 1 - seconds[f"without {part}"] / seconds["step"]
  with pytest.raises(InputError, match="not a tokenizer's"):
    parts.benchmark(tiny(), steps=2)


def test_sampling_loading_and_fid_have_rows_too(monkeypatch, tmp_path):
  monkeypatch.setattr(row_module, "_arithmetic_seconds", lambda: 1.5)
  monkeypatch.setattr(row_module, "_fid_program", lambda devices: small(devices))

  def small(devices):
    x = programs.rows((8, 16), jnp.float32, devices)
    return programs.Program(jax.jit(lambda x: jnp.tanh(x @ x.T)), (x,), {}, 1, 8)

  config = tiny()
  config.sample.update(num_steps=3)
  result = steps.benchmark(
    config,
    what=["sample", "loader", "checkpoint", "fid"],
    batch_sizes=[8],
    attentions=["xla"],
    steps=2,
  )
  sample, loader, checkpoint, fid = result["rows"]
  json.dumps(result)
  assert all(row["images_per_second"] > 0 for row in (sample, loader, fid))
  assert fid["model_tflops_per_second"] * fid["seconds"] == pytest.approx(2 * 8 * 8 * 16 / 1e12)
  assert 0 < checkpoint["blocked_seconds"] < checkpoint["written_after_seconds"]
  assert checkpoint["checkpoint_gib"] * 2**30 > 4 * 4 * 32**2  # parameters, average, two moments
  assert fid["arithmetic_seconds"] == 1.5
  assert sample["compile_cold"] > 0 < sample["compile_warm"]


def test_a_step_is_measured_on_the_state_that_the_last_one_left():
  config = row_module.resolved(tiny(), "train", 8, "xla")
  devices = mesh.make_mesh()
  program = programs.of(config, devices, "train", 1)
  prepared = row_module.prepare(config, devices, program, "train")
  states = [prepared.run()[0] for _ in range(3)]
  assert int(states[-1].step) == 3


def result(speed, memory=2.0, batch_size=8, asked="a.py:B"):
  row = {"what": "train", "attention": "xla", "batch_size": batch_size, "dtype": "float32"}
  row |= {"share_of_matmul": speed, "program_gib": memory, "seconds": 3.0}
  return {
    "asked": asked,
    "device": "1 x cpu",
    "processor": "an i486",
    "commit": "abc",
    "rows": [row, {"what": "loader", "batch_size": 8}],
  }


def test_a_baseline_keeps_ratios_alone_and_names_what_is_worse(tmp_path):
  path = tmp_path / "baseline.json"
  baseline.update(path, baseline.ratios_of(result(0.4)))
  baseline.update(path, baseline.ratios_of(result(0.3, batch_size=16)))
  baseline.update(path, baseline.ratios_of(result(0.5)))  # in the place of the first
  kept = baseline.read(path)
  assert [(row["batch_size"], row["share_of_matmul"]) for row in kept] == [(16, 0.3), (8, 0.5)]
  assert "seconds" not in kept[0]
  assert kept[0]["device"] == "1 x cpu, an i486"
  slower, larger = baseline.changes(baseline.ratios_of(result(0.4, 1.6)), kept)
  assert (slower.ratio, larger.ratio) == ("share_of_matmul", "program_gib")
  assert slower.loss == pytest.approx(0.2)
  assert larger.loss == pytest.approx(-0.25)
  assert not baseline.changes(baseline.ratios_of(result(0.1, asked="another.py")), kept)


def test_a_ratio_that_fell_ends_the_command(tmp_path, capsys):
  path = tmp_path / "baseline.json"
  baseline.update(path, baseline.ratios_of(result(0.4)))
  now = baseline.ratios_of(result(0.35))
  baseline.check(now, path, 0.15)
  assert "-12.5%" in capsys.readouterr().out
  with pytest.raises(InputError, match=r"by more than 10%: share_of_matmul of a\.py:B.* by 12\.5%"):
    baseline.check(now, path, 0.1)
  with pytest.raises(InputError, match="none of these measurements"):
    baseline.check(baseline.ratios_of(result(0.4, asked="b.py")), path, 0.1)
  path.write_text('{"rows": []}')
  with pytest.raises(InputError, match="not a baseline that --update wrote"):
    baseline.read(path)


def test_what_no_longer_fits_is_worse_and_leaves_the_baseline_as_it_was(tmp_path):
  path = tmp_path / "baseline.json"
  baseline.update(path, baseline.ratios_of(result(0.4)))
  full = result(0.4)
  full["rows"][0] = {
    **{name: full["rows"][0][name] for name in ("what", "attention", "batch_size", "dtype")},
    "out_of_memory": True,
  }
  with pytest.raises(InputError, match=r"program_gib of a\.py:B.* by 100\.0%"):
    baseline.check(baseline.ratios_of(full), path, 0.15)
  baseline.update(path, baseline.ratios_of(full))
  assert baseline.read(path)[0]["program_gib"] == 2.0


def test_a_reference_without_the_memory_says_so_and_ours_is_measured(tmp_path, monkeypatch):
  script = stand_in(tmp_path, monkeypatch)
  script.write_text(
    "import sys\nsys.stdin.readline()\nprint('{\"out_of_memory\": true}', flush=True)\n"
    "for _ in sys.stdin: print('{\"out_of_memory\": true}', flush=True)\n"
  )
  (row,) = measure(checkouts=checkouts(tmp_path), batch_sizes=[8])["rows"]
  assert row["torch_out_of_memory"]
  assert row["images_per_second"] > 0
  assert "times_torch" not in row


def test_counts_are_of_products_and_of_what_goes_in_and_out(monkeypatch):
  a, b = jax.ShapeDtypeStruct((6, 5), jnp.float32), jax.ShapeDtypeStruct((5, 7), jnp.bfloat16)
  program = programs.Program(jax.jit(lambda a, b: a @ b), (a, b), {}, 1, 3)
  monkeypatch.setattr(row_module.programs, "of", lambda *_, **__: program)
  row = row_module.count(row_module.resolved(tiny(), "train", 8, "xla"), "train")
  assert row["tflop_per_image"] * 3e12 == pytest.approx(2 * 6 * 5 * 7)
  assert row["least_gib"] * 2**30 == pytest.approx(4 * 6 * 5 + 2 * 5 * 7 + 4 * 6 * 7)


def useful_flops(config, what):
  frozen = row_module.resolved(config, what, 4, "xla")
  devices = mesh.make_mesh()
  computed = flops.count(programs.traced(row_module._program(frozen, devices, what), devices).jaxpr)
  return row_module.useful_flops(frozen, devices, what, computed), computed


def test_sampling_is_charged_for_no_half_that_guidance_leaves_out():
  config = tiny()
  config.sample.update(num_steps=5, timestep_shift=0.0, cfg_scale=1.0)
  plain, computed = useful_flops(config, "sample")
  assert plain == computed
  config.sample.update(cfg_scale=4.0, cfg_interval_start=0.0)
  guided, computed = useful_flops(config, "sample")
  assert guided == computed > 1.9 * plain
  # t = 0, 0.25, 0.5, 0.75: two below the start.
  config.sample.update(cfg_interval_start=0.4)
  assert useful_flops(config, "sample")[0] == pytest.approx((plain + guided) / 2)
  config.sample.update(cfg_interval_start=1.0)
  assert useful_flops(config, "sample")[0] == plain


def test_a_step_is_charged_for_nothing_that_it_computes_again():
  config = tiny()
  plain, _ = useful_flops(config, "train")
  config.model.use_checkpoint = True
  useful, computed = useful_flops(config, "train")
  assert useful == plain < computed


def test_decoding_gives_pictures_and_encoding_takes_batches_as_asked():
  config = quickstart.tokenizer(tiny=True)
  config.data.image_size = config.model.resolution = 32
  frozen = row_module.resolved(config, "decode", 4)
  program = programs.of(frozen, mesh.make_mesh(), "decode", 1, coded=8)
  (z,) = program.arguments[1:]
  assert z.shape == (8, 2, 2, 48)
  out = jax.eval_shape(program.function, *program.arguments)
  assert (out.shape, out.dtype) == ((8, 32, 32, 3), jnp.uint8)


def test_a_classifiers_step_is_counted_too():
  devices = mesh.make_mesh()
  program = programs.of(row_module.resolved(dilemma.judge("tiny"), "train", 8), devices, "train", 1)
  assert programs.count(program, devices) > 0


def test_the_reference_is_asked_for_what_ours_does(tmp_path):
  config = row_module.resolved(tiny(), "sample", 8, "xla")
  job = reference.job_of(checkouts(tmp_path), config, "sample", 8)
  assert job["work"] == "diffusion sample"
  assert (job["batch_size"], job["dtype"], job["model"]["depth"]) == (8, "float32", 2)
  assert job["sample"]["num_steps"] == config.sample.num_steps
  json.dumps(job)
  stochastic = tiny()
  stochastic.sample.mode = "SDE"
  sde = row_module.resolved(stochastic, "sample", 8, "xla")
  with pytest.raises(InputError, match=r"beside the reference: ODE"):
    reference.job_of(checkouts(tmp_path), sde, "sample", 8)
  published = vavae_f16d32.get_config("d16,50ep")
  coder = row_module.resolved(published, "decode", 2)
  job = reference.job_of(checkouts(tmp_path), coder, "decode", 2)
  assert job["model"] == {"embed_dim": 16, "ch_mult": (1, 1, 2, 2, 4), "model_type": "vavae"}
  with pytest.raises(InputError, match=r"no taming/modules/losses/lpips\.py"):
    reference.job_of(checkouts(tmp_path), coder, "train", 2)
  published.model.ch = 64
  with pytest.raises(InputError, match=r"has config\.model\.ch as published"):
    reference.job_of(checkouts(tmp_path), row_module.resolved(published, "encode", 2), "encode", 2)
  toy = row_module.resolved(quickstart.tokenizer(tiny=True), "encode", 2)
  with pytest.raises(InputError, match=r"no config\.model\.patch_size"):
    reference.job_of(checkouts(tmp_path), toy, "encode", 2)
