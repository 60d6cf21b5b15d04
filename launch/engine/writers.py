"""Scalars and pictures to JSON lines, TensorBoard and W&B; one process, the first, writes.

`metrics.jsonl` has one object a line, `{"step": 100, "loss": 1.2, ...}`. When a run resumes, lines
after the restored step are dropped, so that the file is that of one uninterrupted run. In a bucket,
where nothing can be appended, the file is written anew every half minute and at the end.
"""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict
from PIL import Image

from launch.engine import wandb
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, is_url, naming

SECONDS_BETWEEN_WRITES = 30.0
# What a line raises that is no JSON, or not numbers by name.
_DAMAGES = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def check(log_to: Sequence[str]) -> None:
  """Raises InputError for a place of `config.log_to` that cannot be used here."""
  if "wandb" in log_to:
    wandb.check()


class Writer:
  """Writes one workdir's `metrics.jsonl` and `pictures/`, and where `config.log_to` says."""

  def __init__(
    self, workdir: Path, config: FrozenConfigDict, resume_step: int, *, active: bool = True
  ):
    """Lines after `resume_step` are dropped; `active` is False in processes that write nothing.

    InputError where W&B is asked for and refuses.
    """
    self._active = active
    if not active:
      return
    kept = [line for line in read_metrics(workdir) if line["step"] <= resume_step]
    lines = "".join(json.dumps(line) + "\n" for line in kept)
    self._pictures = workdir / "pictures"
    self._metrics = _Growing(workdir / "metrics.jsonl", lines.encode())
    self._wandb = wandb.Run(workdir, config) if "wandb" in config.log_to else None
    self._board: _Growing | None = None
    if "tensorboard" not in config.log_to:
      return
    name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    self._board = _Growing(workdir / "tensorboard" / name, b"")
    self._event(0, file_version="brain.Event:2")
    # TensorBoard hides what an earlier start wrote from here on.
    self._event(resume_step + 1, session_log={"status": "START"})

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Writes `{name: value}` of one step."""
    if not self._active:
      return
    finite = {k: float(v) if np.isfinite(v) else None for k, v in values.items()}
    self._metrics.add(json.dumps({"step": step, **finite}).encode() + b"\n")
    if self._board:
      for name, value in values.items():
        self._event(step, summary=_tensorboard().summary.scalar(name, value))
    if self._wandb:
      self._wandb.scalars(step, values)

  def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
    """Writes one uint8 picture as pictures/NAME/STEP.png, and where `config.log_to` says."""
    if not self._active:
      return
    if self._board:
      self._event(step, summary=_tensorboard().summary.image(name, image_HWC, dataformats="HWC"))
    with atomic_file(self._pictures / name.replace("/", "_") / f"{step:08d}.png") as file:
      Image.fromarray(image_HWC).save(file, "PNG")
    if self._wandb:
      self._wandb.picture(step, name, image_HWC)

  def flush(self) -> None:
    """What was written can be read now, also in a bucket."""
    if self._active:
      self._metrics.flush()

  def _event(self, step: int, **what: Any) -> None:
    """Here and not by a thread of tensorboardX, which a full disk ends and which is then waited for
    in vain.
    """
    event = _tensorboard().proto.event_pb2.Event(wall_time=time.time(), step=step, **what)
    data, checksum = event.SerializeToString(), _tensorboard().record_writer.masked_crc32c
    size = struct.pack("<Q", len(data))
    checked = (part + struct.pack("<I", checksum(part)) for part in (size, data))
    assert self._board
    self._board.add(b"".join(checked))

  def close(self) -> None:
    """Closes the files."""
    if self._active:
      self._metrics.close()
      if self._board:
        self._board.close()
      if self._wandb:
        self._wandb.close()


class _Growing:
  """A file that grows; in a bucket, where none does, it is written anew now and then."""

  def __init__(self, path: Path, content: bytes):
    self._path, self._parts = path, [content]
    self._write_anew()
    self._appended = None if is_url(path) else path.open("ab")

  def add(self, data: bytes) -> None:
    """Appends."""
    if self._appended:
      with naming(self._path):
        self._appended.write(data)
        self._appended.flush()
      return
    self._parts.append(data)
    if time.monotonic() - self._written > SECONDS_BETWEEN_WRITES:
      self._write_anew()

  def flush(self) -> None:
    """Appended data are flushed at once."""
    if not self._appended:
      self._write_anew()

  def _write_anew(self) -> None:
    with atomic_file(self._path) as file:
      file.write(b"".join(self._parts))
    self._written = time.monotonic()

  def close(self) -> None:
    """Nothing more comes."""
    if self._appended:
      with naming(self._path):
        self._appended.close()
    else:
      self._write_anew()


def _tensorboard() -> Any:
  import tensorboardX.proto.event_pb2
  import tensorboardX.record_writer
  import tensorboardX.summary  # with the clients of clouds, for which no --help should wait

  return tensorboardX


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
