"""Reconstruction against generation for several tokenizers, as figure 2 of the paper."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from launch.evaluation.output import Output, Point
from launch.report import plots
from launch.report.html import Section, picture_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place, read_note

_SECTIONS = {"reconstruction": ("pictures",), "generation": ("network", "samples", "reference")}


def frontier(words: Sequence[str], output: Output, x: str, y: str) -> list[Point]:
  """Joins evaluations of several tokenizers; writes JSON, picture and page.

  A word is `NAME:RECONSTRUCTION.json:GENERATION.json`, of `launch.evaluate`; `plots.frontier` has
  the meaning of a slash in a name. `x` is a figure of the reconstructions, `y` of the generations.

  Raises:
    InputError: a file is missing, is of another evaluation or of another protocol than the others.
  """
  points: list[Point] = []
  protocols: dict[str, tuple[str, Any]] = {}  # and the file that has it, by kind
  for word in words:
    name, *paths = re.split(":(?!//)", word)  # a URL's colon separates nothing
    if len(paths) != 2:
      raise InputError(f"--point={word} is not NAME:RECONSTRUCTION.json:GENERATION.json.")
    point: Point = {"name": name}
    kinds = {"reconstruction": ("x", x), "generation": ("y", y)}
    for path, (kind, (axis, figure)) in zip(paths, kinds.items(), strict=True):
      noted = _read(place(path), kind)
      if figure not in noted["figures"]:
        raise InputError(
          f"{path} has no {figure}; give --{axis}={' or '.join(noted['figures'])}, which it has."
        )
      point[f"{kind}: {figure}"] = noted["figures"][figure]
      first, protocol = protocols.setdefault(kind, (path, _protocol(kind, noted)))
      if _protocol(kind, noted) != protocol:
        raise InputError(f"{path} and {first} are of other protocols.")
    points.append(point)
  if not points:
    raise InputError("Give --point=NAME:RECONSTRUCTION.json:GENERATION.json once or more.")
  if jax.process_index():
    return points
  _, across, down = points[0]
  drawing, ((axes,),) = plots.panels(size=(7, 5))
  plots.frontier(axes, {point["name"]: (point[across], point[down]) for point in points})
  axes.set(xlabel=across, ylabel=down)
  plots.save(drawing, output.png, dpi=120)
  output.write(
    {"points": points},
    title="Reconstruction against generation",
    summary=f"{len(points)} tokenizers.",
    sections=[Section("Frontier", f"{down} over {across}.", [picture_file(output.png)])],
    points=points,
  )
  return points


def _read(path: Path, kind: str) -> dict[str, Any]:
  if not path.is_file():
    raise InputError(f"{path} does not exist; give what python -m launch.evaluate {kind} wrote.")
  if read_note(path).get("evaluation") != kind:
    raise InputError(f"{path} is not what python -m launch.evaluate {kind} writes.")
  needed: dict[str, Any] = dict.fromkeys(("figures", *_SECTIONS[kind]), dict)
  return read_note(path, **needed)


def _protocol(kind: str, noted: dict[str, Any]) -> Any:
  """What figures have to agree in, wherever the pictures lie."""
  if kind == "generation":
    return noted["network"], noted["samples"].get("pictures"), noted["reference"]
  pictures = [noted["pictures"].get(x) for x in ("listing", "chosen", "pictures", "crop")]
  return [noted.get(x) for x in ("network", "lpips", "posterior")], pictures
