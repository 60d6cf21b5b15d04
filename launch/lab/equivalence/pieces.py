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

from launch import restore
from launch.engine.checkpoint import Checkpoints
from launch.lab.equivalence import handover
from launch.lab.reference import Checkouts
from launch.lab.torch_process import SCRIPTS, TorchProcess
from lightningdit_jax import convert, sampling, training
from lightningdit_jax.model import ONLY_OURS, build_model
from lightningdit_jax.store import latents
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common import functional
from vavae_jax.common.files import write_json
from vavae_jax.common.optimizer import State, ema_name, start
from vavae_jax.metrics.distribution import Gaussian, Moments
from vavae_jax.weights.state_dicts import read_content
from vavae_jax.weights.torch_writer import write_torch_file

NEEDS = "torch, timm, einops, numpy, pillow, safetensors, scipy and torchdiffeq"
PICTURE = 16  # pixels of a cell in the reference's configuration; only their product counts
PUBLISHED = "published"  # the folder of latents for the reference
RECORD = "record.npz"
SAMPLE_SEED = 0


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
  fed: bool = False,
  replay: str = "",
  state: str = "",
) -> None:
  """A training by the reference's `train.py`.

  Args:
    fed: only the first steps, with what they draw and the parameters between them kept.
    replay: a record of a fed training, to repeat what that drew.
    state: one of `handover.write` to go on from.
  """
  config, root = settings.config, settings.root
  steps = settings.experiment.fed_steps if fed else config.num_steps
  job = {
    **_job(settings, threads),
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
  write_json(output, _ask("whole_training.py", settings, job))


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
    latent, noise = (jnp.asarray(np.moveaxis(drawn[name][i], 1, -1)) for name in ("latent", "noise"))
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


def inputs(settings: Settings, output: Path) -> None:
  """What all weights are judged on: held-out latents with noise and times, noise of samples."""
  config = settings.config
  shape = (config.model.input_size,) * 2 + (config.model.in_channels,)
  held_out = LatentStore(settings.root / "held_out")
  count = min(config.latents.valid_samples, len(held_out))
  index, every = np.arange(count), np.arange(settings.experiment.num_samples)
  noise = [
    np.moveaxis(np.asarray(sampling.noise_of(seed, jnp.asarray(rows), shape)), -1, 1)
    for seed, rows in ((training.VALIDATION_SEED, index), (SAMPLE_SEED, every))
  ]
  arrays = {
    "latent": np.moveaxis(_normalised(settings, held_out, index), -1, 1),
    "label": held_out.labels_of(index).astype(np.int64),
    "noise": noise[0],
    "t": training.validation_times(config).astype(np.float32),
    "sample_noise": noise[1],
    "sample_label": every % config.model.num_classes,
  }
  np.savez(output, **arrays)


def judged_by_ours(settings: Settings, output: Path, *, weights: str) -> None:
  """Losses and samples of weights, a workdir of ours or a checkpoint of theirs, by our code."""
  config = settings.config
  params = _average(settings, Path(weights))
  state = State(jnp.zeros(()), params, {ema_name(config.optimizer.ema_decays[0]): params}, None)
  losses = training.validation(config)(state)
  times = [f"_t{t:.2f}" for t in training.validation_times(config)]
  found = {kind: np.array([losses[kind + t] for t in times]) for kind in ("mse", "cosine")}
  index = np.arange(settings.experiment.num_samples, dtype=np.int32)
  label, size = index % config.model.num_classes, config.sample.batch_size
  for name, scale in (("plain", 1.0), ("guided", config.sample.cfg_scale)):
    sample = FrozenConfigDict(config.sample.to_dict() | {"cfg_scale": scale})
    draw = functools.partial(sampling.sample_latents, config, seed=SAMPLE_SEED, sample=sample)
    run = jax.jit(lambda params, index, label, draw=draw: draw(params, index, label))
    parts = [run(params, index[i : i + size], label[i : i + size]) for i in index[::size]]
    found[name] = np.moveaxis(np.concatenate([np.asarray(x) for x in parts]), -1, 1)
  _figures(settings, output, found, params)


def judged_by_theirs(settings: Settings, output: Path, *, weights: str) -> None:
  """The same by the reference's code."""
  path, params = Path(weights), _average(settings, Path(weights))
  if path.is_dir():
    path = output.with_suffix(".pt")
    module = functional.graph_of(build_model(settings.config))
    write_torch_file(path, convert.to_torch(nnx.merge(module, jax.device_get(params))))
  names = ("num_steps", "method", "atol", "rtol", "timestep_shift", "cfg_scale")
  sample = settings.config.sample
  job = _job(settings, 1) | {
    "weights": str(path),
    "sample": {name: sample[name] for name in (*names, "cfg_interval_start")},
    "batch_size": sample.batch_size,
    "inputs": str(settings.root / "inputs.npz"),
    "outputs": str(output.with_suffix(".there.npz")),
  }
  _ask("judging.py", settings, job)
  with np.load(job["outputs"]) as file:
    found = {name: file[name] for name in file.files}
  _figures(settings, output, found, params)


def _figures(settings: Settings, output: Path, found: dict[str, np.ndarray], params: Any) -> None:
  """Writes the figures of weights, and the samples beside them."""
  np.savez(output.with_suffix(".npz"), **{name: found[name] for name in ("plain", "guided")})
  distances = {}
  gaussian = _gaussian(settings)
  for name in ("plain", "guided"):
    moments = Moments()
    moments.update(found[name].reshape(len(found[name]), -1))
    distances[name] = float(gaussian.distance(moments.mean, moments.cov).distance)
  squares = (np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(params))
  figures = {name: found[name].tolist() for name in ("mse", "cosine")}
  write_json(output, figures | distances | {"norm": float(np.sqrt(sum(squares)))})


def real(settings: Settings, output: Path) -> None:
  """The distance of held-out latents, as many as there are samples or fewer."""
  store = LatentStore(settings.root / "held_out")
  index = np.arange(min(settings.experiment.num_samples, len(store)))
  gaussian = _gaussian(settings)
  moments = Moments()
  moments.update(_flat(_normalised(settings, store, index)))
  distance = float(gaussian.distance(moments.mean, moments.cov).distance)
  write_json(output, {"distance": distance, "count": len(index)})


def _gaussian(settings: Settings) -> Gaussian:
  """That of the latents that are trained on, normalised, all cells of a picture together."""
  path = settings.root / "moments.npz"
  if not path.exists():
    store = LatentStore(settings.root / "latents")
    moments = Moments()
    for rows in np.array_split(np.arange(len(store)), -(-len(store) // 5_000)):
      moments.update(_flat(_normalised(settings, store, rows)))
    np.savez(path, mean=moments.mean, cov=moments.cov)
  with np.load(path) as file:
    return Gaussian(file["mean"], file["cov"])


def _flat(latent_NhwZ: np.ndarray) -> np.ndarray:
  return np.moveaxis(latent_NhwZ, -1, 1).reshape(len(latent_NhwZ), -1)


def _normalised(settings: Settings, store: LatentStore, rows: np.ndarray) -> np.ndarray:
  """Records of a store [N,h,w,Z], scaled as training scales them."""
  trained, given = LatentStore(settings.root / "latents"), settings.config.latents
  out = np.empty((len(rows), *store.shape), np.float32)
  store.read(rows, np.zeros(len(rows), bool), out=out)
  mean, std = latents.statistics(trained, latent_norm=given.latent_norm)
  return latents.normalise(out, mean, std, given.latent_multiplier).astype(np.float32)


def _average(settings: Settings, path: Path) -> Any:
  """The averaged weights of a workdir of ours, or of a checkpoint of the reference."""
  if path.is_dir():
    return restore.load(path, "diffusion").params
  return handover.params_of(read_content(path)["ema"], settings.config)


def _job(settings: Settings, threads: int) -> dict[str, Any]:
  model = {k: v for k, v in settings.config.model.items() if k not in ONLY_OURS}
  checkout = str(settings.checkouts.lightningdit.absolute())
  return {"checkout": checkout, "threads": threads, "model": model}


def _ask(script: str, settings: Settings, job: dict[str, Any]) -> Any:
  # More threads than cores would spin while they wait for one another.
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  Path(job.get("folder", settings.root)).mkdir(parents=True, exist_ok=True)
  with TorchProcess(settings.checkouts.python, SCRIPTS / script, job, NEEDS) as process:
    return process.about


PIECES = {
  function.__name__: function
  for function in (
    *(initial, theirs, ours_fed, to_ours, to_theirs),
    *(inputs, real, judged_by_ours, judged_by_theirs),
  )
}


def losses_of(folder: Path) -> Sequence[tuple[int, float]]:
  """(step, training loss since the line before) of a training, by either side."""
  if (folder / "losses.json").is_file():
    return [(int(k), v) for k, v in json.loads((folder / "losses.json").read_text()).items()]
  lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
  return [(line["step"], line["mse"]) for line in lines if "mse" in line]
