r"""Reconstruction against generation, and alignment's way out: the whole experiment and its page.

  python -m launch.dilemma --config=configs/dilemma.py:cifar --workdir=runs/dilemma \
    --config.source=zip:cifar10_train.zip --config.test_source=zip:cifar10_test.zip

Trains tokenizers of several widths with and without a teacher, a diffusion model of one size on the
latents of each, and judges them in features of a classifier that taught nobody. All of it by the
released commands, one process each, --jobs at a time; on a CPU each stays on a core of its own.
Stopped at any point, the same command goes on where it was; --page_only writes the page of what is
there. configs/dilemma.py has the settings.

In the workdir: jobs.json, logs/, and a folder for each kind of job; dilemma.md with its pictures.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from configs import dilemma
from launch import dilemma_page
from launch.engine import configuration, console
from launch.jobs import Job, run
from vavae_jax import sources
from vavae_jax.errors import InputError

CONFIG = f"{dilemma.__file__}:cifar"
MAIN = dilemma_page.MAIN
# Jobs that use a cache which another job makes need it first.
BUILDERS = ("aligned", "other_teacher", "finer_teacher")


def jobs_of(config: FrozenConfigDict, workdir: Path) -> list[Job]:
  """All jobs of an experiment, in the order of their importance.

  Args:
    config: from `configs/dilemma.py`, without a part.
    workdir: everything goes there.

  Returns:
    The jobs.
  """
  return list(_jobs(config, workdir))


def tokenizers(config: FrozenConfigDict) -> list[tuple[str, int]]:
  """(variant, width) of all tokenizers: the experiment's, then the ablations'."""
  main = [(variant, width) for width in config.widths for variant in MAIN]
  return main + [(variant, max(config.widths)) for variant in config.ablations]


def seeds_of(config: FrozenConfigDict, variant: str) -> tuple[int, ...]:
  """Those of the diffusion models on a tokenizer's latents."""
  return config.seeds if variant in MAIN else config.ablation_seeds


def _jobs(config: FrozenConfigDict, root: Path) -> Iterator[Job]:
  settings = f"--config={_file()}:{config.size}"
  own = ("--protocol=classifier", f"--weights={root / 'judge'}")
  reference = root / "reference.npz"
  yield _train(root, "judge", f"{settings},judge", (f"data.source={config.source}",), weight=10)
  yield Job(
    "reference",
    (
      *("launch.evaluate", "statistics", *own, *_image_size(config)),
      *(f"--reference={config.source}", f"--output={reference}"),
    ),
    ("judge",),
  )
  if config.test_source:
    yield Job(
      "real",
      (
        *(*_evaluate(root, "generation", "real"), *own, *_image_size(config)),
        *(f"--samples={config.test_source}", f"--reference={reference}"),
        "--precision_recall=false",
      ),
      ("reference",),
    )
  names = tokenizers(config)
  count = len(MAIN) * len(config.widths)
  # The experiment as a whole, then one ablation after the other.
  for part in (names[:count], *([name] for name in names[count:])):
    for variant, width in part:
      yield from _tokenizer(config, root, variant, width, names)
    for seed in range(max(len(config.seeds), len(config.ablation_seeds))):
      for variant, width in part:
        if seed < len(seeds_of(config, variant)):
          yield from _diffusion(config, root, variant, width, seeds_of(config, variant)[seed], own)
    for variant, width in part:
      yield from _judged(config, root, f"{variant}/d{width}", own)
  if config.long:
    for variant in MAIN:
      yield from _longer(config, root, variant, max(config.widths), own)


def _tokenizer(
  config: FrozenConfigDict, root: Path, variant: str, width: int, names: list[tuple[str, int]]
) -> Iterator[Job]:
  """A tokenizer and its latents; `names` are all of them."""
  builder = variant if variant in BUILDERS else "aligned"
  first = next(f"tokenizer/{v}/d{w}" for v, w in names if v == builder)
  space = f"{variant}/d{width}"
  name = f"tokenizer/{space}"
  yield _train(
    root,
    name,
    f"--config={_file()}:{config.size},tokenizer,{variant},d{width}",
    (f"data.source={config.source}", f"teacher.cache={root / 'features'}"),
    () if variant.startswith("plain") or name == first else (first,),
    weight=4,
  )
  for kind, more in (("latents", ()), ("held_out", ("--held_out",))):
    words = ("launch.encode", f"--workdir={root / name}", f"--output={root / kind / space}", *more)
    yield Job(f"{kind}/{space}", (*words, "--batch_size=128"), (name,))


def _file() -> str:
  """Of the configuration; relative where it can be, since a checkout may move."""
  return os.path.relpath(dilemma.__file__)


def _diffusion(
  config: FrozenConfigDict, root: Path, variant: str, width: int, seed: int, own: tuple[str, ...]
) -> Iterator[Job]:
  """A diffusion model of one seed and its samples; of the first seed also guided, and a curve."""
  name = f"{variant}/d{width}/seed{seed}"
  yield _train_diffusion(config, root, name, f"diffusion,d{width}", (f"seed={seed}",), weight=5)
  yield _samples(config, root, "samples", name, own)
  if variant in MAIN and seed == config.seeds[0]:
    yield _samples(config, root, "guided", name, own)
    yield _curve(config, root, name, dilemma.diffusion(config.size, width), own)


def _longer(
  config: FrozenConfigDict, root: Path, variant: str, width: int, own: tuple[str, ...]
) -> Iterator[Job]:
  """A diffusion model of more steps."""
  name = f"{variant}/d{width}/{dilemma.LONG}"
  part = f"diffusion,d{width},{dilemma.LONG}"
  yield _train_diffusion(config, root, name, part, (), weight=5 * dilemma.LONGER)
  yield _samples(config, root, "samples", name, own)
  yield _curve(config, root, name, dilemma.diffusion(config.size, width, long=True), own)


def _train_diffusion(
  config: FrozenConfigDict,
  root: Path,
  name: str,
  part: str,
  settings: tuple[str, ...],
  weight: float,
) -> Job:
  space = name.rpartition("/")[0]
  latents = (
    f"latents.path={root / 'latents' / space}",
    f"latents.valid_path={root / 'held_out' / space}",
  )
  return _train(
    root,
    f"diffusion/{name}",
    f"--config={_file()}:{config.size},{part}",
    (*latents, *settings),
    (f"latents/{space}", f"held_out/{space}"),
    weight,
  )


def _samples(
  config: FrozenConfigDict, root: Path, kind: str, name: str, own: tuple[str, ...]
) -> Job:
  """Judged samples of a diffusion model: "samples", or "guided"."""
  scale, weight = (1.0, 2) if kind == "samples" else (config.cfg_scale, 4)
  words = (*_evaluate(root, "generation", f"{kind}/{name}"), *_drawn(root, name, own))
  more = (f"--num_samples={config.num_samples}", f"--cfg_scale={scale}")
  return Job(f"{kind}/{name}", (*words, *more), (f"diffusion/{name}", "reference"), weight)


def _curve(
  config: FrozenConfigDict, root: Path, name: str, trained: ConfigDict, own: tuple[str, ...]
) -> Job:
  """The distance at each step that a diffusion model kept."""
  kept = range(trained.keep_every_steps, trained.num_steps + 1, trained.keep_every_steps)
  words = (*_evaluate(root, "sweep", f"curve/{name}"), *_drawn(root, name, own))
  grid = f"--grid=step={','.join(map(str, kept))}"
  more = (f"--num_samples={config.curve_samples}", "--cfg_scale=1.0")
  return Job(f"curve/{name}", (*words, grid, *more), (f"diffusion/{name}", "reference"), 3)


def _drawn(root: Path, name: str, own: tuple[str, ...]) -> tuple[str, ...]:
  model, reference = f"--workdir={root / 'diffusion' / name}", root / "reference.npz"
  return (*own, model, f"--reference={reference}", "--precision_recall=false")


def _judged(
  config: FrozenConfigDict, root: Path, space: str, own: tuple[str, ...]
) -> Iterator[Job]:
  """What is measured of a tokenizer and its latents."""
  yield Job(
    f"reconstruction/{space}",
    (
      *(*_evaluate(root, "reconstruction", f"reconstruction/{space}"), *own),
      *(f"--workdir={root / 'tokenizer' / space}", "--posterior=mode"),
    ),
    (f"tokenizer/{space}", "judge"),
  )
  yield Job(
    f"uniformity/{space}",
    (
      *(*_evaluate(root, "latents", f"uniformity/{space}"), f"--cells={config.cells}"),
      *(f"--latents={root / 'latents' / space}", f"--runs={config.runs}"),
    ),
    (f"latents/{space}",),
  )


def _train(
  root: Path,
  name: str,
  config: str,
  settings: tuple[str, ...],
  needs: tuple[str, ...] = (),
  weight: float = 1,
) -> Job:
  words = ("launch.train", config, f"--workdir={root / name}")
  return Job(name, (*words, *(f"--config.{setting}" for setting in settings)), needs, weight)


def _evaluate(root: Path, what: str, name: str) -> tuple[str, ...]:
  return ("launch.evaluate", what, f"--output={root / name}")


def _image_size(config: FrozenConfigDict) -> tuple[str, ...]:
  return (f"--image_size={dilemma.judge(config.size).data.image_size}",)


def check(config: FrozenConfigDict) -> None:
  """Raises InputError for what can be seen before the first hour has passed."""
  if unknown := [name for name in config.ablations if name not in dilemma.VARIANTS]:
    raise InputError(
      f"config.ablations names {unknown[0]!r}; there are {', '.join(dilemma.VARIANTS)}."
    )
  if len({*MAIN, *config.ablations}) < len(MAIN) + len(config.ablations):
    raise InputError(f"config.ablations has a name twice, or one of {' and '.join(MAIN)}.")
  if len(set(config.widths)) < 2 or min(config.widths) < 1 or not config.seeds:
    raise InputError("config.widths needs two widths or more, and config.seeds a seed.")
  for spec in (config.source, config.test_source):
    if spec:
      sources.check_readable(sources.open_source(spec))


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
  workdir = Path(FLAGS.workdir).absolute()
  jobs = jobs_of(config, workdir)
  page = Path(FLAGS.page) if FLAGS.page else workdir / "dilemma.md"
  write_page = functools.partial(
    dilemma_page.write, config, workdir, page, dilemma_page.own_command()
  )
  if FLAGS.page_only:
    write_page()
  else:
    check(config)
    workers, cores = _workers()
    console.say(f"{len(jobs)} jobs, {workers} at a time; logs in {workdir / 'logs'}")
    try:
      run(jobs, workdir, workers, cores)
    finally:
      write_page()
  console.table("Dilemma", ("what", "where"), [("page", str(page)), ("workdir", str(workdir))])


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("The settings; configs/dilemma.py:cifar if not given.")
  flags.DEFINE_string("workdir", "runs/dilemma", "Where everything is written.")
  flags.DEFINE_integer("jobs", 0, "At once; 0: one for each core, or one on an accelerator.")
  flags.DEFINE_string("page", "", "The page; dilemma.md in the workdir if not given.")
  flags.DEFINE_boolean("page_only", False, "Run nothing, write the page of what is there.")
  console.run_command(main, config=CONFIG)
