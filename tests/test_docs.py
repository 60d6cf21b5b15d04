"""Commands in the documents exist, with their options and configuration keys."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest

from configs import base
from launch.engine.configuration import flat, resolve
from tests.conftest import ROOT

PAGES = ("README.md", "docs/tutorial.md", "docs/tokenizer.md", "docs/data.md", "docs/evaluation.md")
OWN_CONFIG = {"launch.dilemma": "configs/dilemma.py"}  # where none is given
COMMAND = re.compile(r"^\s*(?:.*`)?(python -m launch\.(?:[^`\n\\]|\\\n)*)", re.MULTILINE)


def commands():
  for page in PAGES:
    for found in COMMAND.finditer((ROOT / page).read_text()):
      words = shlex.split(found.group(1).replace("\\\n", " "))
      yield pytest.param(words, id=f"{page}: {' '.join(words[2:5])}")


@pytest.mark.parametrize("words", commands())
def test_commands_of_the_documents_can_be_given(words):
  _, _, module, *options = words
  source = (ROOT / f"{module.replace('.', '/')}.py").read_text()
  known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
  if module in ("launch.sample", "launch.evaluate"):
    known |= set(base.sample())
  given = dict(word.removeprefix("--").partition("=")[::2] for word in options if word[0] == "-")
  config = None
  if path := given.get("config", OWN_CONFIG.get(module)):
    name, _, argument = path.removeprefix("configs/").partition(".py")
    arguments = [argument[1:]] if argument else []
    config = importlib.import_module(f"configs.{name}").get_config(*arguments)
  for option in given:
    if option.startswith("config."):
      assert config is not None
      assert option.removeprefix("config.") in dict(flat(config.to_dict())), option
    else:
      assert option in known | {"config"}, option
  if config is not None and "task" in config:
    resolve(config, getattr(base, config.task)())


def test_the_keys_in_the_tutorial_exist():
  text = (ROOT / "docs" / "tutorial.md").read_text()
  known = dict(flat(base.diffusion().to_dict()))
  keys = re.findall(r"--config\.([\w.]+)", text)
  assert len(keys) > 10
  assert set(keys) <= set(known)
