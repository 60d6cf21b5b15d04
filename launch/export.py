r"""Writes a trained model as a folder that can be carried, handed on, and used from Python.

  python -m launch.export --workdir=RUNS/diffusion --output=model
  python -m launch.export --workdir=RUNS/tokenizer --output=tokenizer --dtype=bfloat16
  python -m launch.export --workdir=RUNS/diffusion --output=model --push=USER/NAME

The folder has the weights that are sampled, with the tokenizer, the statistics of its latents, the
class names and the sampling settings; a tokenizer's workdir gives a folder of the tokenizer alone.
It refers to no path. launch.sample, encode, evaluate and convert and config.init_from take it as
they take a workdir, and Python loads it by lightningdit_jax.Pipeline or vavae_jax.Tokenizer.
README.md in it is a model card, from what the workdir notes. --push also copies it to the Hugging
Face hub, by the token of `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
from absl import flags
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from launch import restore
from launch.engine import console
from launch.engine.checkpoint import read_config
from launch.engine.ownership import owned
from launch.engine.writers import curve, read_metrics
from launch.evaluation.figures import PARTS
from launch.evaluation.sample_files import class_sheet
from launch.report import html
from lightningdit_jax.pipeline import Pipeline
from vavae_jax import folder
from vavae_jax.common import keys
from vavae_jax.common.addresses import with_hub
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import local_place, place, read_note, remove_partial
from vavae_jax.common.keys import DTYPES
from vavae_jax.data import changes
from vavae_jax.data.order import spread
from vavae_jax.tokenizer import Tokenizer

SAMPLES = 8  # of each class
_ROWS = 8  # classes of a picture
# Of the sampling settings, on the card; config.json has all.
_TOLD = ("mode", "method", "num_steps", "timestep_shift", "cfg_scale", "cfg_interval_start")
_NAMES = 20  # classes that the card lists


def export(
  model: Pipeline | Tokenizer,
  output: Path,
  *,
  workdir: Path,
  dtype: str = "float32",
  samples: int = SAMPLES,
  licence: str = "unknown",
  title: str = "",
  evaluations: Sequence[Path] = (),
  picture: bytes = b"",
) -> None:
  """Writes a model folder with its card and picture; the arguments are the command's.

  `workdir` is of the training, whose notes the card is made from; `samples` of each class are
  drawn, 0: none, unless there is a `picture`. Evaluations on the card of a folder in that place, or
  of the one that is exported, stay where the weights are the same. InputError if one of the
  `evaluations` is no result of launch.evaluate, or is of other weights.
  """
  new = [_evaluated(path, model) for path in evaluations]
  evaluated = _merged(_kept(output, model, workdir), new)
  if output.parent.is_dir():
    remove_partial(output.parent, output.name)  # left by a run that was killed
  if not folder.is_model(workdir):  # which brings its own
    rows = [" | ".join(row) for row in _figures(workdir)][: keys.LONGEST_LIST]
    model.origin = {**model.origin, "data": _data(model, workdir), "figures": rows}
  if evaluated:
    model.origin = {**model.origin, "evaluations": [json.dumps(x) for x in evaluated]}
  if samples and isinstance(model, Pipeline) and not picture:
    picture = _png(_sheet(model, samples))
  files = {folder.PICTURE: picture} if picture else {}
  card = _card(model, title or output.name, licence, bool(files), evaluated)
  files[folder.CARD] = card.encode()
  model.save(output, dtype=dtype, files=files)


def check_name(name: str) -> None:
  """Raises InputError for what no model on the hub is called."""
  with with_hub(name, "pushed", "Give USER/NAME"):
    validate_repo_id(name)


def push(output: Path, name: str, *, private: bool = False) -> str:
  """Copies a model folder to the hub as USER/NAME; returns its address."""
  with with_hub(name, "pushed", "See that the network and the token (hf auth login) are there"):
    api = huggingface_hub.HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=output, allow_patterns=list(folder.FILES))
  return f"{api.endpoint}/{name}"


def _sheet(model: Pipeline, samples: int) -> np.ndarray:
  """Samples, one row a class."""
  count = model.config.model.num_classes
  labels = spread(count, _ROWS).tolist()
  with console.Bar("samples", 1) as bar:
    pictures = model.sample(labels, num=samples, progress=False)
    bar.update(1)
  return class_sheet(np.stack(pictures), np.repeat(labels, samples), model.class_names)


def _png(picture: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  Image.fromarray(picture).save(buffer, "PNG")
  return buffer.getvalue()


def _card(
  model: Pipeline | Tokenizer,
  title: str,
  licence: str,
  has_picture: bool,
  evaluations: list[dict[str, Any]],
) -> str:
  is_diffusion = isinstance(model, Pipeline)
  tokenizer = model.tokenizer if isinstance(model, Pipeline) else model
  facts = [_described("tokenizer", tokenizer, f"f{tokenizer.downsampling}d{tokenizer.channels}")]
  sample = {}
  if isinstance(model, Pipeline):
    sizes = model.config.model
    shape = f"depth {sizes.depth}, width {sizes.hidden_size}, patch {sizes.patch_size}"
    facts = [_described("LightningDiT", model, shape), *facts]
    sample = model.config.sample.to_dict()
  facts += [("pictures", f"{tokenizer.image_size} x {tokenizer.image_size} pixels")]
  facts += [("data", model.origin["data"])] if model.origin.get("data") else []
  names = list(model.class_names) if isinstance(model, Pipeline) else []
  more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
  shown = ", ".join(f"`{name.replace('`', ' ')}`" for name in names[:_NAMES]) + more
  return html.markdown(
    "card.md",
    licence=licence,
    title=title,
    name=title,
    diffusion=is_diffusion,
    picture=folder.PICTURE if has_picture else "",
    facts=facts,
    class_names=shown,
    sampling=", ".join(f"{name} {sample[name]}" for name in _TOLD if name in sample),
    figures=model.origin.get("figures", ()),
    evaluations=evaluations,
  )


def _described(name: str, model: Pipeline | Tokenizer, shape: str) -> tuple[str, str]:
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(model.params))
  origin = model.origin
  average = f", average of decay {origin['ema']}" if origin.get("ema") else ""
  return name, f"{shape}, {count / 1e6:.2f} M parameters, step {origin.get('step', 0)}{average}"


def _data(model: Pipeline | Tokenizer, workdir: Path) -> str:
  """What a training's workdir notes of its data; "" if nothing."""
  if isinstance(model, Pipeline):
    return f"latents of {model.space.records:,} pictures" if model.space.records else ""
  note = workdir / changes.NOTE
  about = read_note(note).get("source", {}) if note.exists() else {}
  kind = str(about.get("spec", "")).partition(":")[0]
  return f"{about['pictures']} pictures from a source of the kind {kind}" if about else ""


def _figures(workdir: Path) -> list[tuple[str, str, str]]:
  """The last value of each figure that a training's evaluations wrote."""
  lines = read_metrics(workdir)
  names = sorted({name for line in lines for name in line if "/" in name})
  last = [(name, curve(lines, name)) for name in names if not name.endswith("took_seconds")]
  return [(name, f"{x[-1][1]:.4g}", f"while training, step {x[-1][0]}") for name, x in last if x]


def _identity(model: Pipeline | Tokenizer) -> dict[str, str]:
  """Hashes of a model's weights, by the names of `folder.WEIGHTS`."""
  if isinstance(model, Tokenizer):
    return {"tokenizer": model.sha256}
  return {"tokenizer": model.tokenizer.sha256, "diffusion": model.origin["sha256"]}


def _kept(output: Path, model: Pipeline | Tokenizer, source: Path) -> list[dict[str, Any]]:
  """The evaluations of the model, and of the folder that is there if it has the same weights."""
  mine = _noted(model.origin, source)
  if not folder.is_model(output):
    return mine
  maybe: dict[str, Any] = dict.fromkeys(folder.WEIGHTS, dict | None)
  config = read_note(output / folder.CONFIG, **maybe)
  given = {x: {"origin": config[x].get("origin", {})} for x in maybe if x in config}
  table = {name: {"origin": folder.ORIGIN} for name in given}
  there = keys.complete(table, given, f"{output / folder.CONFIG}: ")
  origins = {name: part["origin"] for name, part in there.items()}
  shown = [_noted(origin, output) for origin in origins.values()][-1] if origins else []
  if {name: origin["sha256"] for name, origin in origins.items()} == _identity(model):
    return _merged(shown, mine)
  if gone := ", ".join(each["kind"] for each in shown):
    console.say(f"evaluations of other weights leave the card of {output}: {gone}")
  return mine


def _noted(origin: Mapping[str, Any], source: Path) -> list[dict[str, Any]]:
  """The evaluations in a config.json; InputError where somebody has changed them."""
  try:
    noted = [json.loads(text) for text in origin.get("evaluations", ())]
    rows = [(x["kind"], x["protocol"], *(y for row in x["figures"] for y in row)) for x in noted]
    if not all(isinstance(text, str) for row in rows for text in row):
      raise ValueError("a number where a text is needed")
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise InputError(
      f"{source / folder.CONFIG} is damaged (origin.evaluations: {error!r}); bring back the file "
      "as it was."
    ) from error
  return noted


def _merged(
  before: Sequence[dict[str, Any]], later: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
  """All evaluations; of two of the same kind and figures the later one."""
  both = [*before, *later]
  return [*{(x["kind"], *(name for name, _ in x["figures"])): x for x in both}.values()]


def _evaluated(path: Path, model: Pipeline | Tokenizer) -> dict[str, Any]:
  """Figures and protocol of a result of `launch.evaluate`, without the paths in it."""
  sections = ("samples", "tokenizer", "reference", "pictures", "network", "run")
  maybe: dict[str, Any] = dict.fromkeys(sections, dict | None)
  note = read_note(path, evaluation=str, figures=dict, **maybe)
  samples, tokenizer, own = note.get("samples") or {}, note.get("tokenizer") or {}, _identity(model)
  drawn = {"step": samples.get("diffusion_step"), "average": samples.get("ema")}
  for part, sha256, more in (
    ("diffusion", samples.get("diffusion"), drawn),
    ("tokenizer", samples.get("tokenizer"), {}),
    ("tokenizer", tokenizer.get("sha256"), {"step": tokenizer.get("step")}),
  ):
    if sha256 not in (None, own.get(part)):
      which = ", ".join([part, *(f"{name} {x}" for name, x in more.items() if x is not None)])
      raise InputError(
        f"{path} is of other weights ({which}) than those of the model; evaluate these, or export "
        "the others by --step, --ema and --tokenizer."
      )
  network = note.get("network") or {}
  of = {"samples": "samples", "reference": "reference pictures", "pictures": "pictures"}
  counts = ((what, note.get(name) or {}) for name, what in of.items())
  protocol = [
    *(f"{about['pictures']} {what}" for what, about in counts if "pictures" in about),
    *(str(network[key]) for key in ("protocol", "note") if key in network),
    *([note["protocol"]] if isinstance(note.get("protocol"), str) else []),
    *note.get("warnings", []),
    f"measured at commit {note.get('run', {}).get('commit', 'unknown')}",
  ]
  figures = [
    (name, f"{x:.5g}")
    for name, x in note["figures"].items()
    if isinstance(x, float) and not name.endswith((*PARTS,))
  ]
  return {"kind": note["evaluation"], "figures": figures, "protocol": "; ".join(protocol) + "."}


def load(
  workdir: Path, tokenizer: str, step: int | None, ema: float | None
) -> Pipeline | Tokenizer:
  """The model of a workdir or folder of either task."""
  task = _task_of(workdir)
  if task == "tokenizer" and tokenizer:
    raise InputError(f"--tokenizer does not apply: {workdir} is a tokenizer itself.")
  if folder.is_model(workdir):
    if task == "tokenizer":
      return Tokenizer.load(workdir, step=step, ema=ema)
    return Pipeline.load(workdir, tokenizer=tokenizer, step=step, ema=ema)
  if task == "tokenizer":
    return restore.for_use(restore.load(workdir, "tokenizer", step, ema))
  diffusion = restore.load(workdir, "diffusion", step, ema)
  return restore.for_use(diffusion, restore.tokenizer_of(diffusion, tokenizer))


def _task_of(workdir: Path) -> str:
  if folder.is_model(workdir):
    return folder.parts_of(workdir)[-1]
  return read_config(workdir)["task"]


def rows_of(output: Path) -> Sequence[tuple[str, str]]:
  """A table of the files of a model folder."""
  sizes = [(path.name, path.stat().st_size) for path in sorted(output.iterdir())]
  return [(name, f"{size / 2**20:.2f} MiB") for name, size in sizes]


def main() -> None:
  output = local_place(FLAGS.output)
  if FLAGS.push:
    check_name(FLAGS.push)
  workdir = folder.find(FLAGS.workdir)
  with owned(output, beside=True):
    folder.check_free_name(output)
    model = load(workdir, FLAGS.tokenizer, FLAGS.step, FLAGS.ema)
    export(
      model,
      output,
      workdir=workdir,
      dtype=FLAGS.dtype,
      samples=FLAGS.samples,
      licence=FLAGS.licence,
      title=FLAGS.title or FLAGS.push,
      evaluations=[place(path) for path in FLAGS.evaluations],
    )
  rows: list[tuple[str, Any]] = [*rows_of(output)]
  if FLAGS.push:
    rows.append(("on the hub", push(output, FLAGS.push, private=FLAGS.private)))
  kind = "Pipeline" if isinstance(model, Pipeline) else "Tokenizer"
  package = "lightningdit_jax" if isinstance(model, Pipeline) else "vavae_jax"
  rows.append(("in Python", f"from {package} import {kind}; {kind}.load({str(output)!r})"))
  console.table(f"Model folder {output}", ("what", "value"), rows)
  if isinstance(model, Pipeline):
    console.say_next("sample", f"--workdir={output}", f"--output={output}_samples.npz")
    console.say_studio(output)
  else:
    words = (f"--workdir={output}", f"--output={output}_latents", "--source=PICTURES")
    console.say_next("encode", *words)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, f"The model: {folder.TAKEN}", required=True)
  flags.DEFINE_string("output", None, "The model folder to write.", required=True)
  text = f"The tokenizer, where it is not at its place any more: {folder.TAKEN}"
  flags.DEFINE_string("tokenizer", "", text)
  flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
  flags.DEFINE_float("ema", None, "Decay of the average to use; the first if not given, 0: none.")
  flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the weights on disk.")
  text = "Samples of each class in samples.png; 0: no picture."
  flags.DEFINE_integer("samples", SAMPLES, text, lower_bound=0, upper_bound=64)
  flags.DEFINE_string("licence", "unknown", "Of the weights, for the card, such as mit.")
  flags.DEFINE_string("title", "", "Of the card; the folder's name if not given.")
  text = "JSON files of launch.evaluate, whose figures and protocols the card shows."
  flags.DEFINE_list("evaluations", [], text)
  flags.DEFINE_string("push", "", "USER/NAME on the Hugging Face hub to copy the folder to.")
  flags.DEFINE_boolean("private", False, "Make it private there.")
  console.run_command(main)
