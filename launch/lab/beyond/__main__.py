r"""What the options of docs/beyond.md are worth at small size: the experiment and its table.

  python -m launch.lab.beyond --config=configs/lab/beyond.py:cifar --workdir=runs/dilemma \
    --config.source=zip:cifar10_train.zip --config.test_source=zip:cifar10_test.zip

Trains a baseline and each option of configs/lab/beyond.py on the same latents, judges samples at
four points of training and at equal time, and combines the options that win. Every part is a
released command in a process of its own; judges and latents are those of launch.lab.dilemma, whose
workdir may be given. If it is stopped, the same command continues; --page_only writes the table of
the results so far.
"""

from __future__ import annotations

import functools

import jax
from absl import flags

from configs.lab import beyond
from launch.engine import command_line, configuration, console
from launch.engine.circumstances import whole_command
from launch.lab.beyond import checks, graph, page
from launch.lab.jobs import processors, run

CONFIG = f"{beyond.__file__}:cifar"


def main() -> None:
  jax.config.update("jax_platforms", "cpu")  # of this process; the jobs have the accelerator
  config = configuration.resolve(FLAGS.config, beyond.experiment().to_dict())
  checks.check(config)
  workdir = FLAGS.workdir.absolute()
  file = FLAGS.page or workdir / "beyond.md"
  page.REGION.check(file)
  command = whole_command(("page", "page_only"))
  write_page = functools.partial(page.write, config, workdir, file, command)
  if FLAGS.page_only:
    write_page()
  else:
    workers, cores = processors(FLAGS.jobs)
    console.say(f"{workers} jobs at a time; logs in {workdir / 'logs'}")
    jobs, done = graph.jobs_of(config, workdir), 0
    while len(jobs) > done:  # more follow from the results
      run(jobs, workdir, workers, cores, write_page)
      jobs, done = graph.jobs_of(config, workdir), len(jobs)
  console.table("Beyond", ("what", "where"), [("page", str(file)), ("workdir", str(workdir))])


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("The settings; by default configs/lab/beyond.py:cifar.")
  command_line.define_output("workdir", "runs/dilemma", "The folder for all results.")
  flags.DEFINE_integer("jobs", 0, "Jobs at a time; 0: one for each core, or one on a GPU.", 0)
  command_line.define_output("page", None, "The page; by default beyond.md in the workdir.")
  flags.DEFINE_boolean("page_only", False, "Run no job, write the table of the results so far.")
  console.run_command(main, config=CONFIG)
