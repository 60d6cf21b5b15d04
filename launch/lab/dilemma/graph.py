"""The jobs of `launch.lab.dilemma`: released commands, one process each, and what they need."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
from configs.lab import dilemma
from launch.engine import configuration
from launch.lab.dilemma.results import MAIN
from launch.lab.jobs import Job

# Jobs that use a cache which another job makes need it first.
BUILDERS = ("aligned", "other_teacher", "finer_teacher")


def jobs_of(config: FrozenConfigDict, workdir: Path) -> list[Job]:
  """All jobs of an experiment, in the order of their importance.

  Args:
    config: from `configs/lab/dilemma.py`, without a part.
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
    reference,
    resumes=True,
    needs=("judge",),
  )
  if config.test_source:
    yield _evaluate(
      root,
      "generation",
      "real",
      *(*own, *_image_size(config)),
      *(f"--samples={config.test_source}", f"--reference={reference}"),
      "--precision_recall=false",
      needs=("reference",),
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
    output = root / kind / space
    words = ("launch.encode", f"--workdir={root / name}", f"--output={output}", *more)
    yield Job(f"{kind}/{space}", (*words, "--batch_size=128"), output, resumes=True, needs=(name,))


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
  return _evaluate(
    root,
    "generation",
    f"{kind}/{name}",
    *_drawn(config, root, name, own),
    *(f"--num_samples={config.num_samples}", f"--cfg_scale={scale}"),
    needs=(f"diffusion/{name}", "reference"),
    weight=weight,
  )


def _curve(
  config: FrozenConfigDict, root: Path, name: str, trained: ConfigDict, own: tuple[str, ...]
) -> Job:
  """The distance at each step that a diffusion model kept."""
  kept = range(trained.keep_every_steps, trained.num_steps + 1, trained.keep_every_steps)
  return _evaluate(
    root,
    "sweep",
    f"curve/{name}",
    *_drawn(config, root, name, own),
    f"--grid=step={','.join(map(str, kept))}",
    *(f"--num_samples={config.curve_samples}", "--cfg_scale=1.0"),
    needs=(f"diffusion/{name}", "reference"),
    weight=3,
  )


def _drawn(
  config: FrozenConfigDict, root: Path, name: str, own: tuple[str, ...]
) -> tuple[str, ...]:
  """Who draws, how, and what samples are held against."""
  sampler = dilemma.diffusion(config.size, 1).sample
  return (
    *own,
    f"--workdir={root / 'diffusion' / name}",
    f"--reference={root / 'reference.npz'}",
    "--precision_recall=false",
    f"--method={sampler.method}",
    f"--num_steps={sampler.num_steps}",
  )


def _judged(
  config: FrozenConfigDict, root: Path, space: str, own: tuple[str, ...]
) -> Iterator[Job]:
  """What is measured of a tokenizer and its latents."""
  yield _evaluate(
    root,
    "reconstruction",
    f"reconstruction/{space}",
    *(*own, f"--workdir={root / 'tokenizer' / space}", "--posterior=mode"),
    needs=(f"tokenizer/{space}", "judge"),
  )
  yield _evaluate(
    root,
    "latents",
    f"uniformity/{space}",
    *(f"--cells={config.cells}", f"--runs={config.runs}"),
    f"--latents={root / 'latents' / space}",
    needs=(f"latents/{space}",),
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
  return Job(
    name,
    (*words, *(f"--config.{setting}" for setting in settings)),
    root / name,
    resumes=True,
    content=_chosen(config.partition(":")[2]),
    needs=needs,
    weight=weight,
  )


def _chosen(argument: str) -> str:
  """What configs/lab/dilemma.py sets of a training, but for how samples are drawn of it."""
  config = dilemma.get_config(argument)
  usual = dict(configuration.flat(getattr(configs.base, config.task)().to_dict()))
  chosen = {
    key: value
    for key, value in configuration.flat(config.to_dict())
    if value != usual.get(key) and not key.startswith("sample.")
  }
  return json.dumps(chosen, sort_keys=True)


def _evaluate(
  root: Path,
  what: str,
  name: str,
  *words: str,
  needs: tuple[str, ...] = (),
  weight: float = 1,
) -> Job:
  begun = ("launch.evaluate", what, f"--output={root / name}")
  # The name may have a dot, which is no suffix.
  return Job(name, (*begun, *words), root / f"{name}.json", needs=needs, weight=weight)


def _image_size(config: FrozenConfigDict) -> tuple[str, ...]:
  return (f"--image_size={dilemma.judge(config.size).data.image_size}",)
