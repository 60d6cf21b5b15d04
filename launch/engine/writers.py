"""Scalars and pictures to TensorBoard and JSON lines; one process, the first, writes.

`metrics.jsonl` has one object a line, `{"step": 100, "loss": 1.2, ...}`. When a run resumes, lines
after the restored step are dropped, so that the file is that of one uninterrupted run. In a bucket,
where nothing can be appended, the file is written anew every half minute and at the end.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np

from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, is_url

SECONDS_BETWEEN_WRITES = 30.0
# What a line raises that is no JSON, or not numbers by name.
_DAMAGES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class Writer:
  """Writes one workdir's `metrics.jsonl` and `tensorboard/`."""

  def __init__(self, workdir: Path, *, resume_step: int, active: bool = True):
    """Lines after `resume_step` are dropped; `active` is False in processes that write nothing."""
    self._active = active
    if not active:
      return
    self._path = workdir / "metrics.jsonl"
    kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
    self._lines = [json.dumps(line) + "\n" for line in kept]
    self._rewrite()
    self._appended = None if is_url(workdir) else self._path.open("a")
    from tensorboardX import SummaryWriter  # which imports the clients of clouds

    self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes `{name: value}` of one step."""
    if not self._active:
      return
    finite = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
    line = json.dumps({"step": step, **finite}) + "\n"
    if self._appended:
      self._appended.write(line)
      self._appended.flush()
    else:
      self._lines.append(line)
      if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
        self._rewrite()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def _rewrite(self) -> None:
    with atomic_file(self._path) as file:
      file.write("".join(self._lines).encode())
    self._written = time.monotonic()

  def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
    """Writes one uint8 picture to TensorBoard."""
    if self._active:
      self._board.add_image(name, image_HWC, step, dataformats="HWC")

  def close(self) -> None:
    """Closes the files."""
    if self._active:
      if self._appended:
        self._appended.close()
      else:
        self._rewrite()
      self._board.close()


def read_metrics(workdir: Path) -> list[dict]:
  """The lines of a workdir's `metrics.jsonl`, oldest first; a torn last line is left out."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return []
  text = path.read_bytes().decode("utf-8-sig", errors="replace")  # editors write a mark
  lines = []
  for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), 1):
    try:
      values = json.loads(line)
      if not isinstance(values["step"], int):
        raise ValueError("its step is no number")
      numbers = {name: x if x is None or math.isfinite(x) else None for name, x in values.items()}
    except _DAMAGES as error:
      raise InputError(f"{path}, line {number}, is damaged ({error}); delete the line.") from error
    lines.append(numbers)
  return lines


def curve(lines: list[dict], name: str) -> list[tuple[int, float]]:
  """(step, value) of one metric, where it was written and finite."""
  return [(line["step"], line[name]) for line in lines if line.get(name) is not None]
