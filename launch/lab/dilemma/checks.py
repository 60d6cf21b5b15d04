"""Checks of an experiment before its first job runs, so that none fails hours later."""

from __future__ import annotations

from ml_collections import FrozenConfigDict

import lightningdit_jax.checks
from configs.lab import dilemma
from launch import tasks
from launch.evaluation import cells, probe
from vavae_jax.common.errors import InputError
from vavae_jax.data import sources

LEAST = {"judge_steps": 1, "tokenizer_steps": 1, "num_samples": 2, "cells": cells.LEAST, "runs": 1}


def check(config: FrozenConfigDict) -> None:
  """Raises InputError for settings that make no experiment."""
  if config.size not in dilemma.SIZES:
    raise InputError(f"config.size is {config.size!r}; choose one of {', '.join(dilemma.SIZES)}.")
  for name in ("spaces", "tokenizer_seeds", "seeds", "steps"):
    values = [*config[name], *(config.more_spaces if name == "spaces" else ())]
    if not config[name] or len({*values}) < len(values):
      raise InputError(f"config.{name} has {values}; give one or more, each once.")
  for space in (*config.spaces, *config.more_spaces):
    try:
      tokenizer, diffusion = _parts(config, space)
    except ValueError as error:
      raise InputError(
        f"config.spaces has {space!r}, which is not VARIANT/fPdZ/klW/wD: {error}"
      ) from error
    if dilemma.IMAGE_SIZE % tokenizer.model.patch_size:
      raise InputError(f"config.spaces has {space!r}; its cells must divide {dilemma.IMAGE_SIZE}.")
    every = diffusion.keep_every_steps
    if [*config.steps] != sorted(config.steps) or any(x < 1 or x % every for x in config.steps):
      raise InputError(f"config.steps is {config.steps}; give multiples of {every}, ascending.")
    lightningdit_jax.checks.check_model(FrozenConfigDict(diffusion))
  if config.probe_pictures:
    probe.check(config.probe_pictures)
  for name, lowest in LEAST.items():
    if config[name] < lowest:
      raise InputError(f"config.{name} is {config[name]}; it must be {lowest} or more.")


def _parts(config: FrozenConfigDict, space: str) -> tuple[FrozenConfigDict, FrozenConfigDict]:
  """The configurations of a space's tokenizer and diffusion model; ValueError if it is none."""
  if space.count("/") != 3:
    raise ValueError("it has four parts.")
  variant, shape, kl, width = space.split("/")
  parts = (f"tokenizer,{variant},{shape},{kl}", f"diffusion,{shape},{width}")
  tokenizer, diffusion = (dilemma.get_config(f"{config.size},{part}") for part in parts)
  return tokenizer, diffusion


def check_parts(config: FrozenConfigDict) -> None:
  """Raises InputError for pictures, teachers' weights or models that a job could not use."""
  for spec in (config.source, config.test_source):
    if spec:
      sources.check_readable(sources.open_source(spec))
  # One of each variant and size of cells: channels and weights are numbers alone.
  spaces = {}
  for space in (*config.spaces, *config.more_spaces):
    variant, shape, *_ = space.split("/")
    spaces[variant, dilemma.shape_of(shape)[0]] = space
  for part in (
    dilemma.judge(config.size),
    dilemma.judge(config.size, second=True),
    *(_parts(config, space)[0] for space in spaces.values()),
  ):
    part.data.source = config.source
    tasks.of(part).check(tasks.frozen(part))
