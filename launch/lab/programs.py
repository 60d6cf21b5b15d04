"""The programs that devices run, with shapes for arrays, to be planned or measured.

Neither data nor weights of frozen networks are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import FrozenConfigDict

import vavae_jax.training
from launch import restore, tasks
from launch.engine import flops
from launch.engine.step import jit_step
from lightningdit_jax import encoding
from lightningdit_jax.sampling import sample_latents
from vavae_jax import frozen, stages
from vavae_jax.common import functional, mesh
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import BATCH_AXES
from vavae_jax.metrics import inception

ALL = ("train", "sample", "encode", "decode", "features")
WHAT = {"diffusion": ("train", "sample"), "tokenizer": ("train", "encode", "decode", "features")}
CODED_PER_DEVICE = 64  # pictures


class Program(NamedTuple):
  """A function to compile, and its arguments."""

  function: Any  # jitted
  arguments: tuple[Any, ...]  # static ones, then shapes with shardings
  parts: dict[str, Any]  # name -> shapes whose memory a plan shows
  runs: float  # how often it would run
  images: int  # of each run
  statics: int = 0  # how many of the first arguments are static
  handed_on: int | None = None  # the array argument that is the first result of the run before

  @property
  def arrays(self) -> tuple[Any, ...]:
    """The arguments that a compiled program takes."""
    return self.arguments[self.statics :]


def check(config: FrozenConfigDict, what: str) -> None:
  """Raises InputError where a task has no such program."""
  if what not in WHAT[config.task]:
    raise InputError(
      f"--what={what} does not apply to a {config.task}; choose one of "
      f"{', '.join(WHAT[config.task])}."
    )


def of(
  config: FrozenConfigDict, devices: Mesh, what: str, num_images: int, coded: int = 0
) -> Program:
  """One of `WHAT`, not traced yet; InputError if its batch does not divide over the devices.

  `num_images` are sampled, encoded, decoded or looked at in all, `coded` of them in a batch to
  encode, decode or look at (0: `CODED_PER_DEVICE`).
  """
  if what == "train":
    return _train(config, devices)
  if what == "sample":
    return _sample(config, devices, num_images)
  make = {"encode": _encode, "decode": _decode, "features": _features}[what]
  return make(config, devices, coded or CODED_PER_DEVICE * devices.size, num_images)


def traced(program: Program, devices: Mesh) -> Any:
  """The program's trace."""
  with jax.set_mesh(devices):
    return program.function.trace(*program.arguments)


def count(program: Program, devices: Mesh) -> float:
  """FLOPs of a run on all devices."""
  return flops.count(traced(program, devices).jaxpr)


def _train(config: FrozenConfigDict, devices: Mesh) -> Program:
  """The training step as the loop runs it, in its most expensive phase."""
  task = tasks.of(config)
  step: Any = task.train_step
  weights: dict[str, Any] = {}
  phase: Any = task.phase(config, 1)
  if config.task == "tokenizer":
    step, weights = _with_fresh_networks(config)
    phase = stages.Phase(len(config.stages.epochs) - 1, gan=config.loss.disc_weight > 0)
  state = jax.eval_shape(functools.partial(task.init_state, config), jax.random.key(0))
  shardings = mesh.parameter_shardings(state, devices)
  state = jax.tree.map(_sharded, state, shardings)
  on_platform = devices.devices.flat[0].platform
  weights = jax.eval_shape(lambda x: frozen.as_multiplied(x, on_platform), weights)
  weights = everywhere(weights, devices)
  batch = _batch(config, config.batch_size, devices)
  key = everywhere(jax.eval_shape(lambda: jax.random.key(0)), devices)
  parts = {
    "parameters": state.params,
    "averages": state.ema,
    "optimizer": [x for name, x in vars(state).items() if name not in ("params", "ema")],
    "frozen networks": weights,
    "batch": batch,
  }
  function, arguments = jit_step(step, config, shardings), (phase, state, weights, batch, key)
  runs, size = config.num_steps, config.batch_size
  return Program(function, arguments, parts, runs, size, statics=1, handed_on=0)


def _with_fresh_networks(config: FrozenConfigDict) -> tuple[Callable[..., Any], dict[str, Any]]:
  """The tokenizer's step and the shapes of its frozen networks' weights, without their files."""
  networks = functional.abstract(lambda rngs: frozen.fresh(config, rngs))
  split = {name: nnx.split(network) for name, network in networks.items()}

  def merge(_: FrozenConfigDict, weights: dict[str, Any]) -> dict[str, Any]:
    return {name: nnx.merge(graph, weights[name]) for name, (graph, _) in split.items()}

  weights = {name: nnx.to_pure_dict(state) for name, (_, state) in split.items()}
  return functools.partial(vavae_jax.training.train_step, merge=merge), weights


def _sample(config: FrozenConfigDict, devices: Mesh, num_samples: int) -> Program:
  """Sampling of latents, as `launch.sample` does before it decodes them."""
  size = config.sample.batch_size * devices.size
  params = _params(config, devices)
  batch = _batch(config, size, devices)
  index = rows((size,), jnp.int32, devices)
  run = jax.jit(functools.partial(sample_latents, config, seed=0, sample=config.sample))
  arguments = (params, index, batch["label"])
  return Program(run, arguments, {"parameters": params}, num_samples / size, size)


def _encode(config: FrozenConfigDict, devices: Mesh, batch_size: int, num_images: int) -> Program:
  """Encoding of pictures, as `launch.encode` does on each host."""
  params = _params(config, devices)

  def run(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    model = restore.autoencoder(config, params)
    return encoding.columns(model, batch, seed=0, dtype="float32", moments=False)

  batch = _batch(config, batch_size, devices)
  batch["index"] = rows((batch_size,), jnp.int32, devices)
  parts = {"parameters": params, "batch": batch}
  return Program(jax.jit(run), (params, batch), parts, num_images / batch_size, batch_size)


def _decode(config: FrozenConfigDict, devices: Mesh, batch_size: int, num_images: int) -> Program:
  """Decoding of latents to pictures of uint8, as `launch.sample` does behind its solver."""
  mesh.check_batch_size(batch_size, devices)
  params = _params(config, devices)
  z_BhwZ = rows((batch_size, *vavae_jax.training.latent_shape(config)), jnp.float32, devices)

  def run(params: Any, z_BhwZ: jax.Array) -> jax.Array:
    return restore.autoencoder(config, params).decode_uint8(z_BhwZ)

  parts = {"parameters": params, "batch": z_BhwZ}
  return Program(jax.jit(run), (params, z_BhwZ), parts, num_images / batch_size, batch_size)


def _features(config: FrozenConfigDict, devices: Mesh, batch_size: int, num_images: int) -> Program:
  """Features and probabilities of pictures by Inception, as `launch.evaluate` takes them."""
  network = functional.abstract(lambda rngs: inception.InceptionV3(rngs=rngs))
  graph, state = nnx.split(network)
  params = everywhere(nnx.to_pure_dict(state), devices)

  def run(params: Any, image_BHWC: jax.Array) -> tuple[jax.Array, ...]:
    out = nnx.merge(graph, params)(inception.adm_input(image_BHWC))
    return out["pool3"], out["spatial"], jax.nn.softmax(out["logits_unbiased"])

  images = _batch(config, batch_size, devices)["image"]
  parts = {"parameters": params, "batch": images}
  return Program(jax.jit(run), (params, images), parts, num_images / batch_size, batch_size)


def _params(config: FrozenConfigDict, devices: Mesh) -> Any:
  """What inference restores of a training: its parameters or an average, whole on every device."""
  init = functools.partial(tasks.of(config).init_state, config)
  return everywhere(jax.eval_shape(init, jax.random.key(0)).params, devices)


def _batch(config: FrozenConfigDict, size: int, devices: Mesh) -> dict[str, Any]:
  """A batch as the task's data have it."""
  mesh.check_batch_size(size, devices)
  label = {"label": rows((size,), jnp.int32, devices)}
  if config.task != "diffusion":
    side = config.data.image_size
    image = {"image": rows((size, side, side, 3), jnp.uint8, devices)}
    return image | (label if config.task == "classifier" else {})
  shape = (size, config.model.input_size, config.model.input_size, config.model.in_channels)
  return {"latent": rows(shape, jnp.float32, devices)} | label


def rows(shape: tuple[int, ...], dtype: Any, devices: Mesh) -> jax.ShapeDtypeStruct:
  """The shape of a batch, its leading axis over all devices."""
  sharding = NamedSharding(devices, PartitionSpec(BATCH_AXES))
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def everywhere(tree: Any, devices: Mesh) -> Any:
  """The shapes of a tree, each whole on every device."""
  return jax.tree.map(lambda x: _sharded(x, mesh.replicated(devices)), tree)


def _sharded(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
