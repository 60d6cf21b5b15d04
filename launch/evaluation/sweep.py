"""Figures over a grid of sampling settings."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from launch.engine import console, processes
from launch.evaluation import figures, generation
from launch.evaluation.features import Network, both
from launch.evaluation.figures import PARTS, Options, Second
from launch.evaluation.output import Output, Point
from launch.evaluation.pictures import PictureSet, classes_of
from launch.evaluation.reference import Reference, statistics_of
from launch.report import plots
from launch.report.html import Section, picture_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, read_note, remove_folder, write_json

MOST_SHEETS = 24  # on the page


def parse_grid(words: Sequence[str], defaults: dict[str, Any]) -> dict[str, list[Any]]:
  """`["cfg_scale=1,1.5", "num_steps=50"]` -> {"cfg_scale": [1.0, 1.5], "num_steps": [50]}.

  Values take the types of `defaults`, which has all settings; InputError where they cannot.
  """
  grid: dict[str, list[Any]] = {}
  for word in words:
    name, _, values = word.partition("=")
    if name not in defaults or not values or name in grid:
      raise InputError(
        f"--grid={word} is not understood; give a setting once, as in --grid=cfg_scale=1,1.5. "
        f"There are {', '.join(defaults)}."
      )
    kind = type(defaults[name])
    try:
      grid[name] = [kind(value) for value in values.split(",")]
    except ValueError as error:
      raise InputError(f"--grid={word}: {error}; {name} is {kind.__name__}.") from error
  if not grid:
    raise InputError("Give at least one --grid=SETTING=VALUE,VALUE.")
  return grid


def points_of(grid: dict[str, list[Any]]) -> list[Point]:
  """The settings of each point of a grid, the last one changing fastest."""
  return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def sweep(
  grid: dict[str, list[Any]],
  draw: Callable[[Point], PictureSet],
  reference: Reference,
  network: Network,
  output: Output,
  *,
  options: Options,
  second: Second | None = None,
) -> list[Point]:
  """Figures at every point of a grid, whose samples `draw` makes of its settings.

  Finished points stay in the folder OUTPUT.points, also for a larger grid, each with a sheet of its
  first samples.
  """
  points = points_of(grid)
  done: list[Point] = []
  sheets: dict[str, str] = {}  # of each point
  warnings: set[str] = set()
  about: dict[str, Any] = {}
  common: dict[str, Any] = {}  # to all points
  for number, point in enumerate(points, 1):
    settings = ", ".join(f"{k}={v}" for k, v in point.items())
    console.say(f"[{number}/{len(points)}] {settings}")
    samples = draw(point)
    about = samples.about
    common = {k: v for k, v in (common or about).items() if about.get(k) == v}
    noted = _measured(samples, reference, network, output, options, second)
    warnings |= set(noted["warnings"])
    done.append(point | noted["figures"])
    sheets[settings] = noted["sheet"]
  best = min(done, key=lambda point: point[network.key])
  if jax.process_index():
    return done
  _heat_map(grid, done, network.key, output.png)
  output.write(
    {
      "grid": grid,
      "points": done,
      "best": best,
      "sheets": list(sheets.values()),
      "warnings": sorted(warnings),
      "network": network.about,
      "samples": common,
      "reference": reference.about,
      **({"second": second.about} if second else {}),
    },
    title=f"Sweep: {network.distance} {best[network.key]:.3f} at best",
    summary=", ".join(f"{name}={best[name]}" for name in grid),
    figures=figures.shown_of(best, network, second, "the best point"),
    sections=[
      Section(
        "Map",
        f"{network.distance} of {about['pictures']} samples over the grid.",
        [picture_file(output.png)],
      ),
      *(
        Section(name, "The first samples.", [picture_file(output.png.parent / sheet)])
        for name, sheet in itertools.islice(sheets.items(), MOST_SHEETS)
      ),
    ],
    points=[{k: v for k, v in point.items() if not k.endswith((*PARTS,))} for point in done],
  )
  return done


def _measured(
  samples: PictureSet,
  reference: Reference,
  network: Network,
  output: Output,
  options: Options,
  second: Second | None,
) -> dict[str, Any]:
  """Figures and warnings of a point, from its file if a run before has written it."""
  wanted = [entry.key for entry in figures.FIGURES["generation"]]
  about = [samples.about, network.about, reference.about, options, wanted]
  about += [second.about] if second else []
  noted = json.dumps(about, sort_keys=True)
  name = hashlib.sha256(noted.encode()).hexdigest()[:16]
  path = output.points / f"{name}.json"
  if processes.first_does(path.is_file):
    return processes.first_does(lambda: read_note(path, figures=dict, warnings=list, sheet=str))
  found = statistics_of(
    samples,
    both(network, second and second.network),
    f"point {name}",
    keep=options.keep,
    progress=output.progress,
  )

  def measure() -> dict[str, Any]:
    classes = classes_of(samples, network)
    values, more = figures.generated(found, reference, network, options, classes, second)
    sheet = path.with_suffix(".png")
    output.points.mkdir(exist_ok=True)
    with atomic_file(sheet) as file:
      first = generation.first_of(samples, *classes)
      Image.fromarray(generation.sheet_of(*first)).save(file, "PNG")
    note = {"figures": values, "warnings": more["warnings"]}
    note["sheet"] = f"{output.points.name}/{sheet.name}"
    write_json(path, note)
    remove_folder(output.progress / f"point_{name}")
    return note

  return processes.first_does(measure)


def _heat_map(grid: dict[str, list[Any]], points: list[Point], key: str, path: Path) -> None:
  """The first setting down, the second across; a map for each choice of the others."""
  names = list(grid)
  down, across = names[0], names[1] if len(names) > 1 else None
  others = [
    dict(zip(names[2:], v, strict=True)) for v in itertools.product(*list(grid.values())[2:])
  ]
  low, high = min(p[key] for p in points), max(p[key] for p in points)
  columns = min(len(others), 4)
  rows = -(-len(others) // columns)
  width = len(grid[across]) if across else 1
  size = (columns * max(1.1 * width + 1.5, 4), rows * max(0.7 * len(grid[down]) + 1.5, 3))
  figure, axes = plots.panels(rows, columns, size=size)
  for axis in axes.flat[len(others) :]:
    axis.axis("off")
  for axis, fixed in zip(axes.flat, others, strict=False):
    values = np.full((len(grid[down]), width), np.nan)
    for point in points:
      if all(point[name] == value for name, value in fixed.items()):
        column = grid[across].index(point[across]) if across else 0
        values[grid[down].index(point[down]), column] = point[key]
    axis.imshow(values, vmin=low, vmax=high, cmap="viridis_r", aspect="auto")
    for (i, j), value in np.ndenumerate(values):
      ink = "white" if value > (low + high) / 2 else "black"  # low values are bright
      axis.text(j, i, f"{value:.4g}", ha="center", va="center", color=ink)
    axis.set_yticks(range(len(grid[down])), map(str, grid[down]))
    axis.set_ylabel(down)
    axis.set_xticks(range(width), map(str, grid[across]) if across else [""])
    axis.set_xlabel(across or "")
    axis.set_title(", ".join(f"{k}={v}" for k, v in fixed.items()) or key)
  plots.save(figure, path)
