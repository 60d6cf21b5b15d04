r"""Runs the PyTorch reference beside this project on the same weights and inputs, layer by layer.

  python -m launch.equivalence --reference=LIGHTNINGDIT --torch_python=PYTHON \
    --model=LightningDiT-XL/1 --output=runs/equivalence

--reference is a checkout of hustvl/LightningDiT; it is run by --torch_python, an interpreter with
torch, einops, numpy and pillow (teachers also need timm, trajectories torchdiffeq). What else the
reference imports (fairscale, torchvision, requests) is not needed for these numbers, and empty
modules stand in. Weights are random, or those of --checkpoint. --model is a preset of LightningDiT,
of the tokenizer (f16d16, f16d32, f16d64, mar_f16d16), a teacher (DINOv2, MAE), or lpips. Writes a
table, OUTPUT.json and OUTPUT.html; the exit status is 1 where a tolerance does not hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import FrozenConfigDict

import configs.base
import lightningdit_jax.convert
from launch.benchmark import circumstances
from launch.differences import BFLOAT16_TOLERANCE, HEADER, TOLERANCES, Row, page, summary
from launch.engine import console
from launch.weights import recognise
from lightningdit_jax import sampling, training
from lightningdit_jax.model import PRESETS, Block, FinalLayer, TimestepEmbedder
from vavae_jax import autoencoder, perceptual
from vavae_jax import convert as vae
from vavae_jax.errors import InputError
from vavae_jax.files import atomic_file, write_json
from vavae_jax.state_dicts import read_content, read_state_dict
from vavae_jax.teachers import teacher_from_torch, vit
from vavae_jax.torch_writer import write_torch_file

TORCH_SCRIPT = Path(__file__).with_name("equivalence_torch.py")
AUTOENCODERS = ("f16d16", "f16d32", "f16d64", "mar_f16d16")
TEACHERS = (*vit.DINOV2, *(name for name in vit.MAE if name != "mae_vits16"))
MODELS = (*PRESETS, *AUTOENCODERS, *TEACHERS, "lpips")
Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
  """What to compare; see the flags."""

  reference: Path
  torch_python: str
  model: str
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
      moves some of their elements as far as they are large: they are judged as a whole.
  """

  job: dict[str, Any]
  inputs: Arrays
  dtypes: tuple[str, ...]
  run: Callable[[Mapping[str, np.ndarray], Arrays, str], Arrays]
  kinked: bool = False


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
  arguments = {k: v for k, v in config.model.items() if k not in _ONLY_OURS}
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


# Arguments that have no part in the numbers.
_ONLY_OURS = ("use_checkpoint", "remat_policy", "attention", "scan_unroll")


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


def teacher_case(settings: Settings) -> Case:
  """A teacher as timm has it."""
  inputs = {"image": _pictures(settings)["image"]}
  job = {"model": "teacher", "name": settings.model, "watch": ["norm_pre", "Block"]}

  def run(state_dict: Mapping[str, np.ndarray], given: Arrays, dtype: str) -> Arrays:
    model = teacher_from_torch(settings.model, state_dict, dtype=jnp.dtype(dtype))
    found: list[jax.Array] = []
    with recording((vit._Embedding, vit._Block), found):
      output = model(jnp.asarray(_nhwc(given["image"])))
    return _layers(found) | {"output": _nchw(output)}

  return Case(job, inputs, ("float32",), run)


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


def make_case(settings: Settings) -> Case:
  """The case of a model's name."""
  if settings.model in PRESETS:
    return lightningdit_case(settings)
  if settings.image_size < 16 or settings.image_size % 16:
    raise InputError(f"--image_size is {settings.image_size}; give a multiple of 16.")
  if settings.model in AUTOENCODERS:
    return autoencoder_case(settings)
  return teacher_case(settings) if settings.model in TEACHERS else lpips_case(settings)


def compare(settings: Settings) -> tuple[list[Row], dict[str, str]]:
  """Runs both sides.

  Args:
    settings: see the flags.

  Returns:
    (rows in the order of computation, what the other side says of itself).

  Raises:
    InputError: no checkout, no PyTorch, or weights of another model.
  """
  if not (settings.reference / "models" / "lightningdit.py").is_file():
    raise InputError(
      f"--reference is {settings.reference}, which has no models/lightningdit.py; give a checkout "
      "of hustvl/LightningDiT."
    )
  case = make_case(settings)
  rows: list[Row] = []
  about: dict[str, str] = {}
  with tempfile.TemporaryDirectory() as folder:
    paths = {name: f"{folder}/{name}" for name in ("inputs.npz", "outputs.npz", "weights.pt")}
    with Path(paths["inputs.npz"]).open("wb") as file:
      np.savez(file, **case.inputs)
    if settings.checkpoint:
      found = recognise(read_content(settings.checkpoint))
      write_torch_file(paths["weights.pt"], found.tensors)
    for dtype in (dtype for dtype in case.dtypes if dtype in settings.dtypes):
      job = case.job | {
        "checkout": str(settings.reference.absolute()),
        "inputs": paths["inputs.npz"],
        "outputs": paths["outputs.npz"],
        "weights": paths["weights.pt"],
        "seed": settings.seed,
        "dtype": dtype,
      }
      console.say(f"the reference in PyTorch, {dtype}")
      about = _run_torch(settings.torch_python, job)
      console.say(f"this project, {dtype}")
      ours = case.run(read_state_dict(paths["weights.pt"]), case.inputs, dtype)
      with np.load(paths["outputs.npz"]) as theirs:
        rows += _rows(ours, theirs, dtype, case.kinked)
  return rows, about


def _run_torch(python: str, job: dict[str, Any]) -> dict[str, str]:
  try:
    done = subprocess.run(
      [python, str(TORCH_SCRIPT)],
      input=json.dumps(job) + "\n",
      stdout=subprocess.PIPE,
      text=True,
      check=False,
    )
  except OSError as error:
    raise InputError(f"--torch_python is {python}, which does not start: {error}.") from error
  if done.returncode:
    raise InputError(
      "The reference in PyTorch has ended (its message is above); give --torch_python an "
      "interpreter with torch, einops, numpy, pillow and, for teachers, timm."
    )
  return json.loads(done.stdout.splitlines()[-1])


def _rows(ours: Arrays, theirs: Mapping[str, np.ndarray], dtype: str, kinked: bool) -> list[Row]:
  """Ours beside the reference's, whose layers also have a name behind their number."""
  rows = []
  keys = {"/".join(k.split("/")[:2]) if k.startswith("layer/") else k: k for k in theirs}
  if missing := sorted(ours.keys() ^ keys.keys()):
    raise InputError(
      f"The two sides do not compute the same: {', '.join(missing[:8])} is on one of them only. Is "
      "torchdiffeq installed on the other side? --trajectory=0 does without."
    )
  for key, full in keys.items():
    expected = theirs[full]
    actual = np.asarray(ours[key], np.float32)
    if actual.shape != expected.shape:
      raise InputError(f"{full} has shape {expected.shape} there and {actual.shape} here.")
    difference = actual - expected
    max_abs = float(np.abs(difference).max())
    group, _, name = full.partition("/")
    relative = max_abs / max(float(np.abs(expected).max()), 1e-30)
    rms = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected)), 1e-30)
    tolerance = TOLERANCES[group] if dtype == "float32" else BFLOAT16_TOLERANCE
    rows.append(Row(group, name, dtype, max_abs, relative, rms, tolerance, kinked))
  return rows


def _nhwc(array: np.ndarray) -> np.ndarray:
  return np.moveaxis(array, 1, -1)


def _nchw(array: jax.Array) -> jax.Array:
  return jnp.moveaxis(array, -1, 1) if array.ndim == 4 else array


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  names = [field.name for field in dataclasses.fields(Settings)]
  given: dict[str, Any] = {name: FLAGS[name].value for name in names}
  settings = Settings(**given | {"reference": Path(FLAGS.reference), "dtypes": FLAGS.dtypes})
  rows, other = compare(settings)
  lines = summary(rows)
  console.table(f"{settings.model} beside the reference", HEADER, lines)
  about = {**circumstances(), **other, "batch_size": settings.batch_size}
  if FLAGS.output:
    path = Path(FLAGS.output)
    told = [dataclasses.asdict(row) | {"holds": row.holds} for row in rows]
    write_json(path.with_suffix(".json"), {**about, "model": settings.model, "rows": told})
    with atomic_file(path.with_suffix(".html")) as file:
      file.write(page(f"{settings.model} beside the reference", rows, about).encode())
    console.say(f"written to {path.with_suffix('.json')} and {path.with_suffix('.html')}")
  if not all(row.holds for row in rows):
    console.say("not equivalent: a tolerance does not hold")
    sys.exit(1)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("reference", None, "A checkout of hustvl/LightningDiT.", required=True)
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has PyTorch.")
  flags.DEFINE_enum("model", None, MODELS, "What to compare.", required=True)
  flags.DEFINE_string("checkpoint", "", "Weights of that model; random ones if not given.")
  flags.DEFINE_integer("batch_size", 2, "Samples.", lower_bound=1)
  flags.DEFINE_integer("image_size", 256, "Pixels, of tokenizers, teachers and lpips.")
  flags.DEFINE_integer("steps", 2, "Of AdamW, of LightningDiT; 0: none.", lower_bound=0)
  flags.DEFINE_integer("trajectory", 5, "Grid points of a sampling; 0: none.", lower_bound=0)
  flags.DEFINE_multi_enum(
    "dtypes",
    ["float32", "bfloat16"],
    ["float32", "bfloat16"],
    "What matrices multiply in; bfloat16 of LightningDiT alone, which is trained in it.",
  )
  flags.DEFINE_integer("seed", 0, "Of weights and inputs.")
  flags.DEFINE_string("output", "", "Where to write OUTPUT.json and OUTPUT.html.")
  console.run_command(main)
