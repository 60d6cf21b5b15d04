"""The jobs of `launch.lab.dilemma`: released commands, one process each, and what they need.

A space is "VARIANT/fPdZ/klW/wD" of configs/lab/dilemma.py, and its first three parts are a
tokenizer. Jobs of a tokenizer are KIND/TOKENIZER/seedT, of a diffusion model KIND/SPACE/seedT.S.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
from configs.lab import dilemma
from launch.engine import configuration
from launch.lab.jobs import Job

SIDE = f"--image_size={dilemma.IMAGE_SIZE}"
_PARTS = {"judge": "judge", "second": "judge,second"}


def jobs_of(config: FrozenConfigDict, workdir: Path) -> list[Job]:
  """All jobs of an experiment (configs/lab/dilemma.py without a part), the important ones first."""
  found = {job.name: job for job in Graph(config, workdir).jobs()}
  return [*found.values()]


def tokenizer_of(space: str) -> str:
  """The part of a space that names its tokenizer."""
  return space.rpartition("/")[0]


class Graph:
  """Makes the jobs; two spaces may share some."""

  def __init__(self, config: FrozenConfigDict, root: Path):
    self.config, self.root = config, root
    self.source = f"data.source={config.source}"
    self.judges = ("judge", "second") if config.second else ("judge",)

  def of_judges(self) -> Iterator[Job]:
    """The classifiers, and the real pictures in their features."""
    config = self.config
    for judge in self.judges:
      yield self._train(judge, _PARTS[judge], config.judge_steps, (self.source,), weight=3)
      words = ["launch.evaluate", "statistics", *self._network(judge), SIDE]
      words += [f"--reference={config.source}", f"--output={self._reference(judge)}"]
      reference = self._reference(judge)
      yield Job(f"reference/{judge}", (*words,), reference, resumes=True, needs=(judge,))
    if config.test_source:
      yield self._judged("generation", "real", (SIDE, f"--samples={config.test_source}"))

  def jobs(self) -> Iterator[Job]:
    """All of them, the important ones first."""
    yield from self.of_judges()
    config = self.config
    for spaces in (config.spaces, config.more_spaces):
      for number, seed in enumerate(config.seeds):
        for first in config.tokenizer_seeds if not number else ():
          for space in spaces:
            yield from self._tokenizer(tokenizer_of(space), first)
        for first in config.tokenizer_seeds:
          for space in spaces:
            yield from self._diffusion(space, first, seed)
        for first in config.tokenizer_seeds if not number else ():
          for space in spaces:
            yield from self._measured(f"{tokenizer_of(space)}/seed{first}")
    for space in (*config.spaces, *config.more_spaces) if config.probe_pictures else ():
      for first in config.tokenizer_seeds:
        yield self._probe(f"{tokenizer_of(space)}/seed{first}")

  def _tokenizer(self, tokenizer: str, seed: int) -> Iterator[Job]:
    """A tokenizer and its latents, of an aligned one after the teacher's features."""
    variant, shape, kl = tokenizer.split("/")
    cache = f"teacher.cache={self.root / 'features'}"
    needs: tuple[str, ...] = ()
    if variant == "aligned":
      # The features are those of all tokenizers with such cells.
      argument = f"{self.config.size},tokenizer,{variant},f{dilemma.shape_of(shape)[0]}d1,kl0"
      name = f"features/{shape.partition('d')[0]}"
      words = ("launch.cached_features", *self._configured(argument, (self.source, cache)))
      yield Job(name, words, self.root / "features", content=content(dilemma.get_config(argument)))
      needs = (name,)
    name = f"{tokenizer}/seed{seed}"
    settings = (self.source, f"seed={seed}", cache)
    part, steps = f"tokenizer,{variant},{shape},{kl}", self.config.tokenizer_steps
    yield self._train(f"tokenizer/{name}", part, steps, settings, needs, weight=2)
    output = self.root / "latents" / name
    trained = f"--workdir={self.root / 'tokenizer' / name}"
    words = ("launch.encode", trained, f"--output={output}", "--batch_size=500")
    yield Job(f"latents/{name}", words, output, resumes=True, needs=(f"tokenizer/{name}",))

  def _diffusion(self, space: str, first: int, seed: int) -> Iterator[Job]:
    """A diffusion model, and figures and sheets of samples after all steps that are wanted."""
    _, shape, _, width = space.split("/")
    latents = f"latents/{tokenizer_of(space)}/seed{first}"
    settings = (f"latents.path={self.root / latents}", f"seed={seed}")
    run, last = f"{space}/seed{first}.{seed}", self.config.steps[-1]
    name, part = f"diffusion/{run}", f"diffusion,{shape},{width}"
    yield self._train(name, part, last, settings, (latents,), weight=3)
    words = (
      f"--workdir={self.root / name}",
      f"--grid=step={','.join(map(str, self.config.steps))}",
      f"--num_samples={self.config.num_samples}",
      *self._sampler(),
    )
    yield self._judged("sweep", f"curve/{run}", words, (name,))

  def _measured(self, name: str) -> Iterator[Job]:
    """The figures of a tokenizer and of its latents, named "TOKENIZER/seedT"."""
    words = [*self._network("judge"), f"--workdir={self.root / 'tokenizer' / name}"]
    needs = (f"tokenizer/{name}", "judge")
    words += ["--posterior=mode"]
    yield self._evaluate("reconstruction", f"reconstruction/{name}", words, needs)
    latents = f"latents/{name}"
    words = [f"--gaussians={self.root / latents}", f"--num_samples={self.config.num_samples}"]
    yield self._judged("generation", f"gaussian/{name}", words, (latents,))
    words = [f"--cells={self.config.cells}", f"--runs={self.config.runs}"]
    words += [f"--latents={self.root / latents}"]
    yield self._evaluate("latents", f"uniformity/{name}", words, (latents,))

  def _probe(self, name: str) -> Job:
    """The quick figures of a tokenizer."""
    words = [*self._network("judge"), f"--reference={self._reference('judge')}"]
    words += [f"--workdir={self.root / 'tokenizer' / name}"]
    words += [f"--num_pictures={self.config.probe_pictures}"]
    return self._evaluate("probe", f"probe/{name}", words, (f"tokenizer/{name}", "reference/judge"))

  def _sampler(self) -> tuple[str, ...]:
    sampler = dilemma.diffusion(self.config.size, "f8d1", "w64").sample
    return f"--method={sampler.method}", f"--num_steps={sampler.num_steps}", "--cfg_scale=1.0"

  def _network(self, judge: str) -> tuple[str, ...]:
    return "--protocol=classifier", f"--weights={self.root / judge}"

  def _reference(self, judge: str) -> Path:
    return self.root / "reference" / f"{judge}.npz"

  def _judged(self, what: str, name: str, words: Sequence[str], needs: tuple[str, ...] = ()) -> Job:
    """An evaluation by all judges."""
    how = [*self._network("judge"), f"--reference={self._reference('judge')}"]
    how += ["--precision_recall=false"]
    if self.config.second:
      how += [f"--second_weights={self.root / 'second'}"]
      how += [f"--second_reference={self._reference('second')}"]
    needs = (*needs, *(f"reference/{judge}" for judge in self.judges))
    return self._evaluate(what, name, [*how, *words], needs)

  def _configured(self, argument: str, settings: Sequence[str]) -> list[str]:
    # The file's name is relative where it can be, since a checkout may move.
    file = os.path.relpath(dilemma.__file__)
    return [f"--config={file}:{argument}", *(f"--config.{setting}" for setting in settings)]

  def _train(
    self,
    name: str,
    part: str,
    steps: int,
    settings: tuple[str, ...],
    needs: tuple[str, ...] = (),
    weight: float = 1,
  ) -> Job:
    argument, output = f"{self.config.size},{part}", self.root / name
    settings = (*settings, f"num_steps={steps}", f"optimizer.decay_steps={steps}")
    words = ["launch.train", *self._configured(argument, settings), f"--workdir={output}"]
    found = content(dilemma.get_config(argument))
    return Job(name, tuple(words), output, True, found, needs, weight)

  def _evaluate(self, what: str, name: str, words: Sequence[str], needs: tuple[str, ...]) -> Job:
    begun = ("launch.evaluate", what, f"--output={self.root / name}")
    # Not with_suffix: a dot in the name is part of it.
    return Job(name, (*begun, *words), self.root / f"{name}.json", needs=needs)


def content(config: ConfigDict) -> str:
  """What a configuration sets of a training, apart from the drawing of samples."""
  usual = dict(configuration.flat(getattr(configs.base, config.task)().to_dict()))
  chosen = {
    key: value
    for key, value in configuration.flat(config.to_dict())
    if value != usual.get(key) and not key.startswith("sample.")
  }
  return json.dumps(chosen, sort_keys=True)
