"""The pieces of `launch.lab.equivalence training` that no released command does.

Each runs in a process of its own and writes its output when it is done. A training is a folder
"theirs/seed0" of the reference or "ours/seed0" of `launch.train`; fed ones draw nothing, but repeat
what a recorded training of the reference drew.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

from launch.engine.checkpoint import Checkpoints
from launch.lab.equivalence import handover
from launch.lab.reference import Checkouts, model_arguments
from launch.lab.torch_process import SCRIPTS, TorchProcess
from lightningdit_jax import convert, training
from lightningdit_jax.model import build_model
from lightningdit_jax.store import latents
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common import functional
from vavae_jax.common.files import write_json
from vavae_jax.common.optimizer import start
from vavae_jax.weights.state_dicts import read_content
from vavae_jax.weights.torch_writer import write_torch_file

NEEDS = "torch, timm, einops, numpy, pillow, safetensors, scipy and torchdiffeq"
PICTURE = 16  # pixels of a cell in the reference's configuration; only their product counts
PUBLISHED = "published"  # the folder of latents for the reference
RECORD = "record.npz"


class Settings(NamedTuple):
  """What all pieces share."""

  root: Path  # the workdir
  experiment: FrozenConfigDict  # configs/lab/training.py, without a part
  config: FrozenConfigDict  # of the diffusion models
  checkouts: Checkouts

  @property
  def snapshots(self) -> list[int]:
    """The steps of fed trainings after which parameters are compared."""
    steps = self.experiment.fed_steps
    grid = np.unique(np.geomspace(1, steps, 13).round().astype(int))
    return sorted({*grid.tolist(), self.half, steps})

  @property
  def half(self) -> int:
    """The step of fed trainings at which the sides change places."""
    return self.experiment.fed_steps // 2


def initial(settings: Settings, output: Path) -> None:
  """The weights with which every training begins, under the reference's names.

  Also the latents as the reference takes them: its loader takes every .safetensors for a shard.
  """
  store = LatentStore(settings.root / "latents")
  folder = settings.root / PUBLISHED
  folder.mkdir(exist_ok=True)
  for file in latents.shard_files(store.path):
    link = folder / file.name
    link.unlink(missing_ok=True)
    link.symlink_to(file)
  stored = {"mean": store.mean.reshape(1, -1, 1, 1), "std": store.std.reshape(1, -1, 1, 1)}
  write_torch_file(folder / latents.PUBLISHED_STATISTICS, stored)
  params = functional.init(build_model(settings.config), jax.random.key(settings.config.seed))
  module = functional.graph_of(build_model(settings.config))
  tensors = convert.to_torch(nnx.merge(module, jax.device_get(params)))
  write_torch_file(output, tensors)


def theirs(
  settings: Settings,
  output: Path,
  *,
  seed: int,
  threads: int = 1,
  steps: int = 0,
  fed: bool = False,
  replay: str = "",
  state: str = "",
) -> None:
  """A training by the reference's `train.py`.

  Args:
    steps: the last; 0: as many as ours has.
    fed: only the first steps, with what they draw and the parameters between them kept.
    replay: a record of a fed training, to repeat what that drew.
    state: one of `handover.write` to go on from.
  """
  config, root = settings.config, settings.root
  steps = settings.experiment.fed_steps if fed else steps or config.num_steps
  job = {
    **job_of(settings, threads),
    "seed": seed,
    "config": _their_config(settings, steps),
    "decay": config.optimizer.ema_decays[0],
    "folder": str(output.parent),
    "weights": str(root / "initial.pt"),
    "state": state,
    "record": fed and not replay,
    "replay": replay,
    "snapshots": settings.snapshots if fed else [],
  }
  write_json(output, ask("whole_training.py", settings, job))


def _their_config(settings: Settings, steps: int) -> dict[str, Any]:
  """What its `train.py` reads from a YAML file."""
  config, model = settings.config, settings.config.model
  same = ("use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift")
  transport = ("path_type", "prediction", "train_eps", "sample_eps", "use_cosine_loss")
  return {
    "data": {
      "data_path": str(settings.root / PUBLISHED),
      "image_size": model.input_size * PICTURE,
      "num_classes": model.num_classes,
      "num_workers": 0,
      "latent_norm": config.latents.latent_norm,
      "latent_multiplier": config.latents.latent_multiplier,
    },
    "vae": {"downsample_ratio": PICTURE},
    "model": {name: model[name] for name in same}
    | {"model_type": "small", "in_chans": model.in_channels},
    "train": {
      "max_steps": steps,
      "global_batch_size": config.batch_size,
      "log_every": config.log_every_steps,
      "ckpt_every": steps // 2,
    },
    "optimizer": {"lr": config.optimizer.learning_rate, "beta2": config.optimizer.b2},
    "transport": {name: config.transport[name] for name in (*transport, "use_lognorm")}
    | {"loss_weight": config.transport.loss_weight or None},
  }


def ours_fed(settings: Settings, output: Path, *, record: str, checkpoint: str = "") -> None:
  """Our update on what a training of the reference drew, from the start or a checkpoint of its.

  Parameters are kept as the reference's are, and the whole state halfway.
  """
  config = settings.config
  with np.load(record) as file:
    drawn = {name: file[name] for name in file.files}
  if checkpoint:
    state = handover.read(Path(checkpoint), settings.half, config)
  else:
    tensors = read_content(settings.root / "initial.pt")
    state = start(config.optimizer, handover.params_of(tensors, config))
  step_fn = jax.jit(functools.partial(training.update, config), donate_argnums=0)
  output.parent.mkdir(parents=True, exist_ok=True)
  losses = {}
  for i in range(int(state.step), settings.experiment.fed_steps):
    latent, noise = (
      jnp.asarray(np.moveaxis(drawn[name][i], 1, -1)) for name in ("latent", "noise")
    )
    label = jnp.asarray(drawn["label"][i], jnp.int32)
    state, metrics = step_fn(state, latent, noise, jnp.asarray(drawn["t"][i]), label)
    losses[i + 1] = float(metrics["mse"])
    if i + 1 in settings.snapshots:
      np.savez(output.parent / f"{i + 1}.npz", **handover.named_of(state.params, config))
    if i + 1 == settings.half:
      handover.write(output.parent / "state.npz", state, config)
  write_json(output, {"losses": losses})


def to_ours(settings: Settings, output: Path, *, checkpoint: str, workdir: str, step: int) -> None:
  """Makes a workdir, from which `launch.train` goes on, of a checkpoint of the reference."""
  state = handover.read(Path(checkpoint), step, settings.config)
  checkpoints = Checkpoints(Path(workdir), keep_every=settings.config.keep_every_steps)
  checkpoints.save(state, settings.config.to_dict(), wait=True)
  checkpoints.close()
  write_json(output, {"step": step})


def to_theirs(settings: Settings, output: Path, *, workdir: str, step: int) -> None:
  """Writes the state of a checkpoint of `launch.train`, for the reference to go on from."""
  config = settings.config
  abstract = jax.eval_shape(functools.partial(training.init_state, config), jax.random.key(0))
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  wanted = jax.tree.map(lambda x: x.update(sharding=place), abstract)
  checkpoints = Checkpoints(Path(workdir), keep_every=config.keep_every_steps)
  state, _ = checkpoints.restore(step, wanted)
  checkpoints.close()
  handover.write(output, state, config)


def job_of(settings: Settings, threads: int) -> dict[str, Any]:
  model = model_arguments(settings.config.model)
  checkout = str(settings.checkouts.lightningdit.absolute())
  return {"checkout": checkout, "threads": threads, "model": model}


def ask(script: str, settings: Settings, job: dict[str, Any]) -> Any:
  # More threads than cores would spin while they wait for one another.
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  Path(job.get("folder", settings.root)).mkdir(parents=True, exist_ok=True)
  with TorchProcess(settings.checkouts.python, SCRIPTS / script, job, NEEDS) as process:
    return process.about


def losses_of(folder: Path) -> Sequence[tuple[int, float]]:
  """(step, training loss since the line before) of a training, by either side."""
  if (folder / "losses.json").is_file():
    return [(int(k), v) for k, v in json.loads((folder / "losses.json").read_text()).items()]
  lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["mse"]) for line in lines if "mse" in line]
