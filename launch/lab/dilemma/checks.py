"""Checks of an experiment before its first job runs, so that none fails hours later."""

from __future__ import annotations

from ml_collections import FrozenConfigDict

import lightningdit_jax.checks
from configs.lab import dilemma
from configs.lab.dilemma import MAIN
from launch import tasks
from launch.evaluation import cells
from launch.lab.dilemma import graph
from vavae_jax.common.errors import InputError
from vavae_jax.data import sources

LEAST = {"num_samples": 2, "curve_samples": 2, "cells": cells.LEAST, "runs": 1, "cfg_scale": 1.0}


def check(config: FrozenConfigDict) -> None:
  """Raises InputError for settings that make no experiment."""
  if config.size not in dilemma.SIZES:
    raise InputError(f"config.size is {config.size!r}; choose one of {', '.join(dilemma.SIZES)}.")
  if unknown := [name for name in config.ablations if name not in dilemma.VARIANTS]:
    raise InputError(
      f"config.ablations names {unknown[0]!r}; choose from {', '.join(dilemma.VARIANTS)}."
    )
  if len({*MAIN, *config.ablations}) < len(MAIN) + len(config.ablations):
    raise InputError(f"config.ablations has a name twice, or one of {' and '.join(MAIN)}.")
  for name, least in (("widths", 2), ("seeds", 1), ("ablation_seeds", 1)):
    values = config[name]
    if len({*values}) < max(least, len(values)):
      raise InputError(f"config.{name} is {values}; give {least} or more, each once.")
  if min(config.widths) < 1:
    raise InputError(f"config.widths is {config.widths}; channels are 1 or more.")
  for name, lowest in LEAST.items():
    if config[name] < lowest:
      raise InputError(f"config.{name} is {config[name]}; it must be {lowest} or more.")


def check_parts(config: FrozenConfigDict) -> None:
  """Raises InputError for pictures, teachers' weights or models that a job could not use."""
  for spec in (config.source, config.test_source):
    if spec:
      sources.check_readable(sources.open_source(spec))
  for part in (
    dilemma.judge(config.size),
    *(dilemma.tokenizer(config.size, w, variant) for variant, w in graph.tokenizers(config)),
  ):
    part.data.source = config.source
    tasks.of(part).check(tasks.frozen(part))
  for width in config.widths:
    lightningdit_jax.checks.check_model(FrozenConfigDict(dilemma.diffusion(config.size, width)))
