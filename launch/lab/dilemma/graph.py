"""The jobs of `launch.lab.dilemma`: released commands, one process each, and what they need."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import FrozenConfigDict

import configs.base
from configs.lab import dilemma
from configs.lab.dilemma import MAIN
from launch.engine import configuration
from launch.lab.dilemma.results import seeds_of
from launch.lab.jobs import Job

# Each of these makes a cache of features; other jobs that use it need the first of its kind.
BUILDERS = ("aligned", "other_teacher", "finer_teacher")


def jobs_of(config: FrozenConfigDict, workdir: Path) -> list[Job]:
  """All jobs of an experiment (configs/lab/dilemma.py without a part), the important ones first."""
  return list(_Graph(config, workdir).jobs())


def tokenizers(config: FrozenConfigDict) -> list[tuple[str, int]]:
  """(variant, width) of all tokenizers: the experiment's, then the ablations'."""
  main = [(variant, width) for width in config.widths for variant in MAIN]
  return main + [(variant, max(config.widths)) for variant in config.ablations]


class _Graph:
  """Makes the jobs. A space is "VARIANT/dWIDTH", a run "SPACE/seedN" or "SPACE/long"."""

  def __init__(self, config: FrozenConfigDict, root: Path):
    self.config, self.root = config, root
    self.reference = root / "reference.npz"
    self.network = ("--protocol=classifier", f"--weights={root / 'judge'}")

  def jobs(self) -> Iterator[Job]:
    config = self.config
    yield self._train("judge", "judge", (f"data.source={config.source}",), weight=10)
    image_size = f"--image_size={dilemma.judge(config.size).data.image_size}"
    words = ["launch.evaluate", "statistics", *self.network, image_size]
    words += [f"--reference={config.source}", f"--output={self.reference}"]
    yield Job("reference", tuple(words), self.reference, resumes=True, needs=("judge",))
    if config.test_source:
      words = [*self.network, image_size, f"--samples={config.test_source}"]
      words += [f"--reference={self.reference}", "--precision_recall=false"]
      yield self._evaluate("generation", "real", words, ("reference",))
    names = tokenizers(config)
    count = len(MAIN) * len(config.widths)
    # The experiment as a whole, then one ablation after the other.
    for part in (names[:count], *([name] for name in names[count:])):
      for variant, width in part:
        yield from self._tokenizer(variant, width)
      for i in range(max(len(config.seeds), len(config.ablation_seeds))):
        for variant, width in part:
          if seeds := seeds_of(config, variant)[i : i + 1]:
            yield from self._diffusion(variant, width, seeds[0])
      for variant, width in part:
        yield from self._measured(f"{variant}/d{width}")
    if config.long:
      for variant in MAIN:
        yield from self._diffusion(variant, max(config.widths), None)

  def _tokenizer(self, variant: str, width: int) -> Iterator[Job]:
    """A tokenizer and its latents."""
    builder = variant if variant in BUILDERS else "aligned"
    first = next(f"tokenizer/{v}/d{w}" for v, w in tokenizers(self.config) if v == builder)
    space = f"{variant}/d{width}"
    name = f"tokenizer/{space}"
    settings = (f"data.source={self.config.source}", f"teacher.cache={self.root / 'features'}")
    needs = () if variant.startswith("plain") or name == first else (first,)
    yield self._train(name, f"tokenizer,{variant},d{width}", settings, needs, weight=4)
    for kind, more in (("latents", ()), ("held_out", ("--held_out",))):
      output = self.root / kind / space
      begun = ("launch.encode", f"--workdir={self.root / name}", f"--output={output}")
      words = (*begun, *more, "--batch_size=128")
      yield Job(f"{kind}/{space}", words, output, resumes=True, needs=(name,))

  def _diffusion(self, variant: str, width: int, seed: int | None) -> Iterator[Job]:
    """A diffusion model and its samples; of a first seed also guided samples, and a curve.

    The seed None stands for the model with more steps, which has a curve too.
    """
    size, long = self.config.size, seed is None
    space = f"{variant}/d{width}"
    run = f"{space}/{dilemma.LONG if long else f'seed{seed}'}"
    paths = [f"latents.path={self.root / 'latents' / space}"]
    paths += [f"latents.valid_path={self.root / 'held_out' / space}"]
    yield self._train(
      f"diffusion/{run}",
      f"diffusion,d{width}" + (f",{dilemma.LONG}" if long else ""),
      (*paths, *(() if long else (f"seed={seed}",))),
      (f"latents/{space}", f"held_out/{space}"),
      weight=5 * (dilemma.LONGER if long else 1),
    )
    count = f"--num_samples={self.config.num_samples}"
    yield self._drawn("generation", f"samples/{run}", (count, "--cfg_scale=1.0"), weight=2)
    first = variant in MAIN and seed == self.config.seeds[0]
    if first:
      guided = (count, f"--cfg_scale={self.config.cfg_scale}")
      yield self._drawn("generation", f"guided/{run}", guided, weight=4)
    if first or long:
      trained = dilemma.diffusion(size, width, long)
      kept = range(trained.keep_every_steps, trained.num_steps + 1, trained.keep_every_steps)
      grid = f"--grid=step={','.join(map(str, kept))}"
      words = (grid, f"--num_samples={self.config.curve_samples}", "--cfg_scale=1.0")
      yield self._drawn("sweep", f"curve/{run}", words, weight=3)

  def _drawn(self, what: str, name: str, words: Sequence[str], weight: float) -> Job:
    """An evaluation of samples that a diffusion model draws; the name is "KIND/RUN"."""
    run = name.partition("/")[2]
    sampler = dilemma.diffusion(self.config.size, 1).sample
    how = (
      *self.network,
      f"--workdir={self.root / 'diffusion' / run}",
      f"--reference={self.reference}",
      "--precision_recall=false",
      f"--method={sampler.method}",
      f"--num_steps={sampler.num_steps}",
    )
    return self._evaluate(what, name, (*how, *words), (f"diffusion/{run}", "reference"), weight)

  def _measured(self, space: str) -> Iterator[Job]:
    """The figures of a tokenizer and of its latents."""
    words = [*self.network, f"--workdir={self.root / 'tokenizer' / space}", "--posterior=mode"]
    needs = (f"tokenizer/{space}", "judge")
    yield self._evaluate("reconstruction", f"reconstruction/{space}", words, needs)
    words = [f"--cells={self.config.cells}", f"--runs={self.config.runs}"]
    words += [f"--latents={self.root / 'latents' / space}"]
    yield self._evaluate("latents", f"uniformity/{space}", words, (f"latents/{space}",))

  def _train(
    self,
    name: str,
    part: str,
    settings: tuple[str, ...],
    needs: tuple[str, ...] = (),
    weight: float = 1,
  ) -> Job:
    argument, output = f"{self.config.size},{part}", self.root / name
    # The file's name is relative where it can be, since a checkout may move.
    words = ["launch.train", f"--config={os.path.relpath(dilemma.__file__)}:{argument}"]
    words += [f"--workdir={output}", *(f"--config.{setting}" for setting in settings)]
    return Job(name, tuple(words), output, True, _content(argument), needs, weight)

  def _evaluate(
    self, what: str, name: str, words: Sequence[str], needs: tuple[str, ...], weight: float = 1
  ) -> Job:
    begun = ("launch.evaluate", what, f"--output={self.root / name}")
    # Not with_suffix: a dot in the name is part of it.
    return Job(name, (*begun, *words), self.root / f"{name}.json", needs=needs, weight=weight)


def _content(argument: str) -> str:
  """What configs/lab/dilemma.py sets of a training, apart from the drawing of samples."""
  config = dilemma.get_config(argument)
  usual = dict(configuration.flat(getattr(configs.base, config.task)().to_dict()))
  chosen = {
    key: value
    for key, value in configuration.flat(config.to_dict())
    if value != usual.get(key) and not key.startswith("sample.")
  }
  return json.dumps(chosen, sort_keys=True)
