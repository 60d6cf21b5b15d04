"""Checks of an experiment before its first job runs, so that none fails hours later."""

from __future__ import annotations

from ml_collections import ConfigDict, FrozenConfigDict

import lightningdit_jax.checks
from configs.lab import beyond, dilemma
from launch import tasks
from launch.lab.beyond.graph import row_of
from vavae_jax.common.errors import InputError
from vavae_jax.data import sources

LEAST = {"judge_steps": 1, "tokenizer_steps": 1, "num_samples": 2}


def check(config: FrozenConfigDict) -> None:
  """Raises InputError for settings that make no experiment, and pictures that cannot be read."""
  if config.size not in beyond.SIZES:
    raise InputError(f"config.size is {config.size!r}; choose one of {', '.join(beyond.SIZES)}.")
  if config.rows[:1] != (beyond.BASELINE,) or not {*config.rows} <= {*beyond.ROWS}:
    raise InputError(
      f"config.rows is {config.rows}; give {beyond.BASELINE} and then some of "
      f"{', '.join(beyond.ROWS)}."
    )
  for name in ("rows", "seeds", "steps"):
    if not config[name] or len({*config[name]}) < len(config[name]):
      raise InputError(f"config.{name} is {config[name]}; give one or more, each once.")
  every = beyond.diffusion(config.size).keep_every_steps
  if [*config.steps] != sorted(config.steps) or any(x < 1 or x % every for x in config.steps):
    raise InputError(f"config.steps is {config.steps}; give multiples of {every}, ascending.")
  for name, lowest in LEAST.items():
    if config[name] < lowest:
      raise InputError(f"config.{name} is {config[name]}; it must be {lowest} or more.")
  for name in config.rows:
    diffusion_of(config, name)
    tokenizer_of(config, name)
  for spec in filter(None, (config.source, config.test_source)):
    sources.check_readable(sources.open_source(spec))


def diffusion_of(config: FrozenConfigDict, name: str) -> FrozenConfigDict:
  """The configuration of a row's diffusion models, with its sampling; InputError if it is wrong."""
  row, found = row_of(name), beyond.diffusion(config.size)
  changes = {**row.training, **{f"sample.{key}": x for key, x in row.sampling.items()}}
  _update(found, changes, name)
  resolved = tasks.frozen(found)
  lightningdit_jax.checks.check_model(resolved)
  return resolved


def tokenizer_of(config: FrozenConfigDict, name: str) -> FrozenConfigDict:
  """The configuration of a row's tokenizer; InputError if it is wrong."""
  try:
    found = dilemma.tokenizer(
      "tiny" if config.size == "tiny" else "cifar", *config.tokenizer.split("/")
    )
  except (TypeError, ValueError, KeyError) as error:
    raise InputError(
      f"config.tokenizer is {config.tokenizer!r}, which is not VARIANT/fPdZ/klW: {error}"
    ) from error
  found.data.source = config.source
  _update(found, dict(row_of(name).tokenizer), name)
  resolved = tasks.frozen(found)
  if row_of(name).tokenizer:
    tasks.of(found).check(resolved)
  return resolved


def _update(config: ConfigDict, changes: dict[str, object], name: str) -> None:
  try:
    config.update_from_flattened_dict(changes)
  except (KeyError, AttributeError, TypeError) as error:
    raise InputError(f"The row {name} has a change that is not possible: {error}") from error
