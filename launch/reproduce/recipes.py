"""The configurations that numbers are made with, and what of them a person may set."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from launch import tasks
from launch.engine import command_line, configuration
from launch.reproduce.given import Given
from lightningdit_jax.options import ONLY_OURS
from vavae_jax.common.errors import InputError

OURS = tuple(f"model.{name}" for name in ONLY_OURS)
# Keys that a person may set: by what means, not what is computed. The published logs' losses are
# means over as many steps as a recipe's own.
_FIXED = (
  *("num_steps", "published.", "latents.", "data.", "teacher.", "tokenizer", "evaluate_s"),
  "log_every_steps",
)
CHOICES = (*(name for name in configuration.MAY_CHANGE if not name.startswith(_FIXED)), *OURS)


def config_of(recipe: str, changes: Mapping[str, Any], given: Given | None = None) -> ConfigDict:
  """A recipe's configuration; with a person's seed and settings, if they are for it."""
  path = command_line.expanded(f"--config={recipe}").partition("=")[2]
  config = configuration.File().parse(path)
  config.update_from_flattened_dict(changes)
  for word in given.set if given else ():
    name, _, value = word.partition("=")
    keys = dict(configuration.flat(config.to_dict()))
    if name not in CHOICES:
      raise InputError(f"--set={word} would change the number; choose of {', '.join(CHOICES)}.")
    if name not in keys:
      raise InputError(f"--set={word}: {recipe} has no {name}.")
    try:
      config.update_from_flattened_dict({name: _value(value)})
    except TypeError as error:
      kind = type(keys[name]).__name__
      raise InputError(f"--set={word} is of another kind; {name} needs {kind}.") from error
  if given:
    config.seed = given.seed
  tasks.frozen(config)
  return config


def _value(text: str) -> Any:
  """What a person wrote, as Python reads it, else a text without quotes."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError):
    return text
