"""Configurations: every file is accepted, names are the constructors', mistakes are named."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import (
  ablation,
  autoguidance,
  base,
  lightningdit,
  lightningdit_sdvae,
  lightningdit_xl_800ep,
  lightningdit_xl_dmf,
  lightningdit_xl_internal_guidance,
  quickstart,
  vavae_f16d32,
  vtp,
)
from configs.lab import dilemma
from launch import tasks
from launch.engine import loop
from launch.engine.configuration import File, flat, resolve
from lightningdit_jax import checks, training
from lightningdit_jax.options import PRESETS, Options
from vavae_jax import autoencoder, stages
from vavae_jax.autoencoder import PRESETS as PRESETS_OF_TOKENIZERS
from vavae_jax.autoencoder import downsampling
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json
from vavae_jax.discriminator import PatchDiscriminator
from vavae_jax.teachers.enlarged import Enlarged
from vavae_jax.update import build_autoencoder

EXPERIMENTS = sorted(
  path.stem
  for path in Path(base.__file__).parent.glob("*.py")
  if path.stem not in ("__init__", "base", "page", "pictures", "quickstart")
)


def keywords(module):
  return set(inspect.signature(module.__init__).parameters) - {"self", "dtype", "rngs"}


def test_model_keys_are_keywords_of_the_constructors():
  assert set(base.diffusion().model) == {field.name for field in dataclasses.fields(Options)}
  known = {field.name for field in dataclasses.fields(autoencoder.Options)}
  assert set(base.tokenizer().model) <= known
  assert set(base.tokenizer().discriminator) <= keywords(PatchDiscriminator)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_accepted(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  resolve(config, base.KEYS[config.task])


@pytest.mark.parametrize(
  ("task", "changes", "known"),
  [
    ("tokenizer", {"keep_best": "-reconstruction/lpips"}, "reconstruction/perceptual"),
    ("tokenizer", {"keep_best": "validation/mse"}, "reconstruction/teacher_cosine"),
    ("diffusion", {"keep_best": "validation/loss", "evaluate_samples": 9}, "fd_efficientnet"),
    ("diffusion", {"keep_best": "validation/loss", "latents.valid_path": "x"}, "mse_t0.06"),
    ("classifier", {"keep_best": "-held_out/psnr"}, "held_out/accuracy"),
    ("classifier", {"keep_best": "-held_out/accuracy", "evaluate_every_steps": 0}, "none"),
  ],
)
def test_a_best_checkpoint_by_what_nothing_gives_is_refused(task, changes, known):
  config = getattr(base, task)()
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=f"keep_best is '{changes['keep_best']}'.*{known}"):
    tasks.frozen(config)


@pytest.mark.parametrize("row", ablation.ROWS)
def test_rows_of_the_ablation_can_be_trained(row):
  config = resolve(ablation.get_config(row), base.KEYS["diffusion"])
  loop.check(config)
  checks.check_model(config)


@pytest.mark.parametrize("argument", ["", *vavae_f16d32.WORDS, "d64,mae,50ep,no_margin"])
def test_every_argument_of_the_tokenizer_can_be_trained(argument):
  config = resolve(vavae_f16d32.get_config(argument), base.KEYS["tokenizer"])
  config = stages.with_steps(config, num_images=1_281_167)
  if argument in PRESETS_OF_TOKENIZERS:
    model = functional.outline(build_autoencoder(config), "config.model")
    assert f"f{model.downsampling}d{model.embed_dim}" in argument
  assert config.num_steps == (250_228 if "50ep" in argument else 650_593)


@pytest.mark.parametrize(
  ("get_config", "words"),
  [
    *((vavae_f16d32.get_config, ("sd_f8d4", word)) for word in ("clip", "dinov2", "plain", "50ep")),
    *((vavae_f16d32.get_config, (word, "50ep", "mae")) for word in ("no_margin", "d64", "decoder")),
    (quickstart.get_config, ("diffusion", "tiny")),
    (dilemma.get_config, ("tokenizer", "f8d16", "plain", "kl0")),
    (dilemma.get_config, ("w64", "diffusion", "f8d16", "tiny")),
  ],
)
def test_arguments_commute(get_config, words):
  first, *others = (get_config(",".join(order)) for order in itertools.permutations(words))
  assert all(other.to_dict() == first.to_dict() for other in others)


@pytest.mark.parametrize(
  ("argument", "teacher", "scale"),
  [("sd_f8d4", "", 1), ("clip,sd_f8d4", "clip_vitl14", 2), ("clip", "clip_vitl14", 1)],
)
def test_a_teacher_sees_pictures_as_large_as_the_latents_need(argument, teacher, scale):
  config = vavae_f16d32.get_config(argument)
  assert (config.teacher.name, config.teacher.scale) == (teacher, scale)
  if teacher:
    stride = downsampling(config.model.ch_mult, config.model.patch_size)
    Enlarged(SimpleNamespace(stride=16, feature_size=8), scale, stride)


def test_arguments_that_exclude_each_other_are_refused():
  with pytest.raises(ValueError, match="sd_f8d4 and d32 exclude each other"):
    vavae_f16d32.get_config("sd_f8d4,d32")


def test_the_ablation_goes_from_dit_to_the_published_recipe():
  first, last = (dict(flat(ablation.get_config(row).to_dict())) for row in ("dit", "vavae"))
  published = dict(flat(base.diffusion().to_dict()))
  # 80 epochs instead of 64, and no guidance.
  sampling = {key for key in last if key.startswith("sample.")}
  assert {key for key in last if last[key] != published[key]} - sampling == {"num_steps"}
  assert (first["model.use_swiglu"], first["transport.prediction"]) == (False, "noise")


@pytest.mark.parametrize(
  ("config", "count", "sampler"),
  [
    (lightningdit_sdvae.get_config(), 50_000, ("dopri5", 0.0, 1.0, 0.0)),
    *((ablation.get_config(row), 50_000, ("dopri5", 0.0, 1.0, 0.0)) for row in ablation.ROWS),
    (lightningdit.get_config("table2,B/1"), 10_000, ("dopri5", 0.0, 1.0, 0.0)),
    (base.diffusion(), 50_000, ("euler", 0.3, 10.0, 0.1)),
    (lightningdit_xl_800ep.get_config(), 50_000, ("euler", 0.3, 6.7, 0.125)),
    (lightningdit_xl_internal_guidance.get_config(), 50_000, ("heun2", 0.3, 1.45, 0.19)),
    (lightningdit_xl_dmf.get_config(), 50_000, ("map", 0.0, 1.0, 0.0)),
    (vtp.get_config("L"), 50_000, ("euler", 0.075, 1.0, 0.0)),
  ],
)
def test_a_recipe_carries_the_protocol_of_its_number(config, count, sampler):
  keys = ("method", "timestep_shift", "cfg_scale", "cfg_interval_start")
  assert tuple(config.sample[key] for key in keys) == sampler
  assert config.published.to_dict() == {"num_samples": count, "labels": "uniform"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_size_has_a_configuration(name):
  config = lightningdit.get_config(name.removeprefix("LightningDiT-"))
  assert {key: config.model[key] for key in PRESETS[name]} == PRESETS[name]


def test_an_unknown_size_gets_a_list():
  with pytest.raises(InputError, match=r"LightningDiT-XL/3.*LightningDiT-B/1"):
    lightningdit.get_config("XL/3")


def test_the_800_epoch_recipe_ends_logit_normal_times_at_step_600_000():
  config = lightningdit_xl_800ep.get_config()
  phases = [training.phase(config, step) for step in (1, 600_000, 600_001, config.num_steps)]
  assert phases == ["logit-normal", "logit-normal", "uniform", "uniform"]


def test_autoguidances_guide_has_the_published_epochs_of_its_resolution():
  assert autoguidance.get_config("guide").num_steps == 17_516  # 14 epochs
  assert autoguidance.get_config("guide,512").num_steps == 25_023  # 20


@pytest.mark.parametrize(
  ("recipe", "epochs"),
  [(lightningdit_xl_internal_guidance, 679), (lightningdit_xl_dmf, 79)],  # but for parts of one
)
def test_options_can_be_trained_at_xl(recipe, epochs):
  config = resolve(recipe.get_config(), base.KEYS["diffusion"])
  loop.check(config)
  checks.check_model(config)
  assert config.num_steps * config.batch_size // 1_281_167 == epochs


@pytest.mark.parametrize("argument", ["tokenizer", "diffusion", "tokenizer,tiny", "diffusion,tiny"])
def test_quickstart_is_accepted(argument):
  config = quickstart.get_config(argument)
  resolve(config, base.KEYS[config.task])


def test_an_unknown_key_gets_a_suggestion():
  config = base.tokenizer()
  config.loss.kl_wieght = 1.0
  with pytest.raises(InputError, match=r"config\.loss\.kl_wieght.*config\.loss\.kl_weight"):
    resolve(config, base.KEYS["tokenizer"])


def test_a_value_of_another_type_is_named():
  config = base.tokenizer().unlock()
  with config.ignore_type():
    config.num_steps = "many"
  with pytest.raises(InputError, match=r"config\.num_steps is 'many'"):
    resolve(config, base.KEYS["tokenizer"])


def test_a_missing_key_is_named():
  config = base.tokenizer()
  del config.optimizer.b2
  with pytest.raises(InputError, match=r"optimizer\.b2"):
    resolve(config, base.KEYS["tokenizer"])


@pytest.mark.parametrize(
  ("program", "told"),
  [
    ("def get_config():\n  return 1 / 0", r"^ZeroDivisionError: division by zero \(line 2\)$"),
    ("def get_config():\n  raise ValueError('one\\ntwo')", "^one two$"),
    ("def get_config(:", "^SyntaxError: "),
    ("def get_config():\n  return {}", "returns dict; let it return a ConfigDict"),
    ("import nothing_of_this_name", r"^ModuleNotFoundError: .* \(line 1\)$"),
    ("", "has no attribute 'get_config'"),
  ],
)
def test_a_file_that_gives_no_configuration_is_refused_in_one_line(program, told, tmp_path):
  (tmp_path / "file.py").write_text(program)
  with pytest.raises(InputError, match=told):
    File().parse(str(tmp_path / "file.py"))


@pytest.mark.parametrize("name", ["modle.depth", "model.depth.x", "model.", "", "optimizer.b1[0]"])
def test_a_word_that_names_no_key_is_refused_alone(name, monkeypatch):
  monkeypatch.setattr("sys.argv", ["", "--config.seed=1", f"--config.{name}=1"])
  with pytest.raises(InputError, match=rf"^config\.{re.escape(name)} is not a configuration key"):
    File().parse("configs/quickstart.py:diffusion")


def test_a_message_shows_the_ends_of_a_very_long_value():
  message = str(InputError(f"config.seed is {'x' * 10**6}; give an integer."))
  assert len(message) < 5_000
  assert message.startswith("config.seed is x")
  assert message.endswith("x; give an integer.")


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("optimizer.ema_decays", "x"),
    ("model", {"ch": "wide"}),
    ("loss", "x"),
    ("optimizer.b1", {"x": 1}),
    ("data", []),
  ],
)
def test_a_value_of_a_workdirs_note_that_is_not_possible_is_named(tmp_path, key, value):
  config = quickstart.tokenizer(tiny=True).to_dict()
  section, _, name = key.partition(".")
  config[section] = config[section] | {name: value} if name else value
  write_json(tmp_path / "config.json", config)
  with pytest.raises(InputError, match=rf"config\.json.*{key}"):
    tasks.noted(tmp_path)


def test_an_earlier_versions_note_may_lack_keys_and_have_others(tmp_path):
  config = quickstart.tokenizer(tiny=True).to_dict() | {"old": 1}
  del config["report_waits_after"], config["data"]["split"]
  write_json(tmp_path / "config.json", config)
  assert tasks.noted(tmp_path).data.split == "position"
