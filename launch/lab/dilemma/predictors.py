"""Which quick figures of a tokenizer predict how its latents generate after long runs."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from launch.evaluation.figures import PARTS
from launch.lab.dilemma import graph
from launch.lab.dilemma.results import Results
from launch.lab.markdown import table

LEAST = 4  # tokenizers


class Correlation(NamedTuple):
  """Spearman's rank correlation of a quick figure with the distance of long runs."""

  figure: str
  rho: float  # 1 or -1 where the figure orders tokenizers as the distance does, or the other way
  p: float  # two-sided: how often chance alone gives one as large
  tokenizers: int


def correlations(
  figures: dict[str, dict[str, float]], distances: dict[str, float]
) -> list[Correlation]:
  """Of each figure that `LEAST` tokenizers have, the strongest first; both are by tokenizer.

  A figure that is the same for all of them has none.
  """
  from scipy.stats import spearmanr  # which takes a second to import

  found = []
  names = dict.fromkeys(name for values in figures.values() for name in values)
  for name in names:
    if name.endswith((*PARTS,)):
      continue
    pairs = [
      (values[name], distances[tokenizer])
      for tokenizer, values in figures.items()
      if name in values and tokenizer in distances
    ]
    if len(pairs) >= LEAST and len({x for x, _ in pairs}) > 1:
      rho, p = spearmanr(*zip(*pairs, strict=True))
      found.append(Correlation(name, float(rho), float(p), len(pairs)))
  return sorted(found, key=lambda x: -abs(x.rho))


def section(found: Results) -> list[str]:
  """The part of the page; empty before enough probes and long runs are done."""
  config = found.config
  spaces = [*config.spaces, *config.more_spaces]
  # A wider model generates better whatever the tokenizer, so models are of one width.
  width = Counter(space.rpartition("/")[2] for space in spaces).most_common(1)[0][0]
  figures: dict[str, dict[str, float]] = {}
  distances: dict[str, float] = {}
  seconds = []
  for space in spaces:
    for first in config.tokenizer_seeds:
      name = f"{graph.tokenizer_of(space)}/seed{first}"
      if probed := found.read(f"probe/{name}"):
        figures[name] = probed["figures"]
        seconds.append(probed["seconds"])
      runs = [found.read(f"curve/{space}/seed{first}.{seed}") for seed in config.seeds]
      lasts = [run["points"][-1][found.key] for run in runs if run]
      if lasts and space.endswith(f"/{width}"):
        distances[name] = float(np.mean(lasts))
  rows = [
    (f"`{x.figure}`", f"{x.rho:+.2f}", f"{x.p:.1g}", str(x.tokenizers))
    for x in correlations(figures, distances)
  ]
  if not rows:
    return []
  return [
    f"Which quick figures predict {found.name} after {config.steps[-1]:,} steps? Each tokenizer, "
    "with each of its seeds, counts by the mean over its diffusion models, of width "
    f"{width.removeprefix('w')}. A probe took {np.median(seconds) / 60:.1f} minutes (median).",
    "",
    *table(("quick figure", "Spearman's rank correlation", "p", "tokenizers"), rows),
    "",
  ]
