"""The models that `launch.lab.equivalence` compares: inputs, the job for PyTorch, our side."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

import configs.base
import lightningdit_jax.convert
from launch.lab.equivalence import training as tokenizer_training
from launch.lab.reference import Checkouts, model_arguments, training_job
from launch.weights.recognition import recognise
from lightningdit_jax import internal_guidance, sampling, training
from lightningdit_jax.model import Block, FinalLayer, TimestepEmbedder
from lightningdit_jax.options import PRESETS
from vavae_jax import autoencoder, perceptual, teachers
from vavae_jax import convert as vae
from vavae_jax.common import optimizer
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import inception
from vavae_jax.weights.state_dicts import read_content
from vavae_jax.weights.torch_weights import StateDict

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
  """The flags of the command."""

  reference: Path
  torch_python: str
  model: str
  taming: str = ""
  checkpoint: str = ""
  batch_size: int = 2
  image_size: int = 256
  steps: int = 2
  trajectory: int = 5
  dtypes: tuple[str, ...] = ("float32", "bfloat16")
  seed: int = 0

  @property
  def image_shape(self) -> tuple[int, ...]:
    """A batch of pictures, as PyTorch has it."""
    return self.batch_size, 3, self.image_size, self.image_size

  @property
  def checkouts(self) -> Checkouts:
    """The reference, run without compiling it."""
    return Checkouts(self.reference, self.taming, self.torch_python, compiled=False)


@dataclasses.dataclass(frozen=True)
class Case:
  """A model on both sides."""

  job: dict[str, Any]  # for the PyTorch side, without paths
  inputs: Arrays  # in PyTorch's layout
  run: Callable[[StateDict, str], Arrays]  # (weights, dtype) -> arrays by the reference's keys
  weights: str = ""  # their kind, as `recognise` names it; "": any
  dtypes: tuple[str, ...] = ("float32",)
  # The model has kinks, such as a max pool's tie, where gradients jump: rounding changes some of
  # their elements entirely. They, and parameters after a step, are compared as a whole.
  kinked: bool = False
  rounding: tuple[str, ...] = ()  # ends of names whose gradients are rounding errors: not compared


@contextlib.contextmanager
def recording(*classes: type) -> Iterator[Arrays]:
  """Yields a dict that receives the output of every call of these modules, as "layer/NNN".

  Scans become loops, so that it sees each of their rounds, and branches take one way.
  """
  found: Arrays = {}

  def scan(body: Callable[..., Any], carry: Any, xs: Any, **_: Any) -> tuple[Any, None]:
    for i in range(len(jax.tree.leaves(xs)[0])):
      carry, _ = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    return carry, None

  def kept(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: nnx.Module, *arguments: Any) -> Any:
      output = call(self, *arguments)
      found[f"layer/{len(found):03}"] = _nchw(output)
      return output

    return wrapper

  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(jax.lax, "scan", scan))
    stack.enter_context(
      mock.patch.object(jax, "checkpoint", lambda f=None, **_: f or (lambda f: f))
    )
    stack.enter_context(
      mock.patch.object(jax.lax, "cond", lambda is_so, a, b: a() if is_so else b())
    )
    for watched in classes:
      stack.enter_context(mock.patch.object(watched, "__call__", kept(watched.__call__)))
    yield found


def lightningdit_case(settings: Settings) -> Case:
  """A preset, or the architecture of a checkpoint."""
  size, _, option = settings.model.partition(",")
  config = configs.base.diffusion(size)
  config.model.early_head = 8 if option else 0
  config.optimizer.update(ema_decays=())
  if settings.checkpoint:
    config.model.update(recognise(read_content(settings.checkpoint)).arguments)
  draw = np.random.default_rng(settings.seed)
  cells, channels = config.model.input_size, config.model.in_channels
  shape = (settings.batch_size, channels, cells, cells)
  inputs: Arrays = {name: draw.standard_normal(shape, np.float32) for name in ("latent", "noise")}
  inputs["t"] = np.linspace(0.2, 0.8, settings.batch_size, dtype=np.float32)
  inputs["label"] = draw.integers(config.model.num_classes, size=settings.batch_size)
  job = {
    "model": "lightningdit",
    "arguments": model_arguments(config.model),
    "watch": ["TimestepEmbedder", "LightningDiTBlock", "FinalLayer"],
    "learning_rate": config.optimizer.learning_rate,
    "steps": settings.steps,
    "trajectory": settings.trajectory,
  }
  if option:
    job["guidance"] = GUIDANCE
  run = functools.partial(_run_lightningdit, config.to_dict(), settings, inputs)
  return Case(job, inputs, run, "LightningDiT", ("float32", "bfloat16"))


def _run_lightningdit(
  config: dict[str, Any], settings: Settings, inputs: Arrays, state_dict: StateDict, dtype: str
) -> Arrays:
  frozen = FrozenConfigDict(config | {"dtype": dtype})
  latent, noise = _nhwc(inputs["latent"]), _nhwc(inputs["noise"])
  t, label = jnp.asarray(inputs["t"]), jnp.asarray(inputs["label"], jnp.int32)
  kwargs = {k: v for k, v in frozen.model.items() if k != "attention"}
  model = lightningdit_jax.convert.from_torch(state_dict, **kwargs, dtype=jnp.dtype(dtype))
  graph, weights = nnx.split(model)
  is_guided = bool(config["model"]["early_head"])
  with recording(TimestepEmbedder, Block, FinalLayer) as out:
    model.both(latent, t, label) if is_guided else model(latent, t, label)

  @jax.jit
  def forward(weights: Any, x: jax.Array, t: jax.Array) -> list[jax.Array]:
    model = nnx.merge(graph, weights)
    return model.both(x, t, label) if is_guided else [model(x, t, label)]

  @jax.jit
  def velocity(weights: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    model = nnx.merge(graph, weights)
    if not is_guided:
      return model(x, jnp.full(len(x), t), label)
    away = internal_guidance.extrapolated(model, GUIDANCE["ig_scale"])
    given: dict[str, Any] = {k: value for k, value in GUIDANCE.items() if k != "ig_scale"}
    null = frozen.model.num_classes
    return sampling.guided(away, label, null, cfg_channels=0, **given)(x, t)

  names = ["output/early", "output"] if is_guided else ["output"]
  out |= dict(zip(names, map(_nchw, forward(weights, latent, t)), strict=True))
  if settings.trajectory:
    end = sampling.sample_ode(
      functools.partial(velocity, weights), noise, num_steps=settings.trajectory
    )
    out[f"trajectory/{settings.trajectory - 1}"] = _nchw(end)
  if settings.steps:
    params = nnx.to_pure_dict(weights)
    del weights, model
    out |= _train(frozen, graph, params, (latent, noise, t, label), settings.steps)
  return out


def _train(
  config: FrozenConfigDict, graph: Any, params: Any, batch: tuple[jax.Array, ...], steps: int
) -> Arrays:
  """Gradients of the first step, losses, parameters after the last."""

  def loss(params: Any) -> jax.Array:
    means = {k: jnp.mean(x) for k, x in training.losses(config, params, *batch).items()}
    early = config.transport.early_weight * means.pop("early_mse", jnp.zeros(()))
    return sum(means.values(), start=early)

  def named(group: str, tree: Any) -> Arrays:
    tensors = lightningdit_jax.convert.to_torch(nnx.merge(graph, jax.device_get(tree)))
    computed = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
    return {f"{group}/{name}": x for name, x in tensors.items() if name not in computed}

  out = named("gradient", jax.jit(jax.grad(loss))(params))
  state = optimizer.start(config.optimizer, params)
  step = jax.jit(functools.partial(training.update, config), donate_argnums=0)
  for i in range(steps):
    state, metrics = step(state, *batch)
    out[f"loss/{i}"] = metrics["loss"]
  return out | named("parameter", state.params)


def autoencoder_case(settings: Settings) -> Case:
  """A tokenizer of the reference's `tokenizer/autoencoder.py`."""
  kwargs = autoencoder.preset(settings.model)
  draw = np.random.default_rng(settings.seed)
  cells = settings.image_size // 16
  z_shape = (settings.batch_size, kwargs["embed_dim"], cells, cells)
  inputs = {"image": np.tanh(draw.standard_normal(settings.image_shape, np.float32))}
  inputs["z"] = draw.standard_normal(z_shape, np.float32)
  kind = "marvae" if settings.model.startswith("mar") else "vavae"
  watch = ("ResnetBlock", "AttnBlock", "Downsample", "Upsample")  # both sides name them alike
  job = {
    "model": "autoencoder",
    "arguments": {"embed_dim": kwargs["embed_dim"], "ch_mult": [1, 1, 2, 2, 4], "model_type": kind},
    "watch": watch,
  }

  def run(state_dict: StateDict, dtype: str) -> Arrays:
    model = vae.autoencoder_from_torch(state_dict, **kwargs, dtype=jnp.dtype(dtype))
    with recording(*(getattr(autoencoder, name) for name in watch)) as out:
      posterior = model.encode(_nhwc(inputs["image"]))
      output = model.decode(_nhwc(inputs["z"]))
    named = {"mean": posterior.mean, "logvar": posterior.logvar, "output": output}
    return out | {name: _nchw(x) for name, x in named.items()}

  return Case(job, inputs, run, f"tokenizer {settings.model.removeprefix('mar_')}")


def tokenizer_training_case(settings: Settings) -> Case:
  """The reference's `training_step`, in the published recipe's last stage."""
  if settings.image_size != 256:
    raise InputError(
      f"--image_size is {settings.image_size}; the reference trains tokenizers only at 256 pixels."
    )
  config = configs.base.tokenizer()
  config.model.update(autoencoder.preset(TRAINED[settings.model]))
  config.stages.update({name: column[-1:] for name, column in config.stages.items() if column})
  draw = np.random.default_rng(settings.seed)
  noise_shape = (settings.batch_size, config.model.embed_dim, *[settings.image_size // 16] * 2)
  inputs: Arrays = {}
  for i in range(settings.steps):
    inputs[f"image_{i}"] = draw.integers(256, size=settings.image_shape, dtype=np.uint8)
    inputs[f"noise_{i}"] = draw.standard_normal(noise_shape, np.float32)
  frozen = FrozenConfigDict(config)
  job = {"model": "tokenizer_training", "steps": settings.steps}
  job |= training_job(frozen, settings.checkouts)

  def run(state_dict: StateDict, dtype: str) -> Arrays:
    del dtype  # float32, as tokenizers are trained
    return tokenizer_training.run(frozen, settings.steps, state_dict, inputs)

  # Softmax ignores what all keys have in common.
  return Case(job, inputs, run, kinked=True, rounding=(".k.bias",))


def teacher_case(settings: Settings) -> Case:
  """A teacher as timm has it."""
  inputs = {"image": _pictures(settings)["image"]}
  family, variant = teachers.find(settings.model)
  classes, watch = zip(*family.compared, strict=True)
  job = {"model": "teacher", "name": variant.timm, "watch": watch}

  def run(state_dict: StateDict, dtype: str) -> Arrays:
    model = teachers.teacher_from_torch(settings.model, state_dict, dtype=jnp.dtype(dtype))
    with recording(*classes) as out:
      output = model(_nhwc(inputs["image"]))
    return out | {"output": _nchw(output)}

  return Case(job, inputs, run, f"teacher {settings.model}")


def inception_case(settings: Settings) -> Case:
  """The features of FID, sFID and the inception score by ADM's protocol, and by pytorch-fid's."""
  draw = np.random.default_rng(settings.seed)
  inputs = {"image": draw.integers(256, size=settings.image_shape, dtype=np.uint8)}
  mixed = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")
  job = {"model": "inception", "watch": [f"Mixed_{name}" for name in mixed]}

  def run(state_dict: StateDict, dtype: str) -> Arrays:
    del dtype
    model = inception.from_torch(state_dict)
    image = _nhwc(inputs["image"])
    with recording(inception.Mixed) as out:
      adm = model(inception.adm_input(image))
    features = jax.jit(model.__call__)(inception.pytorch_fid_input(image))
    for name in ("pool3", "spatial", "logits_unbiased"):
      out[f"output/adm {name}"] = adm[name]
    return out | {"output/pytorch-fid pool3": features["pool3"]}

  return Case(job, inputs, run, "FID's Inception")


def lpips_case(settings: Settings) -> Case:
  """LPIPS and its gradient."""
  inputs = _pictures(settings)
  job = {"model": "lpips", "watch": [f"net.slice{i}" for i in range(1, 6)]}

  def run(state_dict: StateDict, dtype: str) -> Arrays:
    model = vae.lpips_from_torch(state_dict, dtype=jnp.dtype(dtype))
    image, other = _nhwc(inputs["image"]), _nhwc(inputs["other"])
    with recording(perceptual._Slice) as out:
      output = model(image, other)
    gradient = jax.grad(lambda other: model(image, other).sum())(other)
    return out | {"output": output, "gradient/other": _nchw(gradient)}

  return Case(job, inputs, run, "LPIPS", kinked=True)


# Two steps of both optimizers, with LPIPS, PatchGAN and DINOv2-L, of the reference's `vavae/`.
TRAINED = {f"{name}_training": name for name in ("f16d16", "f16d32", "f16d64")}
TEACHERS = tuple(name for name in teachers.NAMES if teachers.find(name)[1].timm)
# Of the trajectory of a model with an early head, as its authors name and set it.
GUIDANCE = {"ig_scale": 1.4, "cfg_scale": 1.45, "cfg_interval_start": 0.19}
CASES: Mapping[str, Callable[[Settings], Case]] = {
  **dict.fromkeys(PRESETS, lightningdit_case),
  **dict.fromkeys((f"{name},internal_guidance" for name in PRESETS), lightningdit_case),
  **dict.fromkeys(("f16d16", "f16d32", "f16d64", "mar_f16d16"), autoencoder_case),
  **dict.fromkeys(TRAINED, tokenizer_training_case),
  **dict.fromkeys(TEACHERS, teacher_case),
  "lpips": lpips_case,
  "fid_inception": inception_case,
}


def make_case(settings: Settings) -> Case:
  """The case of `settings.model`."""
  size = settings.image_size
  if settings.model.partition(",")[0] not in PRESETS and (size < 16 or size % 16):
    raise InputError(f"--image_size is {size}; give a multiple of 16.")
  return CASES[settings.model](settings)


def _pictures(settings: Settings) -> Arrays:
  draw, shape = np.random.default_rng(settings.seed), settings.image_shape
  return {name: np.tanh(draw.standard_normal(shape, np.float32)) for name in ("image", "other")}


def _nhwc(array: np.ndarray) -> jax.Array:
  return jnp.asarray(np.moveaxis(array, 1, -1))


def _nchw(array: jax.Array) -> jax.Array:
  return jnp.moveaxis(array, -1, 1) if array.ndim == 4 else array
