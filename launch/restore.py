"""Workdirs back to models, and what a training begins with where `config.init_from` names weights.

A training that begins with given weights starts moments, moving averages and the tokenizer's
discriminator afresh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
import lightningdit_jax.warm_start
import vavae_jax.training
import vavae_jax.warm_start
from launch import tasks
from launch.engine import console
from lightningdit_jax.model import build_model
from lightningdit_jax.pipeline import SETTINGS as DIFFUSION
from lightningdit_jax.pipeline import Pipeline
from lightningdit_jax.store import fetching, space
from lightningdit_jax.store.latents import LatentStore
from lightningdit_jax.store.space import Space, find_tokenizer, place_of_tokenizer
from vavae_jax import folder
from vavae_jax.autoencoder import Autoencoder
from vavae_jax.common import functional, mesh
from vavae_jax.common.checkpoints import load_weights
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import start_emas
from vavae_jax.tokenizer import SETTINGS as TOKENIZER
from vavae_jax.tokenizer import Tokenizer
from vavae_jax.update import build_autoencoder
from vavae_jax.weights.state_dicts import SUFFIXES, read_state_dict

# A classifier has no `init_from`.
_FOLDERS: dict[str, Any] = {
  "tokenizer": (TOKENIZER, build_autoencoder),
  "diffusion": (DIFFUSION, build_model),
}
_DEFAULTS = {"tokenizer": configs.base.tokenizer, "diffusion": configs.base.diffusion}
# Where a training found what a model folder does not know.
_TRAINED_ON = {
  "tokenizer": (("data", "source"), ("teacher", "name")),
  "diffusion": (("latents", "path"),),
}
_WARM_STARTS: dict[str, Any] = {
  "tokenizer": vavae_jax.warm_start,
  "diffusion": lightningdit_jax.warm_start,
}


@dataclasses.dataclass(frozen=True)
class Trained:
  """A trained model, with workdir and configuration of its training."""

  workdir: Path
  config: FrozenConfigDict
  step: int  # of the checkpoint
  params: Any  # the wanted EMA, or the parameters; on every device
  ema: float = 0.0  # decay of the EMA; 0: the parameters themselves
  space: Space | None = None  # of a diffusion model, where its workdir or folder notes it
  identity: str = ""  # of the parameters, where a model folder notes it

  @functools.cached_property
  def sha256(self) -> str:
    """Identifies the parameters."""
    return self.identity or functional.fingerprint(self.params)

  def on(self, devices: jax.sharding.Mesh) -> Trained:
    """The same, the parameters on every device of a mesh: of several processes each has its own."""
    here = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), self.params)
    return dataclasses.replace(self, params=jax.device_put(here, mesh.replicated(devices)))


def load(
  workdir: Path, task_name: str, step: int | None = None, ema: float | None = None
) -> Trained:
  """Restores what inference needs from a training's workdir, or from a model folder.

  Args:
    task_name: what the training must be of, a key of `tasks.TASKS`.
    step: of the checkpoint; the newest if None.
    ema: decay of the wanted average, 0 for the parameters themselves; None: the first one of
      `config.optimizer.ema_decays`, or where there is none the parameters.

  Raises:
    InputError: not a workdir, of another task, or without a checkpoint or such an average.
  """
  if folder.is_model(workdir):
    return _of_folder(workdir, task_name, step, ema)
  config = tasks.noted(workdir)
  if config.task != task_name:
    raise InputError(f"{workdir} is the workdir of a {config.task}, but a {task_name} is needed.")
  init_state = tasks.TASKS[task_name].init_state
  params, step, ema = load_weights(workdir, config, init_state, step, ema, console.say)
  noted = workdir / space.NOTE
  return Trained(workdir, config, step, params, ema, Space.read(noted) if noted.exists() else None)


def _of_folder(path: Path, task_name: str, step: int | None, ema: float | None) -> Trained:
  """The model of a model folder, with the other keys of its configuration at their defaults."""
  if task_name not in _FOLDERS:
    raise InputError(f"{path} is a model folder; it holds no {task_name}.")
  table, build = _FOLDERS[task_name]
  part, whole = folder.load(path, task_name, table, build, step, ema)
  config = {**_DEFAULTS[task_name]().to_dict()}
  for name, value in part.settings.items():
    config[name] = {**config[name], **value} if isinstance(value, dict) else value
  for section, name in _TRAINED_ON.get(task_name, ()):
    config[section] = {**config[section], name: ""}
  params = jax.device_put(part.params, mesh.replicated(mesh.make_mesh()))
  if task_name == "tokenizer":
    params = {"autoencoder": params}
  known = Space.of_folder(path, whole) if task_name == "diffusion" else None
  return Trained(
    path,
    FrozenConfigDict(ConfigDict(config)),
    part.origin["step"],
    params,
    part.origin["ema"],
    known,
    part.origin["sha256"],
  )


def data_of(tokenizer: Trained) -> FrozenConfigDict:
  """The pictures that it was trained on, `config.data`; InputError for a model folder's."""
  if not tokenizer.config.data.source:
    raise InputError(f"{folder.address(tokenizer.workdir)} knows no pictures; give some: --source.")
  return tokenizer.config.data


def autoencoder(config: FrozenConfigDict, params: Any) -> Autoencoder:
  """The autoencoder of a tokenizer's configuration, with parameters of its training."""
  graph = functional.graph_of(vavae_jax.training.build_autoencoder(config))
  return nnx.merge(graph, params["autoencoder"])


def space_of(model: Trained) -> Space:
  """The latent space of a diffusion model; InputError where nothing says it any more."""
  return model.space or Space.of(check_latents(model.config))


def tokenizer_of(model: Trained, override: Path | str = "") -> Trained:
  """The tokenizer whose latents a diffusion model was trained on.

  `override` names it as for `folder.find`, where it is not at its place. For errors see below.
  """
  if folder.is_model(model.workdir) and not override:
    return load(model.workdir, "tokenizer")
  noted = space_of(model).tokenizer
  given, of = str(override or model.config.tokenizer), folder.address(model.workdir)
  return find_tokenizer(noted, _load_tokenizer, of=of, given=given, workdir=model.workdir)


def lacking(noted: Mapping[str, Any], workdir: Path, given: str = "") -> list[str]:
  """The flag that sampling from a workdir needs where its latents' tokenizer is not found.

  The arguments are those of `place_of_tokenizer`.
  """
  try:
    place_of_tokenizer(noted, of="", given=given, workdir=workdir)
  except InputError:
    return ["--tokenizer=TOKENIZER"]
  return []


def tokenizer_of_latents(store: LatentStore, workdir: Path | str = "") -> Trained:
  """The tokenizer that made a latent store, in `workdir` or, if that is "", where the store says.

  Raises:
    InputError: the tokenizer is unknown, gone, or another one.
  """
  noted = Space.of(store).tokenizer
  return find_tokenizer(noted, _load_tokenizer, of=str(store.path), given=str(workdir))


def _load_tokenizer(path: Path, step: int | None) -> Trained:
  return load(path, "tokenizer", step)


def for_use(model: Trained, tokenizer: Trained | None = None) -> Pipeline | Tokenizer:
  """A model as Python uses it and model folders keep it: a diffusion model with its tokenizer, or
  without that a tokenizer.
  """
  if not tokenizer:
    return Tokenizer(model.config, model.params["autoencoder"], _origin(model))
  own = Tokenizer(tokenizer.config, tokenizer.params["autoencoder"], _origin(tokenizer))
  return Pipeline(model.config, model.params, own, space_of(model), _origin(model))


def _origin(trained: Trained) -> dict[str, Any]:
  return {"step": trained.step, "ema": trained.ema, "sha256": trained.sha256}


def open_latents(path: str, cache: str = "") -> LatentStore:
  """The latents at an address; a bar shows the progress of a copy into `cache`."""
  with contextlib.ExitStack() as stack:
    bars: list[console.Bar] = []

    def show(_: str, done: int, total: int) -> None:
      if not bars:
        bars.append(stack.enter_context(console.Bar("copy latents (MiB)", total >> 20)))
      bars[0].update(done >> 20)

    fetching.local_folder(path, cache, show)
  return fetching.open_store(path, cache)


def check_latents(config: FrozenConfigDict) -> LatentStore:
  """The latents of a diffusion configuration; InputError if it names others by `latents.sha256`."""
  store = open_latents(config.latents.path, config.latents.cache)
  if config.latents.sha256 not in ("", store.sha256):
    raise InputError(
      f"The model was trained on other latents than those that {store.path} holds now: its samples "
      "would decode to noise. Bring those back, or give a new --workdir to train on these."
    )
  return store


def initial_file(config: FrozenConfigDict) -> Path | None:
  """The file or folder that `config.init_from` names, if it names one; InputError if it is none."""
  try:
    return folder.find(config.init_from, files=SUFFIXES) if config.get("init_from") else None
  except InputError as error:
    raise InputError(f"config.init_from: {error}") from error


def initial_weights(config: FrozenConfigDict) -> Callable[[Any], Any] | None:
  """A function from a fresh state to one with the weights of `config.init_from`, in the averages
  too; None where it names none.

  Raises:
    InputError: nothing readable there, or, when the function is called, weights of another
      architecture.
  """
  if not (path := initial_file(config)):
    return None
  if path.is_file():
    warm_start = _WARM_STARTS[config.task]
    given = warm_start.from_state_dict(read_state_dict(path, warm_start.MARKS), config.model)
  else:
    # As in the reference the weights themselves, whose averages begin anew.
    given = load(path, config.task, ema=None if folder.is_model(path) else 0.0).params

  def adopt(state: Any) -> Any:
    params, notes = _WARM_STARTS[config.task].adapt(state.params, given)
    for note in notes:
      console.say(f"initial weights: {note}")
    console.say(f"initial weights: from {folder.address(path) if path.is_dir() else path}")
    emas = start_emas(params, config.optimizer.ema_decays)
    return dataclasses.replace(state, params=params, ema=emas)

  return adopt
