"""Where an evaluation's results go: OUTPUT.json, OUTPUT.png, OUTPUT.html, the console."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from launch.engine import console
from launch.engine.circumstances import circumstances
from launch.report.html import Figure, Section, details, figures_table, table, write_page
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, check_outputs, read_note, remove_folder, write_json

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-learn", "pillow")
Point = dict[str, Any]


class Output:
  """The files of one evaluation."""

  def __init__(self, path: Path, kind: str):
    """`path` has no suffix; a dot in the name, as in cfg3.5, is none.

    Raises:
      InputError: the files would replace some that no evaluation of this kind wrote.
    """
    self.kind = kind
    self.json, self.png, self.html = (
      path.with_name(f"{path.name}{suffix}") for suffix in (".json", ".png", ".html")
    )
    self.progress = path.with_name(f"{path.name}.progress")
    self._begun = self.progress / "evaluation.json"
    self.points = path.with_name(f"{path.name}.points")
    check_outputs((self.json, self.png, self.html), (self.progress, self.points))
    there = [file for file in (self.json, self.png, self.html) if file.exists()]
    if there and kind not in (_kind_of(self.json), _kind_of(self._begun)):
      raise InputError(
        f"{there[0]} exists and is not an evaluation of this kind; give another --output."
      )

  def write(
    self,
    result: dict[str, Any],
    *,
    title: str,
    summary: str,
    sections: Sequence[Section],
    figures: Sequence[Figure] = (),
    points: Sequence[Point] = (),
    picture: np.ndarray | None = None,
  ) -> None:
    """Prints the results and writes the files, the numbers last; removes what was in progress.

    Of several processes the first comes here.

    Args:
      result: of the JSON file, to which kind, versions and circumstances are added; its "warnings"
        are shown.
      sections: of the page; tables and the JSON follow.
      points: rows of a table to show, all with the same keys.
      picture: uint8 [H,W,3]; None if it exists already.
    """
    warnings = result.get("warnings", ())
    for warning in warnings:
      console.say(f"note: {warning}")
    header = list(points[0]) if points else []
    rows = [[_text(value) for value in point.values()] for point in points]
    write_json(self._begun, {"evaluation": self.kind})  # whose the files are, if it ends between
    if picture is not None:
      with atomic_file(self.png) as file:
        Image.fromarray(picture).save(file, "PNG")
    everything = [
      *sections,
      Section("Table", "", [table(header, rows)] if rows else []),
      Section("Figures", "", [figures_table(figures, warnings)]),
      Section("Protocol", "What was computed.", [details("JSON", json.dumps(result, indent=2))]),
    ]
    write_page(self.html, title, everything, summary=summary, figures=figures)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    run = circumstances() | {"versions": versions}
    write_json(self.json, {"evaluation": self.kind, **result, "run": run})
    remove_folder(self.progress)
    if rows:
      console.table(f"{len(rows)} points", header, rows)
    files = [("numbers", self.json), ("picture", self.png), ("page", self.html)]
    console.table(
      f"Evaluation: {self.kind}",
      ("what", "value"),
      [(f.name, f"{f.value:.4f} {f.unit}".strip()) for f in figures]
      + [(name, str(path)) for name, path in files],
    )


def _text(value: Any) -> str:
  return f"{value:.5g}" if isinstance(value, float) else str(value)


def _kind_of(path: Path) -> str:
  """The evaluation that wrote a file; "" if none did."""
  try:
    return read_note(path, evaluation=str)["evaluation"]
  except (OSError, InputError):
    return ""
