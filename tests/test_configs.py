"""Configurations: every file is accepted, names are the constructors', mistakes are named."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import pytest

from configs import base, quickstart
from launch.engine.configuration import resolve
from lightningdit_jax.model import LightningDiT
from vavae_jax.autoencoder import Autoencoder
from vavae_jax.discriminator import PatchDiscriminator
from vavae_jax.errors import InputError

EXPERIMENTS = sorted(
  path.stem
  for path in Path(base.__file__).parent.glob("*.py")
  if path.stem not in ("__init__", "base", "quickstart")
)


def keywords(module):
  return set(inspect.signature(module.__init__).parameters) - {"self", "dtype", "rngs"}


def test_model_keys_are_keywords_of_the_constructors():
  assert set(base.diffusion().model) == keywords(LightningDiT)
  assert set(base.tokenizer().model) <= keywords(Autoencoder)
  assert set(base.tokenizer().discriminator) <= keywords(PatchDiscriminator)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_are_accepted(name):
  config = importlib.import_module(f"configs.{name}").get_config()
  resolve(config, getattr(base, config.task)())


@pytest.mark.parametrize("argument", ["tokenizer", "diffusion", "tokenizer,tiny", "diffusion,tiny"])
def test_quickstart_is_accepted(argument):
  config = quickstart.get_config(argument)
  resolve(config, getattr(base, config.task)())


def test_an_unknown_key_gets_a_suggestion():
  config = base.tokenizer()
  config.loss.kl_wieght = 1.0
  with pytest.raises(InputError, match=r"config\.loss\.kl_wieght.*config\.loss\.kl_weight"):
    resolve(config, base.tokenizer())


def test_a_value_of_another_type_is_named():
  config = base.tokenizer().unlock()
  with config.ignore_type():
    config.num_steps = "many"
  with pytest.raises(InputError, match=r"config\.num_steps is 'many'"):
    resolve(config, base.tokenizer())


def test_a_missing_key_is_named():
  config = base.tokenizer()
  del config.optimizer.b2
  with pytest.raises(InputError, match=r"optimizer\.b2"):
    resolve(config, base.tokenizer())
