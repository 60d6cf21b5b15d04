"""What `launch.lab.equivalence` compares: inputs, what the PyTorch side is told, our side."""

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
from launch.lab.reference import Checkouts, training_job
from launch.weights.recognition import Weights, recognise
from lightningdit_jax import sampling, training
from lightningdit_jax.model import ONLY_OURS, PRESETS, Block, FinalLayer, TimestepEmbedder
from vavae_jax import autoencoder, perceptual, teachers
from vavae_jax import convert as vae
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import inception
from vavae_jax.weights.state_dicts import read_content

AUTOENCODERS = ("f16d16", "f16d32", "f16d64", "mar_f16d16")
# Two steps of both optimizers, with LPIPS, PatchGAN and DINOv2-L, of the reference's `vavae/`.
TRAINED = {f"{name}_training": name for name in ("f16d16", "f16d32", "f16d64")}
TEACHERS = tuple(name for name in teachers.NAMES if teachers.find(name)[1].timm)
MODELS = (*PRESETS, *AUTOENCODERS, *TRAINED, *TEACHERS, "lpips", "fid_inception")
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to compare; see the flags."""

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


@dataclasses.dataclass(frozen=True)
class Case:
  """A model on both sides.

  Attributes:
    job: what the PyTorch side is told, beside paths.
    inputs: name -> array in PyTorch's layout.
    dtypes: to compare in.
    run: (state dict, inputs, dtype) -> our arrays by the keys of the reference's.
    kinked: gradients jump where the model has a kink, such as a max pool's tie, so that rounding
      moves some of their elements as far as they are large: they are judged as a whole, and so is
      what follows from them.
    rounding: ends of names whose gradients are zero but for rounding; they are not compared.
  """

  job: dict[str, Any]
  inputs: Arrays
  dtypes: tuple[str, ...]
  run: Callable[[Mapping[str, np.ndarray], Arrays, str], Arrays]
  kinked: bool = False
  rounding: tuple[str, ...] = ()


@contextlib.contextmanager
def recording(classes: tuple[type, ...], found: list[jax.Array]) -> Iterator[None]:
  """Keeps what every call of these modules gives; scans are loops in it, so that each is seen."""

  def scan(body: Callable[..., Any], carry: Any, xs: Any, **_: Any) -> tuple[Any, None]:
    for i in range(len(jax.tree.leaves(xs)[0])):
      carry, _ = body(carry, jax.tree.map(lambda x, i=i: x[i], xs))
    return carry, None

  def kept(call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(self: nnx.Module, *arguments: Any) -> Any:
      output = call(self, *arguments)
      found.append(output)
      return output

    return wrapper

  with contextlib.ExitStack() as stack:
    stack.enter_context(mock.patch.object(jax.lax, "scan", scan))
    stack.enter_context(mock.patch.object(jax, "checkpoint", lambda f, **_: f))
    for watched in classes:
      stack.enter_context(mock.patch.object(watched, "__call__", kept(watched.__call__)))
    yield


def lightningdit_case(settings: Settings) -> Case:
  """A preset, or the architecture of a checkpoint."""
  config = configs.base.diffusion(settings.model)
  config.optimizer.update(ema_decays=())
  if settings.checkpoint:
    config.model.update(recognise(read_content(settings.checkpoint)).arguments)
  draw = np.random.default_rng(settings.seed)
  cells, channels = config.model.input_size, config.model.in_channels
  shape = (settings.batch_size, channels, cells, cells)
  inputs: Arrays = {name: draw.standard_normal(shape, np.float32) for name in ("latent", "noise")}
  inputs["t"] = np.linspace(0.2, 0.8, settings.batch_size, dtype=np.float32)
  inputs["label"] = draw.integers(config.model.num_classes, size=settings.batch_size)
  arguments = {k: v for k, v in config.model.items() if k not in ONLY_OURS}
  job = {
    "model": "lightningdit",
    "arguments": arguments,
    "watch": ["TimestepEmbedder", "LightningDiTBlock", "FinalLayer"],
    "learning_rate": config.optimizer.learning_rate,
    "steps": settings.steps,
    "trajectory": settings.trajectory,
  }
  run = functools.partial(_run_lightningdit, config.to_dict(), settings)
  return Case(job, inputs, ("float32", "bfloat16"), run)


def _run_lightningdit(
  config: dict[str, Any],
  settings: Settings,
  state_dict: Mapping[str, np.ndarray],
  inputs: Arrays,
  dtype: str,
) -> Arrays:
  frozen = FrozenConfigDict(config | {"dtype": dtype})
  latent, noise = (jnp.asarray(_nhwc(inputs[name])) for name in ("latent", "noise"))
  t, label = jnp.asarray(inputs["t"]), jnp.asarray(inputs["label"], jnp.int32)
  kwargs = {k: v for k, v in frozen.model.items() if k != "attention"}
  model = lightningdit_jax.convert.from_torch(state_dict, **kwargs, dtype=jnp.dtype(dtype))
  graph, weights = nnx.split(model)
  found: list[jax.Array] = []
  with recording((TimestepEmbedder, Block, FinalLayer), found):
    model(latent, t, label)
  out: Arrays = _layers(found)

  @jax.jit
  def forward(weights: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    return nnx.merge(graph, weights)(x, t, label)

  out["output"] = _nchw(forward(weights, latent, t))
  if settings.trajectory:
    end = sampling.sample_ode(
      lambda x, t: forward(weights, x, jnp.full(len(x), t)), noise, num_steps=settings.trajectory
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
    return sum(map(jnp.mean, training.losses(config, params, *batch).values()), start=jnp.zeros(()))

  def named(group: str, tree: Any) -> Arrays:
    tensors = lightningdit_jax.convert.to_torch(nnx.merge(graph, jax.device_get(tree)))
    computed = ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin")
    return {f"{group}/{name}": x for name, x in tensors.items() if name not in computed}

  out = named("gradient", jax.jit(jax.grad(loss))(params))
  optimizer = training.make_optimizer(config.optimizer).init(params)
  state = training.State(step=jnp.int32(0), params=params, ema={}, optimizer=optimizer)
  step = jax.jit(functools.partial(training.update, config), donate_argnums=0)
  for i in range(steps):
    state, metrics = step(state, *batch)
    out[f"loss/{i}"] = metrics["loss"]
  return out | named("parameter", state.params)


def autoencoder_case(settings: Settings) -> Case:
  """A tokenizer of the reference's `tokenizer/autoencoder.py`."""
  kwargs = autoencoder.preset(settings.model)
  draw = np.random.default_rng(settings.seed)
  size, cells = settings.image_size, settings.image_size // 16
  inputs = {
    "image": np.tanh(draw.standard_normal((settings.batch_size, 3, size, size), np.float32)),
    "z": draw.standard_normal((settings.batch_size, kwargs["embed_dim"], cells, cells), np.float32),
  }
  job = {
    "model": "autoencoder",
    "arguments": {
      "embed_dim": kwargs["embed_dim"],
      "ch_mult": [1, 1, 2, 2, 4],
      "model_type": "marvae" if settings.model.startswith("mar") else "vavae",
    },
    "watch": ["ResnetBlock", "AttnBlock", "Downsample", "Upsample"],
  }

  def run(state_dict: Mapping[str, np.ndarray], given: Arrays, dtype: str) -> Arrays:
    model = vae.autoencoder_from_torch(state_dict, **kwargs, dtype=jnp.dtype(dtype))
    found: list[jax.Array] = []
    classes = (
      autoencoder.ResnetBlock,
      autoencoder.AttnBlock,
      autoencoder.Downsample,
      autoencoder.Upsample,
    )
    with recording(classes, found):
      posterior = model.encode(jnp.asarray(_nhwc(given["image"])))
      output = model.decode(jnp.asarray(_nhwc(given["z"])))
    named = {"mean": posterior.mean, "logvar": posterior.logvar, "output": output}
    return _layers(found) | {name: _nchw(x) for name, x in named.items()}

  return Case(job, inputs, ("float32",), run)


def tokenizer_training_case(settings: Settings) -> Case:
  """The reference's `training_step`, in the published recipe's last stage."""
  if settings.image_size != 256:
    raise InputError(
      f"--image_size is {settings.image_size}; the reference trains tokenizers at 256 pixels alone."
    )
  config = configs.base.tokenizer()
  config.model.update(autoencoder.preset(TRAINED[settings.model]))
  last = {name: column[-1:] for name, column in config.stages.items() if column}
  config.stages.update(last)
  draw = np.random.default_rng(settings.seed)
  shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
  noise_shape = (settings.batch_size, config.model.embed_dim, *[settings.image_size // 16] * 2)
  inputs: Arrays = {}
  for i in range(settings.steps):
    inputs[f"image_{i}"] = draw.integers(256, size=shape, dtype=np.uint8)
    inputs[f"noise_{i}"] = draw.standard_normal(noise_shape, np.float32)
  checkouts = Checkouts(settings.reference, settings.taming, settings.torch_python, compiled=False)
  job = {
    "model": "tokenizer_training",
    "steps": settings.steps,
    **training_job(FrozenConfigDict(config), checkouts),
  }
  run = functools.partial(tokenizer_training.run, FrozenConfigDict(config), settings.steps)
  # Softmax takes no notice of what all keys have in common.
  return Case(job, inputs, ("float32",), run, kinked=True, rounding=(".k.bias",))


def teacher_case(settings: Settings) -> Case:
  """A teacher as timm has it."""
  inputs = {"image": _pictures(settings)["image"]}
  family, variant = teachers.find(settings.model)
  classes, watch = zip(*family.compared, strict=True)
  job = {"model": "teacher", "name": variant.timm, "watch": watch}

  def run(state_dict: Mapping[str, np.ndarray], given: Arrays, dtype: str) -> Arrays:
    model = teachers.teacher_from_torch(settings.model, state_dict, dtype=jnp.dtype(dtype))
    found: list[jax.Array] = []
    with recording(classes, found):
      output = model(jnp.asarray(_nhwc(given["image"])))
    return _layers(found) | {"output": _nchw(output)}

  return Case(job, inputs, ("float32",), run)


def inception_case(settings: Settings) -> Case:
  """The features of FID, sFID and the inception score by ADM's protocol, and by pytorch-fid's."""
  draw = np.random.default_rng(settings.seed)
  shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
  inputs = {"image": draw.integers(256, size=shape, dtype=np.uint8)}
  job = {"model": "inception", "watch": [f"Mixed_{name}" for name in _MIXED]}
  classes = tuple(getattr(inception, name) for name in ("_Block35", "_To17", "_Block17", "_To8"))

  def run(state_dict: Mapping[str, np.ndarray], given: Arrays, dtype: str) -> Arrays:
    del dtype
    model = inception.from_torch(state_dict)
    image = jnp.asarray(_nhwc(given["image"]))
    found: list[jax.Array] = []
    with recording((*classes, inception._Block8), found):
      adm = model(inception.adm_input(image))
    features = jax.jit(model.__call__)(inception.pytorch_fid_input(image))
    names = ("pool3", "spatial", "logits_unbiased")
    out = {f"output/adm {name}": adm[name] for name in names}
    return _layers(found) | out | {"output/pytorch-fid pool3": features["pool3"]}

  return Case(job, inputs, ("float32",), run)


_MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


def lpips_case(settings: Settings) -> Case:
  """LPIPS and its gradient."""
  job = {"model": "lpips", "watch": [f"net.slice{i}" for i in range(1, 6)]}

  def run(state_dict: Mapping[str, np.ndarray], given: Arrays, dtype: str) -> Arrays:
    model = vae.lpips_from_torch(state_dict, dtype=jnp.dtype(dtype))
    image, other = (jnp.asarray(_nhwc(given[name])) for name in ("image", "other"))
    found: list[jax.Array] = []
    with recording((perceptual._Slice,), found):
      output = model(image, other)
    gradient = jax.grad(lambda other: model(image, other).sum())(other)
    return _layers(found) | {"output": output, "gradient/other": _nchw(gradient)}

  return Case(job, _pictures(settings), ("float32",), run, kinked=True)


def _layers(found: list[jax.Array]) -> Arrays:
  return {f"layer/{i:03}": _nchw(x) for i, x in enumerate(found)}


def _pictures(settings: Settings) -> Arrays:
  draw = np.random.default_rng(settings.seed)
  shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
  return {name: np.tanh(draw.standard_normal(shape, np.float32)) for name in ("image", "other")}


def check_weights(settings: Settings, found: Weights) -> None:
  """Raises InputError unless weights are of the kind that `settings.model` names."""
  what = f"{found.kind} {found.name}".strip()
  wanted = {
    **dict.fromkeys(PRESETS, "LightningDiT"),  # of any size, which the tensors tell
    **{name: f"tokenizer {name.removeprefix('mar_')}" for name in AUTOENCODERS},
    **{name: f"teacher {name}" for name in TEACHERS},
    "lpips": "LPIPS",
    "fid_inception": "FID's Inception",
  }[settings.model]
  if wanted not in (what, found.kind):
    raise InputError(
      f"{settings.checkpoint} is a {what}, and --model={settings.model} needs a {wanted}."
    )


def make_case(settings: Settings) -> Case:
  """The case of a model's name."""
  if settings.model in PRESETS:
    return lightningdit_case(settings)
  if settings.image_size < 16 or settings.image_size % 16:
    raise InputError(f"--image_size is {settings.image_size}; give a multiple of 16.")
  if settings.model in TRAINED:
    return tokenizer_training_case(settings)
  if settings.model == "fid_inception":
    return inception_case(settings)
  if settings.model in AUTOENCODERS:
    return autoencoder_case(settings)
  return teacher_case(settings) if settings.model in TEACHERS else lpips_case(settings)


def _nhwc(array: np.ndarray) -> np.ndarray:
  return np.moveaxis(array, 1, -1)


def _nchw(array: jax.Array) -> jax.Array:
  return jnp.moveaxis(array, -1, 1) if array.ndim == 4 else array
