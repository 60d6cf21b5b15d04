"""Where an evaluation's results go: OUTPUT.json, OUTPUT.png, OUTPUT.html."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from launch.engine import console
from launch.engine.circumstances import circumstances
from launch.report.html import Figure, Section, write_page
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, write_json

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "scikit-learn", "pillow")


class Output:
  """The files of one evaluation."""

  def __init__(self, path: Path, kind: str):
    """Args:
      path: without suffix; a dot in the name, as in cfg3.5, is none.
      kind: which evaluation.

    Raises:
      InputError: they would replace files that no evaluation of this kind wrote.
    """
    self.kind = kind
    self.json, self.png, self.html = (
      path.with_name(f"{path.name}{suffix}") for suffix in (".json", ".png", ".html")
    )
    self.progress = path.with_name(f"{path.name}.progress")
    self._begun = self.progress / "evaluation.json"
    self.points = path.with_name(f"{path.name}.points")
    there = [file for file in (self.json, self.png, self.html) if file.exists()]
    if there and kind not in (_kind_of(self.json), _kind_of(self._begun)):
      raise InputError(
        f"{there[0]} exists and is no evaluation of this kind; give another --output."
      )

  def write(
    self,
    result: dict[str, Any],
    *,
    title: str,
    summary: str,
    figures: list[Figure],
    sections: list[Section],
    picture: np.ndarray | None = None,
  ) -> None:
    """Writes the files in the first process, the numbers last, and removes what was in progress.

    Args:
      result: of the JSON file; versions and kind are added.
      title: of the page.
      summary: of the page.
      figures: of the page, the first four at its head.
      sections: of the page.
      picture: uint8 [H,W,3]; None if it is there already.
    """
    if jax.process_index():
      return
    write_json(self._begun, {"evaluation": self.kind})  # whose the files are, if it ends between
    if picture is not None:
      with atomic_file(self.png) as file:
        Image.fromarray(picture).save(file, "PNG")
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    noted = {"evaluation": self.kind, **result, "run": circumstances() | {"versions": versions}}
    write_page(self.html, title, sections, summary=summary, figures=figures)
    write_json(self.json, noted)
    shutil.rmtree(self.progress, ignore_errors=True)

  def show(self, figures: list[Figure]) -> None:
    """Prints the figures and where everything is."""
    rows = [(f.name, f"{f.text} {f.unit}".strip()) for f in figures]
    files = [("numbers", self.json), ("picture", self.png), ("page", self.html)]
    where = [(name, str(path)) for name, path in files]
    console.table(f"Evaluation: {self.kind}", ("what", "value"), [*rows, *where])


def _kind_of(path: Path) -> str:
  try:
    noted = json.loads(path.read_text())
  except (OSError, ValueError):
    return ""
  return noted.get("evaluation", "") if isinstance(noted, dict) else ""
