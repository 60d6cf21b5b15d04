r"""What the options of docs/beyond.md are worth at small size: a row for each, beside the baseline.

  python -m launch.lab.beyond --config=configs/lab/beyond.py:cifar --workdir=runs/dilemma \
    --config.source=zip:cifar10_train.zip --config.test_source=zip:cifar10_test.zip

trains and evaluates everything, or the rest of it, and writes the page; in the workdir of
launch.lab.dilemma it takes the judges and latents that are there. About 9 hours of two cores, by
counting operations. The baseline alone:

  python -m launch.train --config=configs/lab/beyond.py:cifar,diffusion --workdir=DIR \
    --config.latents.path=LATENTS

Arguments, joined by commas: cifar, tiny (emoji, a smoke test) or gpu (a larger model, longer); for
the baseline, diffusion and, as in config.tokenizer, the shape of its latents.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs.lab import dilemma

NONE: Mapping[str, Any] = MappingProxyType({})
SIZES = ("cifar", "tiny", "gpu")
BASELINE = "baseline"


class Row(NamedTuple):
  """What an option changes. Rows with the same changes to trainings sample the same models."""

  training: Mapping[str, Any] = NONE  # keys of the diffusion model's configuration
  tokenizer: Mapping[str, Any] = NONE  # keys of the tokenizer's
  sampling: Mapping[str, Any] = NONE  # keys of `config.sample`
  guide: bool = False  # autoguidance by the first checkpoint that the same training keeps
  longer: float = 1.0  # times as many steps: for steps that cost less, to have equal time
  refines: bool = False  # begins with the last weights of the baseline, and is judged at its end
  control: bool = False  # shown beside the options, never combined with them


_TREAD = {"route.share": 0.5, "route.first": 1, "route.last": -2}
_MAP = {
  "model.dmf_depth": 4,
  "transport.use_cosine_loss": False,
  "optimizer.learning_rate": 2e-4,
}
# Guidance acts on all channels; scales are usual ones and have not been tuned for these models.
ROWS: dict[str, Row] = {
  BASELINE: Row(control=True),
  "guidance": Row(sampling={"cfg_scale": 1.5, "cfg_interval_start": 0.1}, control=True),
  "autoguidance": Row(sampling={"cfg_scale": 1.5, "cfg_interval_start": 0.1}, guide=True),
  "internal_guidance": Row({"model.early_head": 2}, sampling={"internal_scale": 1.4}),
  "muon": Row({"optimizer.muon": True}),
  "tread": Row(_TREAD, longer=1.5),
  "tread_guided": Row(
    _TREAD,
    sampling={"cfg_scale": 1.5, "cfg_interval_start": 0.0, "routed": 0.3, "guide_routed": 0.7},
    longer=1.5,
  ),
  # The one of the scales that latents of 2 x 2 cells have, too.
  "eqvae": Row(tokenizer={"equivariance.share": 0.5, "equivariance.scales": (0.5,)}),
  **{
    f"{name}_{steps}_step{'s' if steps > 1 else ''}": row._replace(
      sampling={"method": method, "num_steps": steps + 1}, control=True
    )
    for name, method, row in (
      ("flow", "euler", Row()),
      ("map", "map", Row(_MAP, longer=0.25, refines=True)),
    )
    for steps in (1, 4)
  },
}


def get_config(argument: str = "cifar") -> ConfigDict:
  """The experiment, or the baseline's diffusion model."""
  size, *words = argument.split(",")
  if size not in SIZES or not re.fullmatch(r"|diffusion(,f\d+d\d+)?", ",".join(words)):
    raise ValueError(
      f"{argument!r} is none of {', '.join(SIZES)}, nor one with ',diffusion' or ',diffusion,fPdZ'."
    )
  return diffusion(size, *words[1:]) if words else experiment(size)


def diffusion(size: str, shape: str = "f8d16") -> ConfigDict:
  """LightningDiT of 6 million parameters on latents of the `shape` "fPdZ", at a constant rate, so
  that every checkpoint is the end of a training.
  """
  config = dilemma.diffusion(_pictures(size), shape, "w224")
  config.model.update(depth=6, num_heads=4, scan_unroll=6)
  config.update(save_every_steps=375, keep_every_steps=375, log_every_steps=75)
  config.optimizer.update(decay_steps=0, learning_rate=1e-3)
  config.sample.update(cfg_channels=0)
  if size == "gpu":
    config.model.update(hidden_size=384, depth=12, num_heads=6, scan_unroll=12)
    config.update(batch_size=256, dtype="bfloat16", save_every_steps=12_500)
    config.update(keep_every_steps=12_500, log_every_steps=100)
  if size == "tiny":
    config.model.update(hidden_size=32, depth=5, num_heads=2, scan_unroll=5)
    config.update(save_every_steps=1, keep_every_steps=1, log_every_steps=1)
  return config


def experiment(size: str = "cifar") -> ConfigDict:
  """The judges and the tokenizer of launch.lab.dilemma, a baseline, and the rows."""
  pictures = dilemma.experiment(_pictures(size))
  names = ("source", "test_source", "judge_steps", "tokenizer_steps", "second")
  config = ConfigDict({name: pictures[name] for name in names})
  config.size = size
  config.tokenizer = "plain/f8d16/kl1e-6"  # as in configs/lab/dilemma.py
  config.rows = tuple(ROWS)
  config.combined = True  # whether a last row has all options that win by themselves
  config.seeds = (0, 1)
  config.steps = (750, 1_500, 2_250, 3_000)  # after which samples are drawn
  config.num_samples = 5_000
  if size == "gpu":
    config.update(steps=(25_000, 50_000, 75_000, 100_000), num_samples=10_000)
  if size == "tiny":
    config.update(steps=(2, 4), num_samples=60, seeds=(0,))
  return config


def _pictures(size: str) -> str:
  """The size of launch.lab.dilemma with the same pictures, judges and tokenizers."""
  return "tiny" if size == "tiny" else "cifar"
