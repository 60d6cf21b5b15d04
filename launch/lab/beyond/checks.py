"""Checks of an experiment before its first job runs, so that none fails hours later."""

from __future__ import annotations

from ml_collections import FrozenConfigDict

from configs.lab import beyond
from launch.lab.beyond.rows import diffusion_of, tokenizer_of
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
      f"{', '.join([*beyond.ROWS][1:])}."
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
    tokenizer_of(config, name)
    diffusion_of(config, name)
  for spec in filter(None, (config.source, config.test_source)):
    sources.check_readable(sources.open_source(spec))
