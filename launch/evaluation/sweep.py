"""Figures over a grid of sampling settings, and of several tokenizers: tables and pictures."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.engine import console, processes
from launch.evaluation.features import Network
from launch.evaluation.generation import (
  Options,
  Reference,
  figures_of,
  key_of,
  shown_figures,
  statistics_of,
)
from launch.evaluation.output import Output
from launch.evaluation.pictures import PictureSet
from launch.report import plots
from launch.report.html import Section, picture_file, table
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json

Point = dict[str, Any]


def parse_grid(words: Sequence[str], defaults: dict[str, Any]) -> dict[str, list[Any]]:
  """`["cfg_scale=1,1.5", "num_steps=50"]` -> {"cfg_scale": [1.0, 1.5], "num_steps": [50]}.

  Args:
    words: a setting and its values each.
    defaults: the settings that there are, whose types the values take.

  Returns:
    Values by setting, in the order given.

  Raises:
    InputError: unknown settings, no values, or values of another type.
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
) -> list[Point]:
  """Figures at every point of a grid; points that a run before has finished are kept.

  Args:
    grid: from `parse_grid`.
    draw: settings of a point -> its samples.
    reference: from `generation.open_reference`.
    network: whose features.
    output: where to; finished points stay in the folder OUTPUT.points, also for a larger grid.
    options: what to compute.

  Returns:
    Settings and figures of each point.
  """
  points = points_of(grid)
  done: list[Point] = []
  told_of: set[str] = set()
  about: dict[str, Any] = {}
  common: dict[str, Any] = {}  # to all points
  for number, point in enumerate(points, 1):
    told = ", ".join(f"{k}={v}" for k, v in point.items())
    console.say(f"[{number}/{len(points)}] {told}")
    samples = draw(point)
    about = samples.about
    common = {k: v for k, v in (common or about).items() if about.get(k) == v}
    noted = json.dumps([about, network.about, reference.about, options], sort_keys=True)
    name = hashlib.sha256(noted.encode()).hexdigest()[:16]
    path = output.points / f"{name}.json"
    if not processes.first_says(path.is_file()):
      found = statistics_of(
        samples, network, f"point {name}", keep=options.keep, progress=output.progress
      )
      figures, more = figures_of(found, reference, network, options)
      if jax.process_index() == 0:
        write_json(path, {"figures": figures, "warnings": more["warnings"]})
        for part in output.progress.glob(f"point_{name}-*.safetensors"):
          part.unlink()
      processes.wait_for_all(f"point {name}")
    noted_point = json.loads(path.read_text())
    told_of |= set(noted_point["warnings"])
    done.append(point | noted_point["figures"])
  for warning in sorted(told_of):
    console.say(f"note: {warning}")
  key = key_of(network)
  best = min(done, key=lambda point: point[key])
  rows = [[_text(point[name]) for name in done[0]] for point in done]
  console.table(f"{len(done)} points", list(done[0]), rows)
  _heat_map(grid, done, key, output.png)
  shown = shown_figures({k: best[k] for k in best if k not in grid}, network, "the best point")
  result = {
    "grid": grid,
    "points": done,
    "best": best,
    "warnings": sorted(told_of),
    "network": network.about,
    "samples": common,
    "reference": reference.about,
  }
  sections = [
    Section("Map", f"{network.distance} over the grid.", [picture_file(output.png)]),
    Section("Table", f"{about['pictures']} samples each.", [table(list(done[0]), rows)]),
  ]
  output.write(
    result,
    title=f"Sweep: {network.distance} {best[key]:.3f} at best",
    summary=", ".join(f"{name}={best[name]}" for name in grid),
    figures=shown,
    sections=sections,
  )
  output.show(shown)
  return done


def _text(value: Any) -> str:
  return f"{value:.5g}" if isinstance(value, float) else str(value)


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


def frontier(words: Sequence[str], output: Output, x: str, y: str) -> list[Point]:
  """Reconstruction against generation for several tokenizers, as the paper's figure 2.

  Args:
    words: `NAME:RECONSTRUCTION.json:GENERATION.json` each, of this command; NAMEs that end alike
      after a slash, as in `plain/d16` and `aligned/d16`, are joined by an arrow.
    output: where to.
    x: a figure of the reconstructions.
    y: a figure of the generations.

  Returns:
    {"name", x, y} of each.

  Raises:
    InputError: a file is missing, is of another evaluation or of another protocol than the others.
  """
  points: list[Point] = []
  protocols: dict[str, str] = {}
  for word in words:
    name, *paths = word.split(":")
    if len(paths) != 2:
      raise InputError(f"--point={word} is not NAME:RECONSTRUCTION.json:GENERATION.json.")
    point: Point = {"name": name}
    kinds = {"reconstruction": ("x", x), "generation": ("y", y)}
    for path, (kind, (axis, figure)) in zip(paths, kinds.items(), strict=True):
      noted = _read(Path(path), kind)
      if figure not in noted["figures"]:
        raise InputError(
          f"{path} has no {figure}; give --{axis}={' or '.join(noted['figures'])}, which it has."
        )
      point[f"{kind}: {figure}"] = noted["figures"][figure]
      if kind == "generation":
        told = json.dumps([noted["network"], noted["samples"].get("pictures"), noted["reference"]])
        if protocols and told not in protocols:
          raise InputError(f"{path} and {next(iter(protocols.values()))} are of other protocols.")
        protocols[told] = path
    points.append(point)
  if not points:
    raise InputError("Give --point=NAME:RECONSTRUCTION.json:GENERATION.json once or more.")
  across, down = (name for name in points[0] if name != "name")
  _draw_frontier(points, across, down, output.png)
  rows = [[_text(v) for v in point.values()] for point in points]
  console.table("Frontier", list(points[0]), rows)
  sections = [
    Section("Frontier", f"{down} over {across}.", [picture_file(output.png)]),
    Section("Table", "", [table(list(points[0]), rows)]),
  ]
  output.write(
    {"points": points},
    title="Reconstruction against generation",
    summary=f"{len(points)} tokenizers.",
    figures=[],
    sections=sections,
  )
  output.show([])
  return points


def _read(path: Path, kind: str) -> dict[str, Any]:
  try:
    noted = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise InputError(f"{path} cannot be read ({error}).") from error
  if not isinstance(noted, dict) or noted.get("evaluation") != kind:
    raise InputError(f"{path} is not what python -m launch.evaluate {kind} writes.")
  return noted


def _draw_frontier(points: list[Point], x: str, y: str, path: Path) -> None:
  figure, ((axis,),) = plots.panels(size=(7, 5))
  for point in points:
    axis.scatter(point[x], point[y], s=40)
    axis.annotate(point["name"], (point[x], point[y]), xytext=(6, 4), textcoords="offset points")
  by_ending: dict[str, list[Point]] = {}
  for point in points:
    if "/" in point["name"]:
      by_ending.setdefault(point["name"].rpartition("/")[2], []).append(point)
  for first, *rest in by_ending.values():
    for other in rest:
      axis.annotate(
        "",
        (other[x], other[y]),
        (first[x], first[y]),
        arrowprops={"arrowstyle": "->", "color": "grey"},
      )
  axis.set(xlabel=x, ylabel=y)
  axis.grid(alpha=0.3)
  plots.save(figure, path, dpi=120)
