"""What a page is about, without Gradio: a model loads and compiles while that is imported."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from lightningdit_jax.pipeline import Pipeline
from lightningdit_jax.solvers import MAP, TABLEAUX
from lightningdit_jax.store.latents import LatentStore
from vavae_jax import folder
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import place

# heun2 is another name of heun, and MAP for flow maps alone.
SOLVERS = [name for name in TABLEAUX if name not in ("heun2", MAP)]
turn = threading.Lock()  # one computation at a time: two would share the same cores


@dataclasses.dataclass(frozen=True)
class Studio:
  """What a page is about.

  Attributes:
    source: of the model, as `Pipeline.load` takes it.
    pipe: the model; None where there is none.
    tokenizer: of the model, where somebody named it, or "".
    second: of the model to compare with, or "".
    store: its latents; None where there are none.
    workdirs: of trainings to follow.
    num: pictures of each tab, the same for all, so that all use one compiled program.
    is_local: whether this machine alone can open the page; strangers name no models.
  """

  source: str = ""
  pipe: Pipeline | None = None
  tokenizer: str = ""
  second: str = ""
  store: LatentStore | None = None
  workdirs: Sequence[Path] = ()
  num: int = 12
  is_local: bool = True

  @property
  def model(self) -> Pipeline:
    """The model, in tabs that are there with a model alone."""
    assert self.pipe is not None
    return self.pipe

  @property
  def classes(self) -> list[str]:
    """Names of the model's classes; their numbers where nobody named them."""
    count = self.model.config.model.num_classes
    return list(self.model.class_names) or [str(i) for i in range(count)]

  def labels(self, chosen: Sequence[str]) -> list[int]:
    """The classes of `num` pictures, those that were chosen in turn; all if none was."""
    if unknown := [name for name in chosen if name not in self.classes]:
      raise InputError(f"There is no class {unknown[0]!r} in this model.")
    return np.resize([self.classes.index(x) for x in chosen or self.classes], self.num).tolist()


def load(source: str, **options: Any) -> Pipeline:
  """`Pipeline.load` of a model whose blocks run in a loop: it compiles in a third of the time."""
  pipe = Pipeline.load(source, **options)
  config = ConfigDict(pipe.config)
  config.model.scan_unroll = 1
  pipe.config = FrozenConfigDict(config)
  return pipe


def open_studio(
  model: str,
  *,
  tokenizer: str = "",
  latents: str = "",
  workdirs: Sequence[Path] = (),
  **others: Any,
) -> Studio:
  """Loads what a page is about; arguments as the command's, errors as of `Pipeline.load`.

  A model that is a workdir brings its latents and the trainings that made it, where they are there.
  """
  for workdir in workdirs:
    if not workdir.is_dir():
      raise InputError(f"--workdir={workdir} does not exist.")
  pipe = load(model, tokenizer=tokenizer) if model else None
  if pipe and not folder.is_model(path := folder.find(model)):
    kept = folder.workdir_config(path, "diffusion").latents.path
    latents = latents or (kept if Path(kept).exists() else "")  # gone since, as a tab then says
    before = Path(pipe.space.tokenizer.get("workdir", ""))
    workdirs = workdirs or [path, *([before] if (before / "metrics.jsonl").is_file() else [])]
  store = LatentStore(place(latents)) if latents else None
  if pipe and store and store.shape[-1] != pipe.tokenizer.channels:
    raise InputError(
      f"The latents of {latents} have {store.shape[-1]} channels, those of the model "
      f"{pipe.tokenizer.channels}: they are of another tokenizer. Give --latents=STORE of this one."
    )
  return Studio(model, pipe, tokenizer, store=store, workdirs=workdirs, **others)


def settings(guidance: float, interval: float, solver: str, steps: int) -> dict[str, Any]:
  """The controls as arguments of `Pipeline.sample`."""
  given = {"guidance": guidance, "interval_start": interval, "method": solver, "steps": steps}
  return {**given, "mode": "ODE"}


def solvers_of(pipe: Pipeline) -> list[str]:
  """The solvers on the page of a model."""
  return [*([MAP] if pipe.config.model.dmf_depth else []), *SOLVERS]


def solver_of(pipe: Pipeline) -> str:
  """The model's own solver, if the page has it."""
  own = pipe.settings().method
  return own if own in solvers_of(pipe) else SOLVERS[0]


def warm_up(studio: Studio) -> None:
  """Compiles what the page needs at once: the model's solver, with guidance and without."""
  pipe, model = studio.model, studio.model.config.model
  zeros = np.zeros((studio.num, model.input_size, model.input_size, model.in_channels), np.float32)

  def watch(guidance: float) -> None:
    chosen = settings(guidance, 0.0, solver_of(pipe), 2)
    list(pipe.watch(studio.labels([]), noise=zeros, **chosen))

  own = pipe.settings().cfg_scale
  with turn:  # the first pictures wait for it
    beside = threading.Thread(target=watch, args=[own], daemon=True)
    beside.start()
    pipe.tokenizer.decode(zeros)
    pipe.noise(0, studio.num)
    beside.join()
  watch(2.0 if own == 1 else 1.0)


def is_local(host: str) -> bool:
  """Whether nobody but this machine can reach an address; InputError if it is none."""
  try:
    return all(ipaddress.ip_address(x[4][0]).is_loopback for x in socket.getaddrinfo(host, None))
  except OSError as error:
    raise InputError(f"--host={host} is no address of this machine ({error}).") from error


def listen(host: str, port: int) -> socket.socket:
  """A socket at an address, the port 0 for any that is free; InputError where there is none."""
  family = socket.AF_INET6 if ":" in host else socket.AF_INET
  try:
    return socket.create_server((host, port), family=family)
  except OSError as error:
    raise InputError(
      f"--host={host} --port={port} cannot be used ({error}); give another port, or 0 for any."
    ) from error
