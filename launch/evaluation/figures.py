"""The table of figures: name, how it is shown, which direction is better, function.

A new figure is one entry of `FIGURES`. Its function takes what its evaluation has gathered and
returns a number, or None where it was not asked for or cannot be computed.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from launch.engine import console
from launch.evaluation.features import SECOND, Network
from launch.evaluation.reference import CLASS, MOST_KEPT, Reference, gaussian_of
from launch.evaluation.statistics import Statistics
from launch.report.html import Figure
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import confidence
from vavae_jax.metrics.distribution import Frechet, PrecisionRecall, precision_recall
from vavae_jax.metrics.uniformity import Uniformity

NEIGHBOURS = 3  # k of precision and recall
GAUSSIAN = "gaussian_"  # before figures of a Gaussian for each class, of a probe
# The parts of a distance by how their names end; JSON files have them, tables do not.
PARTS = {"_means": "means", "_covariances": "covariances"}


class Options(NamedTuple):
  """What is computed beside the distances."""

  precision_recall: bool = True  # needs the features of all pictures in memory, 8 kB each
  bootstrap: int = 0  # resamples for a confidence interval; 0: none
  infinity: bool = False  # extrapolate to infinitely many samples

  @property
  def keep(self) -> bool:
    """Whether the samples' features are kept."""
    return self.precision_recall or self.bootstrap > 0 or self.infinity


@dataclasses.dataclass(frozen=True)
class Generated:
  """Samples and real pictures in the features of one network."""

  samples: Statistics
  reference: Reference
  network: Network
  options: Options
  # (label of each sample, names of the classes), both empty where nobody knows them.
  classes: tuple[Sequence[int] | np.ndarray, Sequence[str]] = ((), ())

  @functools.cached_property
  def pool(self) -> Frechet:
    """The distance in the pooled features."""
    moments = self.samples.moments["pool"]
    return self.reference.gaussian.distance(moments.mean, moments.cov)

  @functools.cached_property
  def spatial(self) -> Frechet | None:
    """The distance in sFID's features; None where one side has none."""
    moments = self.samples.moments.get("spatial")
    if moments is None or self.reference.spatial is None:
      return None
    return self.reference.spatial.distance(moments.mean, moments.cov)

  @functools.cached_property
  def shares(self) -> PrecisionRecall | None:
    """Precision and recall."""
    real = self.reference.features
    if not self.options.precision_recall or real is None or not self.samples.has("pool"):
      return None
    drawn = self.samples.column("pool")
    if len(real) <= NEIGHBOURS:
      raise InputError(f"The reference has {len(real)} pictures; give more.")
    console.say(f"precision and recall of {len(drawn)} and {len(real)} features ...")
    return precision_recall(real, drawn, NEIGHBOURS)

  @functools.cached_property
  def class_accuracy(self) -> float | None:
    """The share of samples that a classifier finds to be of the class of their label."""
    labels = np.asarray(self.classes[0])
    if not self.samples.has(CLASS) or not len(labels) or self._other_classes:
      return None
    return float(np.mean(self.samples.column(CLASS) == labels))

  @functools.cached_property
  def _other_classes(self) -> str:
    """What keeps labels and a classifier from being compared; "" if nothing does."""
    labels, names = self.classes
    known = self.network.sizes.get("scores", 0)
    highest = max(labels, default=0)
    if not known or (highest < known and len(names) in (0, known)):
      return ""
    count = len(names) or highest + 1
    return f"no class accuracy: the samples have labels of {count} classes, the judge of {known}"

  @functools.cached_property
  def infinity(self) -> confidence.Infinity | None:
    """The distance of infinitely many samples."""
    if not self.options.infinity:
      return None
    subsets = confidence.subset_distances(self.samples.column("pool"), self.reference.gaussian)
    return confidence.extrapolated(list(console.tracked(subsets, "subsets", confidence.POINTS)))

  def more(self) -> dict[str, Any]:
    """What a JSON file says beside the figures: rounding of the distances, warnings, confidence."""
    key, options, pool = self.network.key, self.options, self.samples.moments["pool"]
    both = {key: self.pool, f"s{key}": self.spatial}
    negative = {name: x.negative for name, x in both.items() if x}
    counts = {"samples": pool.count, "reference": self.reference.count}
    warnings = rank_warnings(counts, self.network)
    if options.precision_recall and self.reference.features is None:
      why = f"the reference has statistics alone, or more than {MOST_KEPT:,} pictures"
      warnings.insert(0, f"no precision and recall: {why}")
    if self._other_classes:
      warnings.insert(0, self._other_classes)
    more: dict[str, Any] = {"negative_eigenvalues": negative, "warnings": warnings}
    if options.bootstrap:
      features = self.samples.column("pool")
      draws = confidence.resampled(features, self.reference.gaussian, options.bootstrap)
      resamples = list(console.tracked(draws, "bootstrap", options.bootstrap))
      interval = confidence.interval(self.pool.distance, resamples)
      more["confidence"] = {key: interval._asdict() | {"resamples": options.bootstrap}}
    if self.infinity:
      more["infinity"] = self.infinity._asdict()
    return more


class Second(NamedTuple):
  """A second judge of the same samples, and real pictures in its features."""

  network: Network
  reference: Reference

  @property
  def about(self) -> dict[str, Any]:
    """For a JSON file."""
    return {"network": self.network.about, "reference": self.reference.about}


def generated(
  found: Statistics,
  reference: Reference,
  network: Network,
  options: Options,
  classes: tuple[np.ndarray, Sequence[str]],
  second: Second | None,
) -> tuple[dict[str, float], dict[str, Any]]:
  """(figures of samples, what a JSON file says beside them), from statistics by `both` networks.

  `SECOND` stands before the names of the second judge's figures.
  """
  gathered = Generated(found, reference, network, options, classes)
  values, more = compute("generation", gathered), gathered.more()
  if second:
    plain = Options(precision_recall=False)
    other = Generated(found.named(SECOND), second.reference, second.network, plain, classes)
    values |= {SECOND + k: x for k, x in compute("generation", other).items()}
    noted = other.more()
    warnings = noted.pop("warnings")
    more["warnings"] += [text for text in warnings if text not in more["warnings"]]
    more["second"] = noted | second.about
  return values, more


@dataclasses.dataclass(frozen=True)
class Rebuilt:
  """Pictures and their reconstructions."""

  statistics: Statistics  # columns "psnr", ...; moments "original" and "rebuilt" of the network
  network: Network | None

  def mean(self, name: str) -> float | None:
    """The mean of a column over the pictures where it is finite."""
    if not self.statistics.has(name):
      return None
    column = self.statistics.column(name)
    finite = column[np.isfinite(column)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else None

  @functools.cached_property
  def distance(self) -> Frechet | None:
    """The distance between the features of originals and reconstructions."""
    if not self.network:
      return None
    rebuilt = self.statistics.moments["rebuilt"]
    return gaussian_of(self.statistics, "original").distance(rebuilt.mean, rebuilt.cov)


class LatentSpace(NamedTuple):
  """Cells of a latent space."""

  runs: list[Uniformity]  # of each t-SNE
  eigenvalues: np.ndarray  # of the channels' covariance [Z], descending
  correlation: np.ndarray  # of the channels [Z,Z]
  from_normal: float  # energy distance from the standard normal distribution
  network: None = None

  def mean(self, name: str) -> float:
    """The mean of a figure of uniformity over the runs."""
    return float(np.mean([getattr(run, name) for run in self.runs]))


class Entry(NamedTuple):
  """A figure; {distance} in its names is the network's for its Frechet distance, as in "fid"."""

  key: str  # its name in JSON
  label: str  # its name for people
  better: str  # which direction is, "higher", "lower" or ""
  compute: Callable[[Any], float | None]  # from what was gathered
  unit: str = ""


def _distance(prefix: str, find: Callable[[Any], Frechet | None]) -> tuple[Entry, ...]:
  """A Frechet distance and its parts, of whatever `find` makes of what was gathered."""

  def part(name: str) -> Callable[[Any], float | None]:
    return lambda gathered: (found := find(gathered)) and getattr(found, name)

  key = f"{prefix}{{distance}}"
  names = {"": "distance", **PARTS}
  return tuple(Entry(key + end, key, "lower", part(name)) for end, name in names.items())


FIGURES: dict[str, tuple[Entry, ...]] = {
  "generation": (
    *_distance("", lambda g: g.pool),
    *_distance("s", lambda g: g.spatial),
    Entry("inception_score", "Inception score", "higher", lambda g: g.samples.inception_score()),
    Entry("class_accuracy", "Class accuracy", "higher", lambda g: g.class_accuracy),
    Entry("precision", "Precision", "higher", lambda g: g.shares and g.shares.precision),
    Entry("recall", "Recall", "higher", lambda g: g.shares and g.shares.recall),
    Entry(
      "{distance}_infinity",
      "{distance} (infinitely many samples)",
      "lower",
      lambda g: g.infinity and g.infinity.distance,
    ),
  ),
  "reconstruction": (
    *_distance("r", lambda g: g.distance),
    Entry("psnr", "PSNR", "higher", lambda g: g.mean("psnr"), "dB"),
    Entry("ssim", "SSIM", "higher", lambda g: g.mean("ssim")),
    Entry("lpips", "LPIPS", "lower", lambda g: g.mean("lpips")),
  ),
  "latents": (
    Entry("density_cv", "Density CV", "lower", lambda g: g.mean("density_cv")),
    Entry("gini", "Gini", "lower", lambda g: g.mean("gini")),
    Entry(
      "normalized_entropy",
      "Normalised entropy",
      "higher",
      lambda g: g.mean("normalized_entropy"),
    ),
    Entry(
      "effective_dimensions",
      "Effective dimensions",
      "",
      lambda g: float(g.eigenvalues.sum() ** 2 / np.square(g.eigenvalues).sum()),
    ),
    Entry(
      "largest_correlation",
      "Largest correlation of two channels",
      "",
      lambda g: float(np.abs(g.correlation - np.eye(len(g.correlation))).max()),
    ),
    Entry("energy_from_normal", "Energy distance from normal", "", lambda g: g.from_normal),
  ),
  # Of a dictionary that has them already.
  "probe": tuple(
    Entry(key, label, better, operator.itemgetter(key))
    for key, label, better in (
      ("loss", "Loss of the small model", "lower"),
      ("fd_latents", "Distance of its latents", "lower"),
      (f"{GAUSSIAN}fd_latents", "Distance of the Gaussians' latents", "lower"),
      ("linear_accuracy", "Accuracy of a linear classifier", "higher"),
      ("linear_in_pixels", "Share linear in the pixels", ""),
    )
  ),
}


def compute(kind: str, gathered: Generated | Rebuilt | LatentSpace) -> dict[str, float]:
  """All figures of an evaluation by their names in JSON."""
  key = gathered.network.key if gathered.network else ""
  found = {each.key.format(distance=key): each.compute(gathered) for each in FIGURES[kind]}
  return {name: value for name, value in found.items() if value is not None}


def shown(
  kind: str,
  figures: Mapping[str, float],
  network: Network | None,
  note: str,
  notes: Mapping[str, str] | None = None,
  units: Mapping[str, str] | None = None,
) -> list[Figure]:
  """The figures of an evaluation, a key of `FIGURES`, as the console and pages show them.

  `figures` are by their names in JSON, of which parts and those not in the table are left out;
  `note` is about every figure; `notes` and `units` are those of single ones, by name.
  """
  key, name = (network.key, network.distance) if network else ("", "")
  rows = []
  for each in FIGURES[kind]:
    full = each.key.format(distance=key)
    if full in figures and not full.endswith((*PARTS,)):
      about = ", ".join(filter(None, [note, (notes or {}).get(full)]))
      label = each.label.format(distance=name)
      unit = (units or {}).get(full, each.unit)
      rows.append(Figure(label, figures[full], unit, about, each.better))
  return rows


def shown_of(
  values: Mapping[str, float],
  network: Network,
  second: Second | None,
  note: str,
  notes: Mapping[str, str] | None = None,
) -> list[Figure]:
  """The figures of `generated` as `shown`, the second judge's last."""
  rows = shown("generation", values, network, note, notes)
  if second:
    other = {k.removeprefix(SECOND): x for k, x in values.items() if k.startswith(SECOND)}
    rows += shown("generation", other, second.network, f"{note}, by the second judge")
  return rows


def shown_of_probe(values: Mapping[str, float], network: Network | None, note: str) -> list[Figure]:
  """The figures of a probe as `shown`, the Gaussians' last."""
  rows = shown("probe", values, None, note) + shown("latents", values, None, note)
  if network:
    of_gaussians = {
      k.removeprefix(GAUSSIAN): x for k, x in values.items() if k.startswith(GAUSSIAN)
    }
    rows += shown("generation", values, network, note)
    found = shown("generation", of_gaussians, network, f"{note} of a Gaussian for each class")
    rows += [dataclasses.replace(each, name=f"{each.name}, Gaussians") for each in found]
  return rows


def rank_warnings(counts: Mapping[str, int | None], network: Network) -> list[str]:
  """Warnings about sets that have fewer pictures than there are features."""
  size = network.sizes["pool"]
  return [
    f"{count} {name} are fewer than the {size} features: their covariance has not full "
    f"rank, and {network.distance} compares with no other number of pictures"
    for name, count in counts.items()
    if count is not None and count <= size
  ]
