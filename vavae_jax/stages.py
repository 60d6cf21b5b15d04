"""The stages of a tokenizer's training: which losses are on from which step; reference README.

The published tokenizer was trained three times over, each time from the weights before: aligned
strongly, then weakly, then with margins. Here the stages are columns of `config.stages` and one
training crosses them; its optimizers go on, whose moments are ten steps long.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import ConfigDict, FrozenConfigDict

from vavae_jax import equivariance
from vavae_jax.common.errors import InputError
from vavae_jax.equivariance import Size

COLUMNS = ("vf_weight", "cos_margin", "distmat_margin", "disc_start")


class Phase(NamedTuple):
  """What is static about one step: the stage's index, whether the discriminator judges it, and the
  size of what is decoded.
  """

  stage: int
  gan: bool
  size: Size = Size()


Sizes = Sequence[tuple[int, int]]  # of batches: (after how many steps, size from there on)


def with_steps(
  config: FrozenConfigDict, num_images: int, sizes: Sizes | None = None
) -> FrozenConfigDict:
  """The configuration with `stages.epochs` turned into steps, for so many images an epoch.

  A stage has its images also where batches were of several `sizes`; None: of the one there is. It
  gains `stages.begins`, the steps before each stage, and `num_steps`, if that is 0. InputError
  for columns of different lengths, no stage, or no step.
  """
  stages = config.stages
  if wrong := [name for name in COLUMNS if len(stages[name]) != len(stages.epochs)]:
    raise InputError(
      f"config.stages.epochs has {len(stages.epochs)} stages, but config.stages."
      f"{wrong[0]} has {len(stages[wrong[0]])} values; give every stage one."
    )
  if not stages.epochs:
    raise InputError("config.stages.epochs is (); give one stage at least.")
  sizes = sizes or [(0, config.batch_size)]
  ends = [_steps(e * num_images, sizes) for e in itertools.accumulate(stages.epochs)]
  resolved = ConfigDict(config.to_dict())  # ConfigDict(config) would share its parts
  resolved.stages.begins = (0, *ends[:-1])
  resolved.num_steps = config.num_steps or ends[-1]
  if not resolved.num_steps:
    raise InputError(
      "config.num_steps is 0, which takes the epochs of config.stages, but these are "
      f"{stages.epochs}; set one of the two."
    )
  return FrozenConfigDict(resolved)


def _steps(images: float, sizes: Sizes) -> int:
  """How many steps take so many images."""
  for (begin, size), (end, _) in itertools.pairwise(sizes):
    if images <= (end - begin) * size:
      return begin + round(images / size)
    images -= (end - begin) * size
  begin, size = sizes[-1]
  return begin + round(images / size)


def phase_of(config: FrozenConfigDict, step: int) -> Phase:
  """The phase of the update that makes `step`.

  The GAN starts `disc_start` batches after its stage does. DEVIATION: in the reference, whose count
  goes up by two a batch and whose published starts are odd, the generator feels it one batch later.
  """
  begins = config.stages.begins or (0,)
  stage = max(i for i, begin in enumerate(begins) if begin < step or i == 0)
  started = step - begins[stage] > config.stages.disc_start[stage]
  size = equivariance.drawn(config, step)
  return Phase(stage, config.loss.disc_weight > 0 and started, size)
