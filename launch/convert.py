r"""Converts weights: published files to what the commands here take, and ours to PyTorch's.

  python -m launch.convert SOURCE DEST [--to=folder|safetensors|pt]
  python -m launch.convert SOURCE --inspect
  python -m launch.convert WORKDIR --inspect

  python -m launch.convert vavae-f16d32-dinov2 runs/vavae
  python -m launch.convert latents-stats data/latents
  python -m launch.convert lightningdit-xl-64ep runs/xl_64ep --latents=data/latents \
    --tokenizer=runs/vavae
  python -m launch.convert runs/my_xl my_xl.pt --ema=0.9999

SOURCE is a file (.pt, .pth, .bin, .ckpt, .safetensors, .npz), hf:OWNER/NAME/FILE on the Hugging
Face hub, a short name of one, a workdir of a training, or a model folder or USER/NAME of one on the
hub (--part=tokenizer or diffusion). Short names, in docs/models.md with what they are:

  latents-stats, lightningdit-xl-64ep, lightningdit-xl-800ep
  vavae-f16d32-dinov2, and -50ep: ldm-f16d16, ldm-f16d32, ldm-f16d64, vavae-f16d32-dinov2,
    vavae-f16d32-mae, vavae-f16d64-dinov2, vavae-f16d64-mae
  e2e-vavae, e2e-vavae-stats

The command recognises LightningDiT and tokenizer checkpoints of the reference, AutoencoderKLs of
diffusers, MAR-VAE, latent statistics (also in a config.json of diffusers), the teachers, VGG16 with
LPIPS' heads, and FID's Inception.
DEST is a folder (a workdir for launch.encode, sample and evaluate; the latents' folder for
statistics), or a file whose ending chooses the format; LightningDiT and tokenizers then have the
names that the reference loads with strict=True, all others keep theirs. A workdir is float32.
Weights are found by what fits a model, under whatever key and prefix; where several do, the average
counts, and --part chooses. Pickles are read without running them and without PyTorch: what a
checkpoint holds beside weights stays aside and is listed. Unknown, missing, misshapen or non-finite
tensors are listed, and nothing is written. --inspect of a workdir reads its checkpoints and
compares them with their checksums; the exit code is 2 where one is damaged.
"""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from flax import nnx
from ml_collections import ConfigDict

import configs.base
import lightningdit_jax.convert
from launch import restore, tasks
from launch.engine import console
from launch.engine.checkpoint import read_config, save_weights, survey
from launch.engine.ownership import owned
from launch.weights import recognition, released
from lightningdit_jax.model import build_model
from lightningdit_jax.store.latents import STATISTICS, LatentStore
from lightningdit_jax.store.space import Space
from vavae_jax import folder
from vavae_jax.common import functional
from vavae_jax.common.addresses import url_of_data
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url, local_place, sha256_of, write_safetensors
from vavae_jax.convert import autoencoder_to_torch
from vavae_jax.weights.state_dicts import SUFFIXES, TORCH_SUFFIXES, read_content, read_state_dict
from vavae_jax.weights.torch_pickles import StandIn
from vavae_jax.weights.torch_weights import StateDict
from vavae_jax.weights.torch_writer import write_torch_file

_MOST_ROWS = 10_000  # that --inspect lists
FORMS = ("folder", "safetensors", "pt")
_SUFFIXES = {".safetensors": "safetensors", **dict.fromkeys(TORCH_SUFFIXES, "pt")}
# The task of a model's workdir.
_TASKS = {"LightningDiT": "diffusion", "tokenizer": "tokenizer"}
# Options that the reference's autoencoder lacks, with the values it is built by.
_ONLY_OURS = {"patch_size": 1, "norm_groups": 32, "linear_shortcut": False, "final_norm": True}


class Converted(NamedTuple):
  """What was written where, for the summary."""

  weights: recognition.Weights
  path: Path
  sha256: str


def convert(
  source: str,
  dest: Path,
  *,
  to: str = "",
  part: str = "",
  heads: str = "",
  latents: str = "",
  tokenizer: str = "",
  step: int | None = None,
  ema: float | None = None,
  config: ConfigDict | None = None,
) -> Converted:
  """Converts one model; the arguments are the command's. `dest` must not exist yet.

  A workdir has the training's configuration `config`; if None, that of a released file or of
  `configs.base`. The architecture is the file's.
  """
  to = _form_of(dest, to)
  if to != "folder":
    _check_free(dest)
  path = released.find(source)
  if not path.is_file():
    _refuse(f"{path} is a folder", heads=heads, latents=latents, tokenizer=tokenizer)
    task = _task_of(path, part)
    if to == "folder":
      raise InputError(f"{path} is a folder already; end DEST in .safetensors or .pt.")
    found = _export(path, task, step, ema)
  else:
    _refuse(f"{path} is a file", step=step, ema=ema)
    if to != "folder":
      _refuse("it is for the workdir of a LightningDiT", latents=latents, tokenizer=tokenizer)
    store = _check_companions(latents, tokenizer)
    console.say(f"reading {path} ({path.stat().st_size / 2**20:.1f} MiB)")
    more = read_state_dict(heads) if heads else None
    found = recognition.recognise(read_content(path), part, more)
    console.say(f"recognised: {found.what}, of {found.part}")
    if found.kind != "LightningDiT":
      _refuse("it is for the workdir of a LightningDiT", latents=latents, tokenizer=tokenizer)
    if store is not None and store.shape[2] != (wanted := found.arguments["in_channels"]):
      raise InputError(f"{latents} has {store.shape[2]} channels, {path} takes {wanted}.")
  if found.kind == recognition.STATISTICS and to == "folder":
    dest, to = dest / STATISTICS, "safetensors"
  if to != "folder":
    _check_free(dest)
    _write_file(dest, found.tensors, to)
    return Converted(found, dest, sha256_of(dest))
  if found.kind not in _TASKS:
    raise InputError(f"{found.what} has no workdir; end DEST in .safetensors or .pt.")
  _check_free(dest)
  config = _workdir_config(found, config or _config_of(source, found), latents, tokenizer)
  params = nnx.to_pure_dict(nnx.state(found.module))
  if config.task == "tokenizer":
    params = {"autoencoder": params}
  save_weights(dest, params, config.to_dict())
  return Converted(found, dest, restore.load(dest, config.task).sha256)


def _config_of(source: str, found: recognition.Weights) -> ConfigDict:
  """The published configuration."""
  task = _TASKS[found.kind]
  recipe = released.config_of(source)
  if not recipe and found.arguments.get("early_head"):
    recipe = "configs.lightningdit_xl_internal_guidance"
  console.say(f"configuration: {recipe or f'configs.base.{task}'}, with the file's architecture")
  module, _, argument = recipe.partition(":")
  if not module:
    return getattr(configs.base, task)()
  return importlib.import_module(module).get_config(*filter(None, [argument]))


def _workdir_config(
  found: recognition.Weights, config: ConfigDict, latents: str, tokenizer: str
) -> ConfigDict:
  """A training's configuration, for the weights alone, with the architecture that they have."""
  task, config = _TASKS[found.kind], config.copy_and_resolve_references()
  config.model.update(found.arguments)
  config.optimizer.ema_decays = ()  # the weights are the only ones
  if task == "tokenizer":
    config.teacher.name = ""
  else:
    config.latents.path = latents or config.latents.path
    config.tokenizer = tokenizer
  tasks.frozen(config)
  return config


def _check_companions(latents: str, tokenizer: str) -> LatentStore | None:
  """The latents here that a workdir is to name; InputError if they or the tokenizer are none."""
  path = folder.find(tokenizer) if tokenizer else None
  if path and not folder.is_model(path) and (task := read_config(path)["task"]) != "tokenizer":
    raise InputError(f"--tokenizer={tokenizer} is the workdir of a {task}, not of a tokenizer.")
  remote = is_url(url_of_data(latents))  # which sampling fetches
  return restore.open_latents(latents) if latents and not remote else None


def _task_of(path: Path, part: str) -> str:
  """What is converted of a workdir or model folder."""
  if not folder.is_model(path):
    _refuse(f"{path} is a workdir", part=part)
    task = read_config(path).get("task")
    if task not in tasks.TASKS:
      raise InputError(f"{path} is not a workdir of this project; give a file of weights in it.")
    return task
  there = folder.parts_of(path)
  if (part or len(there) > 1) and part not in there:
    raise InputError(f"--part is {part!r}; {path} has {' and '.join(there)}: choose one of them.")
  return part or there[0]


def _form_of(dest: Path, to: str) -> str:
  """The format, by the ending of DEST and --to, which must agree."""
  by_ending = _SUFFIXES.get(dest.suffix, "folder")
  if dest.suffix.lower() in SUFFIXES and dest.suffix not in _SUFFIXES:
    raise InputError(f"{dest.suffix} files are read, not written; end DEST in .safetensors or .pt.")
  if to and dest.suffix and to != by_ending:
    raise InputError(f"--to={to} and {dest} contradict each other; leave --to out.")
  return to or by_ending


def _refuse(why: str, **options: Any) -> None:
  """Raises InputError where one of the options was given."""
  for name, value in options.items():
    if value not in ("", None):
      raise InputError(f"--{name}={value} does not apply: {why}.")


def _export(workdir: Path, task: str, step: int | None, ema: float | None) -> recognition.Weights:
  """The weights of a training under the reference's names."""
  model = restore.load(workdir, task, step, ema)
  if task == "diffusion":
    graph = functional.graph_of(build_model(model.config))
    module = nnx.merge(graph, model.params)
    tensors, kind = lightningdit_jax.convert.to_torch(module), "LightningDiT"
    return recognition.Weights(tensors, module, f"of step {model.step}", kind=kind)
  arguments = model.config.model
  for key, only in _ONLY_OURS.items():
    if arguments[key] != only:
      raise InputError(
        f"{workdir} was trained with config.model.{key}={arguments[key]}; the reference has only "
        f"{only}, so its files cannot hold these weights."
      )
  module = restore.autoencoder(model.config, model.params)
  tensors = autoencoder_to_torch(module)
  return recognition.Weights(tensors, module, f"of step {model.step}", kind="tokenizer")


def _check_free(dest: Path) -> None:
  if dest.is_file() or (dest.is_dir() and (dest.suffix in _SUFFIXES or any(dest.iterdir()))):
    raise InputError(f"{dest} already exists; give another DEST, or move it away.")


def _write_file(dest: Path, tensors: StateDict, to: str) -> None:
  if bad := [name for name, x in tensors.items() if not np.isfinite(x.astype(np.float32)).all()]:
    raise InputError(f"Not finite, so nothing was written: {', '.join(bad)}.")
  console.say(f"writing {dest}")
  if to == "pt":
    write_torch_file(dest, tensors)
  else:
    write_safetensors(dest, tensors)


def inspect_workdir(workdir: Path) -> None:
  """Lists the checkpoints of a training and reads each one; InputError where one is damaged."""
  config = read_config(workdir)
  found = survey(workdir)
  rows = [
    (one.name, ", ".join(one.items), f"{one.size / 2**20:.1f} MiB", one.wrong or "sound")
    for one in found
  ]
  header = ("step", "items", "size", "every file read")
  console.table(f"{workdir}: checkpoints of a {config.get('task')}", header, rows)
  if not found:
    raise InputError(f"{workdir} holds no checkpoint.")
  if damaged := [one.name for one in found if one.wrong]:
    raise InputError(
      f"{len(damaged)} of {len(found)} checkpoints are damaged: {', '.join(damaged)}; training, "
      "sampling and encoding use the newest sound one."
    )


def inspect(source: str) -> None:
  """Lists what a file or a training's workdir holds."""
  path = released.find(source)
  if not path.is_file():
    if not folder.is_model(path):
      return inspect_workdir(path)
    for name in folder.parts_of(path):
      _list(path / folder.WEIGHTS[name])
    return
  content = _list(path)
  try:
    found = recognition.recognise(content)
    console.say(f"{found.what}, of {found.part}; {_describe(found.tensors)}")
    _say_aside(found.aside)
  except InputError as error:
    console.say(str(error))


def _list(path: Path) -> dict[str, Any]:
  """Prints what a file has by name, and returns it."""
  content = read_content(path)
  rows = [
    (name, "x".join(map(str, value.shape)) or "scalar", str(value.dtype))
    if isinstance(value, np.ndarray)
    else (name, "", _shown(value))
    for name, value in itertools.islice(_listed(content), _MOST_ROWS)
  ]
  console.table(str(path), ("name", "shape", "dtype or value"), rows)
  if len(rows) == _MOST_ROWS:
    console.say(f"the first {_MOST_ROWS} entries are listed")
  return content


def _listed(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
  """Names and values of a file and of the dictionaries in it, not of those inside them."""
  for key, value in content.items():
    if isinstance(value, Mapping) and value:
      yield from ((f"{key}.{name}", inner) for name, inner in value.items())
    else:
      yield str(key), value


def _shown(value: Any) -> str:
  if isinstance(value, Mapping | list | tuple) and not isinstance(value, StandIn):
    return f"{type(value).__name__} of {len(value)}"
  if isinstance(value, int) and value.bit_length() > 64:
    return f"an integer of {value.bit_length()} bits"
  text = " ".join(repr(value).split())
  return text if len(text) <= 60 else f"{text[:57]}..."


def _describe(tensors: StateDict) -> str:
  dtypes = Counter(str(x.dtype) for x in tensors.values())
  kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
  total = sum(x.size for x in tensors.values())
  return f"{len(tensors)} tensors ({kinds}), {total:,} parameters"


def _say_aside(aside: Mapping[str, int]) -> None:
  if aside:
    listed = ", ".join(f"{name} ({count})" for name, count in aside.items())
    console.say(f"left out, since they are not the model's: {listed}")


def _say_sampling(source: str, workdir: Path) -> None:
  """Prints the command that samples a converted LightningDiT, or makes one that can be sampled."""
  if not FLAGS.latents:
    part = [f"--part={FLAGS.part}"] if FLAGS.part else []
    lacks = ["--latents=LATENTS", f"--tokenizer={FLAGS.tokenizer or 'TOKENIZER'}"]
    console.say_next("convert", source, f"{workdir}_to_sample", *part, *lacks)
    return
  store = _check_companions(FLAGS.latents, "")
  noted = {} if store is None else Space.of(store).tokenizer
  lacks = restore.lacking(noted, workdir, FLAGS.tokenizer)
  words = (f"--workdir={workdir}", f"--output={workdir}_samples.npz")
  console.say_next("sample", *words, *lacks)


def main(*words: str) -> None:
  names = ("to", "part", "heads", "latents", "tokenizer", "step", "ema")
  given: dict[str, Any] = {name: FLAGS[name].value for name in names}
  if FLAGS.inspect and len(words) == 1:
    _refuse("--inspect lists all that is in a file", **given)
    inspect(words[0])
    return
  if FLAGS.inspect or len(words) != 2:
    raise InputError("Give SOURCE and DEST, or SOURCE and --inspect; see --help.")
  dest = local_place(words[1])
  with owned(dest, beside=True):
    done = convert(words[0], dest, **given)
  _say_aside(done.weights.aside)
  architecture = ", ".join(f"{name} {value}" for name, value in done.weights.arguments.items())
  rows = [
    ("what", done.weights.what),
    ("tensors", _describe(done.weights.tensors)),
    *([("architecture", architecture)] if architecture else []),
    ("where", str(done.path)),
    ("sha256", done.sha256),
  ]
  console.table("Converted", ("", ""), rows)
  if done.path.is_file():
    console.say_next("convert", str(done.path), "--inspect")
  elif done.weights.kind == "LightningDiT":
    _say_sampling(words[0], done.path)
  else:
    words = (f"--workdir={done.path}", f"--output={done.path}_latents", "--source=PICTURES")
    console.say_next("encode", *words)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_enum("to", "", ("", *FORMS), "Format; by DEST's ending if not given.")
  flags.DEFINE_boolean("inspect", False, "Only list what SOURCE holds.")
  flags.DEFINE_string("part", "", "Where in SOURCE, as --inspect names it; the average, if any.")
  flags.DEFINE_string("heads", "", "LPIPS' heads, where SOURCE is VGG16.")
  flags.DEFINE_string("latents", "", "Folder with the statistics of LightningDiT's latents.")
  flags.DEFINE_string("tokenizer", "", f"LightningDiT's tokenizer: {folder.TAKEN}")
  flags.DEFINE_integer("step", None, "Step of a workdir's checkpoint; the newest if not given.")
  flags.DEFINE_float("ema", None, "Decay of a workdir's average; the first if not given, 0: none.")
  console.run_command(main, arguments=2)
