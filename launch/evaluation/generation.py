"""Samples against real pictures: FID, sFID, inception score, precision, recall."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from launch.engine import console
from launch.engine.writers import curve, read_metrics
from launch.evaluation.features import Network
from launch.evaluation.output import Output
from launch.evaluation.pictures import (
  PictureSet,
  describe,
  has_pictures,
  open_pictures,
  stored_statistics,
  take,
)
from launch.evaluation.sample_files import contact_sheet
from launch.evaluation.statistics import Part, Statistics, compute
from launch.report.charts import Curve, training_section
from launch.report.html import (
  Figure,
  Section,
  details,
  figures_table,
  picture_pairs,
  picture_rows,
)
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import confidence
from vavae_jax.metrics.distribution import Gaussian, precision_recall

T = TypeVar("T")
NEIGHBOURS = 3  # k of precision and recall
MOST_KEPT = 100_000  # pictures of which precision and recall are computed, on the host
SHOWN, SHOWN_NEIGHBOURS, COLUMNS = 80, 12, 10


class Options(NamedTuple):
  """What is computed beside the distances.

  Attributes:
    precision_recall: needs the features of all pictures in memory, 8 kB each.
    bootstrap: resamples for a confidence interval; 0: none.
    infinity: extrapolate to infinitely many samples.
  """

  precision_recall: bool = True
  bootstrap: int = 0
  infinity: bool = False

  @property
  def keep(self) -> bool:
    """Whether the samples' features are kept."""
    return self.precision_recall or self.bootstrap > 0 or self.infinity


@dataclasses.dataclass
class Reference:
  """Real pictures, or what was computed of them before.

  Attributes:
    about: what they are.
    gaussian: of their features.
    count: pictures; None where nobody noted it.
    spatial: of sFID's features, or None.
    features: [N,F], or None.
    pictures: or None.
  """

  about: dict[str, Any]
  gaussian: Gaussian
  count: int | None = None
  spatial: Gaussian | None = None
  features: np.ndarray | None = None
  pictures: PictureSet | None = None


def statistics_of(
  pictures: PictureSet,
  network: Network,
  name: str,
  *,
  keep: bool = False,
  progress: Path | None = None,
) -> Statistics:
  """Statistics "pool" and, of Inception, "spatial" and probabilities; "pool" as column if `keep`.

  Args:
    pictures: at least two.
    network: whose features.
    name: what they are.
    keep: the features themselves.
    progress: see `compute`.

  Returns:
    The statistics.
  """
  if len(pictures) < 2:
    raise InputError(f"The {name} are {len(pictures)}; a covariance needs at least 2.")
  return compute(
    pictures,
    compiled(network, keep),
    network.params,
    name=name,
    about=[network.about, keep],
    progress=progress,
  )


def feature_options() -> dict[str, str]:
  """What the compiler of a feature network is told."""
  # XLA's newer kernels for a CPU take 1.5 times as long for Inception's convolutions.
  return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}


@functools.cache
def compiled(network: Network, keep: bool) -> Callable[[Any, dict[str, jax.Array]], Part]:
  """A jitted function for `compute`."""

  @functools.partial(jax.jit, compiler_options=feature_options())
  def run(params: Any, batch: dict[str, jax.Array]) -> Part:
    found = network.apply(params, batch["image"])
    moments = {name: x for name, x in found.items() if name != "probabilities"}
    return Part(moments, found.get("probabilities"), {"pool": found["pool"]} if keep else {})

  return run


def gaussian_of(statistics: Statistics, name: str = "pool") -> Gaussian:
  """The Gaussian of one of the features; InputError where they have none."""
  moments = statistics.moments[name]
  try:
    return Gaussian(moments.mean, moments.cov)
  except ValueError as error:
    raise InputError(f"The features {name} have no Gaussian: {error}") from error


def reference_of(
  pictures: PictureSet, network: Network, *, keep: bool = False, progress: Path | None = None
) -> Reference:
  """Pictures as a reference; arguments as of `statistics_of`."""
  keep = keep and len(pictures) <= MOST_KEPT
  found = statistics_of(pictures, network, "reference", keep=keep, progress=progress)
  features = found.column("pool") if keep else None
  spatial = gaussian_of(found, "spatial") if "spatial" in found.moments else None
  return Reference(pictures.about, gaussian_of(found), len(pictures), spatial, features, pictures)


def open_reference(
  spec: str,
  network: Network,
  *,
  image_size: int = 0,
  tokenizer: str = "",
  keep: bool = False,
  progress: Path | None = None,
) -> Reference:
  """Real pictures, their statistics stored or computed now.

  Args:
    spec: an npz with mu and sigma, as ADM, pytorch-fid and `launch.evaluate statistics` write it,
      or pictures, as `open_pictures` takes them.
    network: whose features.
    image_size: see `open_pictures`.
    tokenizer: likewise.
    keep: the features too, where there are pictures.
    progress: see `compute`.

  Returns:
    The reference.

  Raises:
    InputError: the statistics are of another network or protocol, or there is nothing usable.
  """
  stored = stored_statistics(spec)
  if not stored:
    pictures = open_pictures(spec, image_size=image_size, tokenizer=tokenizer)
    return reference_of(pictures, network, keep=keep, progress=progress)
  sizes = network_outputs(network)
  for name, what in (("mu", "pool"), ("mu_s", "spatial")):
    if name in stored and what in sizes and stored[name].shape != (sizes[what],):
      raise InputError(
        f"{spec} has a mean {name} of shape {stored[name].shape}, but the features of "
        f"{network.protocol} are {sizes[what]}: it is of another network."
      )
  try:
    about = json.loads(str(stored["about"])) if "about" in stored else {}
  except ValueError as error:
    raise InputError(f"{spec} does not say what it is of ({error}); make it again.") from error
  own = {name: network.about[name] for name in ("protocol", "weights_sha256")}
  if about and not own.items() <= about["network"].items():
    raise InputError(
      f"{spec} was computed by {describe(about['network'])}; now it is {describe(network.about)}."
    )
  try:
    both = "mu_s" in stored and "spatial" in sizes
    spatial = Gaussian(stored["mu_s"], stored["sigma_s"]) if both else None
    gaussian = Gaussian(stored["mu"], stored["sigma"])
  except (ValueError, KeyError) as error:
    raise InputError(f"The statistics in {spec} are no mean and covariance: {error}") from error
  told = about.get("pictures") or {
    "kind": "statistics",
    "note": "their protocol is not noted in the file",
    "mu_sum": float(stored["mu"].sum()),
  }
  reference = Reference(told, gaussian, told.get("pictures"), spatial)
  if has_pictures(spec):
    reference.pictures = open_pictures(spec)
    if keep and len(reference.pictures) <= MOST_KEPT:
      found = statistics_of(reference.pictures, network, "reference", keep=True, progress=progress)
      reference.features = found.column("pool")
  return reference


def network_outputs(network: Network) -> dict[str, int]:
  """What the network gives, and how many numbers each."""
  picture = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
  found = jax.eval_shape(network.apply, network.params, picture)
  return {name: x.shape[-1] for name, x in found.items()}


def rank_warnings(counts: Mapping[str, int | None], network: Network) -> list[str]:
  """What to know of sets that have fewer pictures than there are features."""
  return [
    f"{count} {name} are fewer than the {network.size} features: their covariance has not full "
    f"rank, and {network.distance} compares with no other number of pictures"
    for name, count in counts.items()
    if count is not None and count <= network.size
  ]


def key_of(network: Network) -> str:
  """The Frechet distance's name in JSON and logs: "fid", "fd_efficientnet", ..."""
  return network.distance.lower().replace("-", "_")


def figures_of(
  samples: Statistics, reference: Reference, network: Network, options: Options
) -> tuple[dict[str, float], dict[str, Any]]:
  """The figures by name, and what else is to be known: parts, confidence, warnings.

  Args:
    samples: from `statistics_of`, with features if `options.keep`.
    reference: from `open_reference`.
    network: of both.
    options: what to compute.

  Returns:
    (figures, more), for JSON.
  """
  pool, key = samples.moments["pool"], key_of(network)
  found = reference.gaussian.distance(pool.mean, pool.cov)
  figures = {key: found.distance}
  more: dict[str, Any] = {"parts": {key: _rounded(found)}, "warnings": []}
  if "spatial" in samples.moments and reference.spatial:
    spatial = samples.moments["spatial"]
    result = reference.spatial.distance(spatial.mean, spatial.cov)
    figures[f"s{key}"] = result.distance
    more["parts"][f"s{key}"] = _rounded(result)
  if samples.sums:
    figures["inception_score"] = samples.inception_score()
  if options.precision_recall and reference.features is not None:
    if len(reference.features) <= NEIGHBOURS:
      raise InputError(f"The reference has {len(reference.features)} pictures; give more.")
    console.say(f"precision and recall of {pool.count} and {len(reference.features)} features ...")
    both = precision_recall(reference.features, samples.column("pool"), NEIGHBOURS)
    figures |= both._asdict()
  elif options.precision_recall:
    more["warnings"].append(
      "no precision and recall: the reference has statistics alone, or more than "
      f"{MOST_KEPT:,} pictures"
    )
  more["warnings"] += rank_warnings({"samples": pool.count, "reference": reference.count}, network)
  if options.bootstrap:
    draws = confidence.resampled(samples.column("pool"), reference.gaussian, options.bootstrap)
    resamples = list(_shown(draws, "bootstrap", options.bootstrap))
    interval = confidence.interval(found.distance, resamples)
    more["confidence"] = {key: interval._asdict() | {"resamples": options.bootstrap}}
  if options.infinity:
    subsets = confidence.subset_distances(samples.column("pool"), reference.gaussian)
    line = confidence.extrapolated(list(_shown(subsets, "subsets", confidence.POINTS)))
    figures[f"{key}_infinity"] = line.distance
    more["infinity"] = line._asdict()
  return figures, more


def _shown(items: Iterator[T], name: str, total: int) -> Iterator[T]:
  """The items, with a bar."""
  with console.Bar(name, total) as bar:
    for done, item in enumerate(items, 1):
      yield item
      bar.update(done)


def _rounded(found: Any) -> dict[str, float]:
  return {
    "means": found.means,
    "covariances": found.covariances,
    "negative_eigenvalue": found.negative,
  }


_NAMES = {
  "inception_score": ("Inception score", "higher"),
  "precision": ("Precision", "higher"),
  "recall": ("Recall", "higher"),
}


def shown_figures(figures: dict[str, float], network: Network, note: str) -> list[Figure]:
  """As the console and the page show them."""
  shown = []
  for name, value in figures.items():
    distance = f"s{network.distance}" if name.startswith("s") else network.distance
    ending = " (infinitely many samples)" if name.endswith("_infinity") else ""
    title, better = _NAMES.get(name, (distance + ending, "lower"))
    shown.append(Figure(title, value, "", note, better))
  return shown


def check(samples: PictureSet, options: Options) -> None:
  """Raises InputError for what can be seen before anything is computed."""
  if options.bootstrap and options.bootstrap < 2:
    raise InputError(f"--bootstrap is {options.bootstrap}; give 0 or at least 2, better 20.")
  least = NEIGHBOURS + 1 if options.precision_recall else 2
  if len(samples) < least:
    raise InputError(f"There are {len(samples)} samples; at least {least} are needed.")
  if options.keep and len(samples) > 10 * MOST_KEPT:
    raise InputError(
      f"There are {len(samples)} samples, whose features would be kept; give at most "
      f"{10 * MOST_KEPT}, or --precision_recall=false without --bootstrap and --fid_infinity."
    )


def evaluate(
  samples: PictureSet,
  reference: Reference,
  network: Network,
  output: Output,
  *,
  options: Options,
  workdir: Path | None = None,
) -> dict[str, float]:
  """All figures of a set of samples, with JSON, sheet and page.

  Args:
    samples: which.
    reference: with features if precision and recall are wanted and there are pictures.
    network: whose features.
    output: where to.
    options: what to compute.
    workdir: of the training that the samples are of, for its curves.

  Returns:
    The figures.

  Raises:
    InputError: something does not fit.
  """
  check(samples, options)
  if reference.pictures is not None and reference.pictures.size != samples.size:
    sizes = f"samples of {samples.size} px and a reference of {reference.pictures.size} px"
    if network.distance != "FID":
      raise InputError(f"Given are {sizes}, which {network.protocol} does not resize.")
    console.say(f"note: {sizes}, which {network.protocol} both resizes to 299")
  first = samples.read(0, min(len(samples), SHOWN))
  found = statistics_of(samples, network, "samples", keep=options.keep, progress=output.progress)
  figures, more = figures_of(found, reference, network, options)
  note = f"{len(samples)} samples, {network.protocol}"
  shown = shown_figures(figures, network, note)
  for warning in more["warnings"]:
    console.say(f"note: {warning}")
  result = {
    "figures": figures,
    **more,
    "network": network.about,
    "samples": samples.about,
    "reference": reference.about,
  }
  neighbours = _neighbours(found, reference)
  sections = [
    Section(
      "Samples",
      f"The first {len(first)}, chosen by nobody.",
      [picture_rows({"": first}, COLUMNS)],
    ),
    Section(
      "Neighbours",
      "Left a sample, right the reference picture whose features are nearest: not a copy?",
      [picture_pairs(first[: len(neighbours)], neighbours, ("sample", "nearest reference"))],
    ),
    Section("Figures", _confidence_note(more), [figures_table(shown, more["warnings"])]),
    training_section(_curves(workdir)),
    Section("Protocol", "What was computed of what.", [details("JSON", _pretty(result))]),
  ]
  output.write(
    result,
    title=f"{network.distance} {figures[key_of(network)]:.3f}",
    summary=f"{len(samples)} samples against real pictures, by the protocol {network.protocol}.",
    figures=shown,
    sections=sections,
    picture=contact_sheet(first, COLUMNS),
  )
  output.show(shown)
  return figures


def _neighbours(samples: Statistics, reference: Reference) -> np.ndarray:
  """The reference pictures nearest to the first samples."""
  if reference.features is None or reference.pictures is None or "pool" not in samples.columns:
    return np.zeros((0, 1, 1, 3), np.uint8)
  some = samples.columns["pool"][0][:SHOWN_NEIGHBOURS].astype(np.float64)
  squares = np.square(reference.features).sum(1, dtype=np.float64)
  nearest = (squares - 2 * some @ reference.features.T).argmin(1)
  return take(reference.pictures, nearest.tolist())


def _confidence_note(more: dict[str, Any]) -> str:
  told = [
    f"{name}: 95 % between {x['low']:.3f} and {x['high']:.3f} ({x['resamples']} resamples)"
    for name, x in more.get("confidence", {}).items()
  ]
  return "; ".join(told)


def _curves(workdir: Path | None) -> list[Curve]:
  lines = read_metrics(workdir) if workdir else []
  names = {"loss": "loss", "mse": "mean squared error", "cosine": "1 - cosine"}
  names |= {"fd_efficientnet": "FD-EfficientNet", "grad_norm": "norm of the gradient"}
  return [Curve(label, name, {name: curve(lines, name)}) for name, label in names.items()]


def _pretty(result: dict[str, Any]) -> str:
  return json.dumps(result, indent=2)
