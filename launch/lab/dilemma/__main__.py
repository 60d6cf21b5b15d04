r"""Reconstruction against generation, and alignment's way out: the whole experiment and its page.

  python -m launch.lab.dilemma --config=configs/lab/dilemma.py:cifar --workdir=runs/dilemma \
    --config.source=zip:cifar10_train.zip --config.test_source=zip:cifar10_test.zip

Trains tokenizers of several widths with and without a teacher, a diffusion model of one size on the
latents of each, and judges them in features of a classifier that taught nobody. All of it by the
released commands, one process each, --jobs at a time; on a CPU each stays on a core of its own.
Stopped at any point, the same command goes on where it was; --page_only writes the page of what is
there. configs/lab/dilemma.py has the settings.

In the workdir: jobs.json, logs/, and a folder for each kind of job; dilemma.md with its pictures.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
from absl import flags
from ml_collections import FrozenConfigDict

import lightningdit_jax.checks
from configs.lab import dilemma
from launch import tasks
from launch.engine import configuration, console
from launch.engine.circumstances import own_command
from launch.evaluation import space
from launch.lab.dilemma import graph, page
from launch.lab.dilemma.results import MAIN
from launch.lab.jobs import run
from vavae_jax.common.errors import InputError
from vavae_jax.data import sources

CONFIG = f"{dilemma.__file__}:cifar"
LEAST = {"num_samples": 2, "curve_samples": 2, "cells": space.LEAST, "runs": 1, "cfg_scale": 1.0}


def check(config: FrozenConfigDict) -> None:
  """Raises InputError for settings that make no experiment."""
  if config.size not in dilemma.SIZES:
    raise InputError(f"config.size is {config.size!r}; there are {', '.join(dilemma.SIZES)}.")
  if unknown := [name for name in config.ablations if name not in dilemma.VARIANTS]:
    raise InputError(
      f"config.ablations names {unknown[0]!r}; there are {', '.join(dilemma.VARIANTS)}."
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
  """Raises InputError for what keeps a part from running: pictures, teachers' weights, models."""
  for spec in (config.source, config.test_source):
    if spec:
      sources.check_readable(sources.open_source(spec))
  for part in (
    dilemma.judge(config.size),
    *(dilemma.tokenizer(config.size, w, variant) for variant, w in graph.tokenizers(config)),
  ):
    part.data.source = config.source
    tasks.of(part).check(tasks.resolve(part))
  for width in config.widths:
    lightningdit_jax.checks.check_model(FrozenConfigDict(dilemma.diffusion(config.size, width)))


def _workers() -> tuple[int, list[int]]:
  """How many jobs run at once, and on which cores."""
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  # Asked in a process of its own: one that has asked keeps the accelerator's memory.
  words = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
  backend = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
  jobs = FLAGS.jobs or (len(cores) or 1 if backend == "cpu" else 1)
  if backend != "cpu" or jobs > len(cores):
    return jobs, []
  return jobs, cores


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  jax.config.update("jax_platforms", "cpu")  # of this process; the jobs have the accelerator
  config = configuration.resolve(FLAGS.config, dilemma.experiment())
  check(config)
  workdir = Path(FLAGS.workdir).absolute()
  jobs = graph.jobs_of(config, workdir)
  file = Path(FLAGS.page) if FLAGS.page else workdir / "dilemma.md"
  page.REGION.check(file)
  write_page = functools.partial(
    page.write, config, workdir, jobs, file, own_command(("page", "page_only"))
  )
  if not FLAGS.page_only:
    check_parts(config)
    workers, cores = _workers()
    console.say(f"{len(jobs)} jobs, {workers} at a time; logs in {workdir / 'logs'}")
    try:
      run(jobs, workdir, workers, cores)
    except BaseException:
      with contextlib.suppress(OSError):  # what stopped the jobs is what has to be told
        write_page()
      raise
  write_page()
  console.table("Dilemma", ("what", "where"), [("page", str(file)), ("workdir", str(workdir))])


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("The settings; configs/lab/dilemma.py:cifar if not given.")
  flags.DEFINE_string("workdir", "runs/dilemma", "Where everything is written.")
  flags.DEFINE_integer("jobs", 0, "At once; 0: one for each core, or one on an accelerator.", 0)
  flags.DEFINE_string("page", "", "The page; dilemma.md in the workdir if not given.")
  flags.DEFINE_boolean("page_only", False, "Run nothing, write the page of what is there.")
  console.run_command(main, config=CONFIG)
