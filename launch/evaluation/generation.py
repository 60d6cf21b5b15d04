"""Samples against real pictures: FID, sFID, inception score, precision, recall."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from launch.engine import console
from launch.engine.writers import curve, read_metrics
from launch.evaluation import figures
from launch.evaluation.features import Network, both
from launch.evaluation.figures import NEIGHBOURS, Options, Second
from launch.evaluation.output import Output
from launch.evaluation.pictures import PictureSet, classes_of, take
from launch.evaluation.reference import MOST_KEPT, Reference, check_sizes, statistics_of
from launch.evaluation.sample_files import class_name, class_sheet, contact_sheet
from launch.evaluation.statistics import Statistics
from launch.report.charts import Curve, training_section
from launch.report.html import Section, picture_pairs, picture_rows
from vavae_jax.common.errors import InputError

SHOWN, SHOWN_NEIGHBOURS, COLUMNS = 80, 12, 10
MOST_CLASSES = 12  # with rows of their own


def check(samples: PictureSet, options: Options) -> None:
  """Raises InputError for what can be seen before anything is computed."""
  if options.bootstrap and options.bootstrap < 2:
    raise InputError(f"--bootstrap is {options.bootstrap}; give 0 or at least 2, better 20.")
  least = NEIGHBOURS + 1 if options.precision_recall else 2
  if len(samples) < least:
    raise InputError(f"There are {len(samples)} samples; at least {least} are needed.")
  for wanted, most, what, without in (
    (options.precision_recall, MOST_KEPT, "precision and recall", "give --precision_recall=false"),
    (options.keep, 10 * MOST_KEPT, "intervals and extrapolations", "do without them"),
  ):
    if wanted and len(samples) > most:
      raise InputError(
        f"There are {len(samples)} samples, and {what} take at most {most}: {without}, or give "
        "fewer samples."
      )


def evaluate(
  samples: PictureSet,
  reference: Reference,
  network: Network,
  output: Output,
  *,
  options: Options,
  workdir: Path | None = None,
  second: Second | None = None,
) -> dict[str, float]:
  """All figures of a set of samples, with JSON, sheet and page; InputError if sizes do not fit.

  Of several processes the first has the figures and writes. The reference has features where
  precision and recall are wanted; `workdir` is of the training that the samples are of, for its
  curves.
  """
  check(samples, options)
  if note := check_sizes(samples.size, reference.size, network):
    console.say(f"note: {note}")
  if second:
    check_sizes(samples.size, second.reference.size, second.network)
  judges = both(network, second and second.network)
  found = statistics_of(samples, judges, "samples", keep=options.keep, progress=output.progress)
  if jax.process_index():
    return {}
  classes = classes_of(samples, network)
  first, labels, names = first_of(samples, *classes)
  rows = {class_name(x, names): first[labels == x] for x in np.unique(labels)} or {"": first}
  values, more = figures.generated(found, reference, network, options, classes, second)
  notes = {
    name: f"95 % between {x['low']:.3f} and {x['high']:.3f} ({x['resamples']} resamples)"
    for name, x in more.get("confidence", {}).items()
  }
  neighbours = _neighbours(found, reference)
  sections = [
    Section(
      "Samples",
      f"The first {len(first)}, without selection.",
      [picture_rows(rows, COLUMNS)],
    ),
    Section(
      "Neighbours",
      "Left a sample, right the reference picture whose features are nearest: not a copy?",
      [picture_pairs(first[: len(neighbours)], neighbours, ("sample", "nearest reference"))],
    ),
    training_section(_curves(workdir)),
  ]
  output.write(
    {
      "figures": values,
      **more,
      "network": network.about,
      "samples": samples.about,
      "reference": reference.about,
    },
    title=f"{network.distance} {values[network.key]:.3f}",
    summary=f"{len(samples)} samples against real pictures, by the protocol {network.protocol}.",
    figures=figures.shown_of(
      values, network, second, f"{len(samples)} samples, {network.protocol}", notes
    ),
    sections=sections,
    picture=sheet_of(first, labels, names),
  )
  return values


def first_of(
  samples: PictureSet, labels: np.ndarray, names: list[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
  """(the first samples, their labels, names), the last two empty where classes are none or many."""
  first = samples.read(0, min(len(samples), SHOWN))
  if len(np.unique(labels[: len(first)])) > MOST_CLASSES:
    return first, labels[:0], []
  return first, labels[: len(first)], names


def sheet_of(first: np.ndarray, labels: np.ndarray, names: list[str]) -> np.ndarray:
  """The first samples as one picture, by class where they have any."""
  return class_sheet(first, labels, names) if len(labels) else contact_sheet(first, COLUMNS)


def _neighbours(samples: Statistics, reference: Reference) -> np.ndarray:
  """The reference pictures nearest to the first samples."""
  if reference.features is None or reference.pictures is None or not samples.has("pool"):
    return np.zeros((0, 1, 1, 3), np.uint8)
  some = samples.column("pool")[:SHOWN_NEIGHBOURS].astype(np.float64)
  squares = np.square(reference.features).sum(1, dtype=np.float64)
  nearest = (squares - 2 * some @ reference.features.T).argmin(1)
  return take(reference.pictures, nearest.tolist())


def _curves(workdir: Path | None) -> list[Curve]:
  lines = read_metrics(workdir) if workdir else []
  names = {"loss": "loss", "mse": "mean squared error", "cosine": "1 - cosine"}
  names |= {"fd_efficientnet": "FD-EfficientNet", "grad_norm": "norm of the gradient"}
  return [Curve(label, name, {name: curve(lines, name)}) for name, label in names.items()]
