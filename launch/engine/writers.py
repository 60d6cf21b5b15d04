"""Scalars and pictures to TensorBoard and JSON lines; one process, the first, writes.

`metrics.jsonl` has one object a line, `{"step": 100, "loss": 1.2, ...}`. When a run resumes, lines
after the restored step are dropped, so that the file tells the story of one uninterrupted run.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter

from vavae_jax.files import atomic_file


class Writer:
  """Writes one workdir's `metrics.jsonl` and `tensorboard/`."""

  def __init__(self, workdir: Path, *, resume_step: int, active: bool = True):
    """Args:
    workdir: where the files go.
    resume_step: lines of later steps are from an interrupted run and are dropped.
    active: False in all processes but the first; then nothing is written.
    """
    self._active = active
    if not active:
      return
    self._path = Path(workdir) / "metrics.jsonl"
    kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
    with atomic_file(self._path) as file:
      file.writelines((json.dumps(line) + "\n").encode() for line in kept)
    self._lines = self._path.open("a")
    self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=resume_step + 1)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes `{name: value}` of one step."""
    if not self._active:
      return
    finite = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
    self._lines.write(json.dumps({"step": step, **finite}) + "\n")
    self._lines.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
    """Writes one uint8 picture to TensorBoard."""
    if self._active:
      self._board.add_image(name, image_HWC, step, dataformats="HWC")

  def close(self) -> None:
    """Closes the files."""
    if self._active:
      self._lines.close()
      self._board.close()


def read_metrics(workdir: Path) -> list[dict]:
  """The lines of a workdir's `metrics.jsonl`, oldest first; a torn last line is left out."""
  path = Path(workdir) / "metrics.jsonl"
  if not path.is_file():
    return []
  text = path.read_text()
  return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def curve(lines: list[dict], name: str) -> list[tuple[int, float]]:
  """(step, value) of one metric, where it was written and finite."""
  return [(line["step"], line[name]) for line in lines if line.get(name) is not None]
