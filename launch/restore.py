"""Workdirs back to models, and what a training begins with where `config.init_from` names weights.

A training that begins with given weights starts moments, moving averages and the tokenizer's
discriminator afresh.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

import lightningdit_jax.warm_start
import vavae_jax.training
import vavae_jax.warm_start
from launch import tasks
from launch.engine import console, mesh
from launch.engine.batches import in_batches
from launch.engine.checkpoint import restore_item
from lightningdit_jax.store import fetching
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.autoencoder import Autoencoder
from vavae_jax.common import functional
from vavae_jax.common.addresses import local_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url, place
from vavae_jax.common.optimizer import ema_name, start_emas
from vavae_jax.data import images
from vavae_jax.weights.state_dicts import SUFFIXES, read_state_dict

# A classifier has no `init_from`.
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

  @functools.cached_property
  def sha256(self) -> str:
    """Identifies the parameters."""
    return functional.fingerprint(self.params)

  def on(self, devices: jax.sharding.Mesh) -> Trained:
    """The same, the parameters on every device of a mesh: of several processes each has its own."""
    here = jax.tree.map(lambda x: x.addressable_data(0), self.params)
    return dataclasses.replace(self, params=jax.device_put(here, mesh.replicated(devices)))


def load(
  workdir: Path, task_name: str, step: int | None = None, ema: float | None = None
) -> Trained:
  """Restores what inference needs from a training's workdir.

  Args:
    task_name: what the training must be of, a key of `tasks.TASKS`.
    step: of the checkpoint; the newest if None.
    ema: decay of the wanted average, 0 for the parameters themselves; None: the first one of
      `config.optimizer.ema_decays`, or where there is none the parameters.

  Raises:
    InputError: not a workdir, of another task, or without a checkpoint or such an average.
  """
  config = tasks.noted(workdir)
  if config.task != task_name:
    raise InputError(f"{workdir} is the workdir of a {config.task}, but a {task_name} is needed.")
  init = functools.partial(tasks.TASKS[task_name].init_state, config)
  try:
    state = jax.eval_shape(init, jax.random.key(0))
  except (AttributeError, KeyError, TypeError) as error:
    raise InputError(
      f"{workdir}: its config.json does not describe a model of this version ({error}); bring back "
      "the file as it was."
    ) from error
  decays = config.optimizer.ema_decays
  if ema is None:
    ema = decays[0] if decays else 0.0
  elif ema and ema not in decays:
    raise InputError(
      f"{workdir} keeps no average of decay {ema}, only {decays or 'none'}; 0 stands for the "
      "parameters themselves."
    )
  item = f"ema_{ema_name(ema)}" if ema else "params"
  everywhere = mesh.replicated(mesh.make_mesh())
  like = jax.tree.map(lambda x: x.update(sharding=everywhere), state.params)
  params, step = restore_item(workdir, item, like, step)
  return Trained(workdir, config, step, params, ema)


def autoencoder(config: FrozenConfigDict, params: Any) -> Autoencoder:
  """The autoencoder of a tokenizer's configuration, with parameters of its training."""
  graph = functional.graph_of(vavae_jax.training.build_autoencoder(config))
  return nnx.merge(graph, params["autoencoder"])


def tokenizer_of(config: FrozenConfigDict, override: Path | None = None) -> Trained:
  """The tokenizer whose latents a diffusion model of this configuration was trained on.

  `override` is its workdir, for latents that do not say where it is. For errors see the two below.
  """
  return tokenizer_of_latents(check_latents(config), override or config.tokenizer)


def tokenizer_of_latents(store: LatentStore, workdir: Path | str = "") -> Trained:
  """The tokenizer that made a latent store, in `workdir` or, if that is "", where the store says.

  Raises:
    InputError: the tokenizer is unknown or another one.
  """
  noted = store.manifest.get("tokenizer", {})
  workdir = workdir or noted.get("workdir", "")
  if not workdir:
    raise InputError(
      f"The latents in {store.path} do not say which tokenizer made them; give --tokenizer=WORKDIR."
    )
  tokenizer = load(place(str(workdir)), "tokenizer", noted.get("step"))
  if noted and noted.get("sha256") != tokenizer.sha256:
    theirs = str(noted.get("sha256"))
    raise InputError(
      f"The tokenizer in {workdir} is not the one that made the latents in {store.path} (sha256 "
      f"{tokenizer.sha256[:12]} and {theirs[:12]}): samples would decode to noise. Give "
      "--tokenizer=WORKDIR of the right one, or encode and train again."
    )
  return tokenizer


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


def reconstruct(tokenizer: Trained, image_BHWC: np.ndarray, batch_size: int = 64) -> np.ndarray:
  """uint8 pictures through the autoencoder and back, by the posterior's mode."""

  @jax.jit
  def run(params: Any, batch: jax.Array) -> jax.Array:
    model = autoencoder(tokenizer.config, params)
    return model.decode_uint8(model.encode(images.to_float(batch)).mode())

  rebuild = functools.partial(run, tokenizer.params)
  return np.concatenate(list(in_batches(rebuild, image_BHWC, batch_size, mesh.make_mesh())))


def initial_weights(config: FrozenConfigDict) -> Callable[[Any], Any] | None:
  """A function from a fresh state to one with the weights of `config.init_from`, in the averages
  too; None where it names none.

  Raises:
    InputError: nothing readable there, or, when the function is called, weights of another
      architecture.
  """
  if not config.get("init_from"):
    return None
  path = place(config.init_from) if is_url(config.init_from) else local_file(config.init_from)
  if path.is_dir():
    # As in the reference the weights themselves, whose averages begin anew.
    given = load(path, config.task, ema=0.0).params
  elif path.is_file():
    warm_start = _WARM_STARTS[config.task]
    given = warm_start.from_state_dict(read_state_dict(path, warm_start.MARKS), config.model)
  else:
    raise InputError(
      f"config.init_from is {path}, which does not exist; give a training's workdir, or a file of "
      f"weights ({', '.join(SUFFIXES)})."
    )

  def adopt(state: Any) -> Any:
    params, notes = _WARM_STARTS[config.task].adapt(state.params, given)
    for note in notes:
      console.say(f"initial weights: {note}")
    console.say(f"initial weights: from {path}")
    emas = start_emas(params, config.optimizer.ema_decays)
    return dataclasses.replace(state, params=params, ema=emas)

  return adopt


def check_initial_weights(config: FrozenConfigDict) -> None:
  """Raises InputError where a training could not begin with the weights of `config.init_from`."""
  if adopt := initial_weights(config):
    init = functools.partial(tasks.TASKS[config.task].init_state, config)
    jax.eval_shape(adopt, jax.eval_shape(init, jax.random.key(0)))
