r"""Reconstruction against generation, with and without alignment: the experiment and its page.

  python -m launch.lab.dilemma --config=configs/lab/dilemma.py:cifar --workdir=runs/dilemma \
    --config.source=zip:cifar10_train.zip --config.test_source=zip:cifar10_test.zip

Trains tokenizers with and without a teacher, for latents of several shapes by several KL weights,
trains diffusion models on the latents of each, and evaluates them in features of a classifier that
was no teacher. Every part is a released command in a process of its own, --jobs at a time; on a CPU
each job stays on one core, on a GPU several need XLA_PYTHON_CLIENT_PREALLOCATE=false. If it is
stopped, the same command continues; --page_only writes the page of the results so far.
configs/lab/dilemma.py has the settings, in the order that answers soonest.

Writes jobs.json, logs/, a folder for each kind of job, and dilemma.md with its pictures.
"""

from __future__ import annotations

import functools

import jax
from absl import flags

from configs.lab import dilemma
from launch.engine import command_line, configuration, console
from launch.engine.circumstances import whole_command
from launch.lab.dilemma import checks, graph, page
from launch.lab.jobs import processors, run

CONFIG = f"{dilemma.__file__}:cifar"


def main() -> None:
  jax.config.update("jax_platforms", "cpu")  # of this process; the jobs have the accelerator
  config = configuration.resolve(FLAGS.config, dilemma.experiment().to_dict())
  checks.check(config)
  workdir = FLAGS.workdir.absolute()
  jobs = graph.jobs_of(config, workdir)
  file = FLAGS.page or workdir / "dilemma.md"
  page.REGION.check(file)
  command = whole_command(("page", "page_only"))
  write_page = functools.partial(page.write, config, workdir, jobs, file, command)
  if FLAGS.page_only:
    write_page()
  else:
    checks.check_parts(config)
    workers, cores = processors(FLAGS.jobs)
    console.say(f"{len(jobs)} jobs, {workers} at a time; logs in {workdir / 'logs'}")
    run(jobs, workdir, workers, cores, write_page)
  console.table("Dilemma", ("what", "where"), [("page", str(file)), ("workdir", str(workdir))])


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("The settings; by default configs/lab/dilemma.py:cifar.")
  command_line.define_output("workdir", "runs/dilemma", "The folder for all results.")
  flags.DEFINE_integer("jobs", 0, "Jobs at a time; 0: one for each core, or one on a GPU.", 0)
  command_line.define_output("page", None, "The page; by default dilemma.md in the workdir.")
  flags.DEFINE_boolean("page_only", False, "Run no job, write the page of the results so far.")
  console.run_command(main, config=CONFIG)
