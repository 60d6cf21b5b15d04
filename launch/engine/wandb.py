"""Weights & Biases as a place for a training's scalars and pictures, beside its own files."""

from __future__ import annotations

import importlib
import importlib.util
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from launch.engine import console
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url, read_note, write_json

NOTE = "wandb.json"  # in a workdir: the run that it goes on with
PROJECT = "vavae-lightningdit"


def check() -> None:
  """Raises InputError where the package is not installed."""
  if importlib.util.find_spec("wandb") is None:
    raise InputError(
      "config.log_to has wandb, which is not installed: run `pip install wandb`, or leave it out."
    )


class Run:
  """One run; the variables of W&B hold, such as WANDB_MODE=offline and WANDB_PROJECT."""

  def __init__(self, workdir: Path, config: FrozenConfigDict):
    """Begins it, or goes on with that of the workdir; InputError where W&B refuses."""
    self._wandb: Any = importlib.import_module("wandb")
    note = workdir / NOTE
    if not note.exists():
      write_json(note, {"id": uuid.uuid4().hex[:12]})
    try:
      self._run = self._wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=read_note(note, id=str)["id"],
        name=os.environ.get("WANDB_NAME", workdir.name),
        resume="allow",
        dir=None if is_url(workdir) else workdir,
        config=config.to_dict(),
        settings=self._wandb.Settings(console="off", silent=True),
      )
    except (self._wandb.errors.Error, OSError) as error:
      reason = " ".join(str(error).split())
      raise InputError(
        f"W&B cannot be used ({reason}); run `wandb login`, set WANDB_MODE=offline, or leave wandb "
        "out of config.log_to."
      ) from error
    # Its own count of steps only grows, and a training may go back to a checkpoint.
    self._run.define_metric("*", step_metric="step")
    console.say(f"W&B: {self._run.url or self._run.dir}")

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Those of one step."""
    self._run.log({"step": step, **values})

  def picture(self, step: int, name: str, image_HWC: np.ndarray) -> None:
    """One, uint8."""
    self._run.log({"step": step, name: self._wandb.Image(image_HWC)})

  def close(self) -> None:
    """Sends, or writes, what is left."""
    self._run.finish()
