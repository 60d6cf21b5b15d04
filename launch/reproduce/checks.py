"""Whatever makes a published number not come out is looked for before anything runs.

First files by their hashes, as far as these are known; then models by their configurations; then,
since few hashes are known, all together by what they make of a few pictures (`probes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from launch import convert, restore, tasks
from launch.engine import configuration, console, processes
from launch.evaluation.features import load_network
from launch.evaluation.pictures import stored_statistics
from launch.evaluation.sample_files import Npz
from launch.reproduce import probes
from launch.reproduce.checked import CAUSES, Checked
from launch.reproduce.given import Given
from launch.reproduce.needs import check_read, find_all
from launch.reproduce.recipes import OURS, config_of
from launch.reproduce.records import File, Pictures, Record
from launch.weights import recognition
from lightningdit_jax.checks import check_model
from lightningdit_jax.store.latents import LatentStore
from vavae_jax import folder
from vavae_jax.common.addresses import local_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import read_note, remove_folder, write_json
from vavae_jax.data import sources
from vavae_jax.perceptual import Lpips, load_lpips

# Keys in which a training may differ from its recipe; and those that weights alone agree in.
_ELSEWHERE = (
  *(*configuration.MAY_CHANGE, *OURS, "seed", "data.", "teacher.weights", "perceptual."),
  *("stages.begins", "latents.sha256", "sample.", "published."),
)
_OF_WEIGHTS = ("model.", "transport.path_type", "transport.prediction", "latents.latent_")
# Of keys in messages: the flags that set them.
_FLAGS = {
  "config.teacher.weights": "--teacher",
  "config.perceptual.vgg": "--lpips_vgg",
  "config.perceptual.heads": "--lpips_heads",
}


def check(record: Record, given: Given, workdir: Path) -> Checked:
  """Makes all checks of a number; files of weights become workdirs inside of `workdir`.

  InputError: something is missing, all of which is named, or wrong.
  """
  if unknown := sorted({*given.allow} - {*CAUSES}):
    raise InputError(f"--allow is {unknown[0]!r}; choose of {', '.join(CAUSES)}.")
  # Before a download.
  config_of(record.recipe or record.tokenizer.recipe, record.changes, given)
  check_read(record, given)
  paths = find_all(record, given)
  with console.naming({"--weights": "--inception"}):
    network = load_network(record.protocol, str(paths.get("inception", "")))
  checked = Checked(given.allow, network)
  if "inception" in paths and paths["inception"].is_file():
    checked.file("inception", "FID's Inception", paths["inception"], record.network)
  made_by = config_of(record.tokenizer.recipe, {}, None if record.recipe else given)
  if not record.recipe:
    _check_pictures(checked, record.validation, given.validation)
  if not record.recipe and given.train:
    _check_training(checked, record, given, paths, made_by)
  else:
    found = _model(checked, record.tokenizer.file, paths["tokenizer"], workdir, made_by)
    checked.tokenizer = found
    if record.recipe:
      _check_generation(checked, found, record, given, paths, workdir)
    else:
      spec = given.validation or record.validation.source
      probes.rebuilt(checked, found, probes.of_source(spec, found), record.tokenizer.psnr)
  if not record.recipe:
    checked.lpips = _lpips(given, made_by)
    if checked.lpips is None:
      lacks = "without them LPIPS stays open; --lpips_vgg and --lpips_heads take them"
      checked.rows.append(("LPIPS", "its files are not here", lacks))
  checked.end()
  return checked


def _check_pictures(checked: Checked, wanted: Pictures, given: str) -> None:
  """Their number, and where classes matter their names."""
  source = sources.open_source(given or wanted.source)
  wrong = "" if len(source) == wanted.count else f"{wanted.name} has {wanted.count:,}"
  checked.tell("pictures", "pictures", f"{len(source):,} of {given or wanted.source}", wrong)
  if wanted.classes:
    names = source.class_names
    there, needed = (len(names), names[0], names[-1]), (wanted.classes, *wanted.ends)
    wrong = "" if there == needed else "{} from {} to {} are needed".format(*needed)
    checked.tell("labels", "classes", "{} from {} to {}".format(*there), wrong)


def _check_training(
  checked: Checked,
  record: Record,
  given: Given,
  paths: Mapping[str, Path],
  config: ConfigDict,
) -> None:
  """Of a tokenizer: pictures, teacher and LPIPS, which its configuration gets."""
  _check_pictures(checked, record.pictures, given.pictures)
  config.data.source = given.pictures or record.pictures.source
  config.data.valid_source = given.validation or record.validation.source
  config.teacher.weights = str(paths.get("teacher", ""))
  for name, given_file in (("vgg", given.lpips_vgg), ("heads", given.lpips_heads)):
    found = given_file or str(paths.get(f"lpips_{name}", config.perceptual[name]))
    config.perceptual[name] = found
  with console.naming(_FLAGS):
    tasks.of(config).check(tasks.resolve(config))
  checked.config = config


def _model(
  checked: Checked, file: File, path: Path, workdir: Path, config: ConfigDict, **more: Any
) -> restore.Trained:
  """A model whose configuration is compared with `config`; a file becomes a workdir first."""
  task, part = config.task, recognition.ITSELF
  cause = "model" if task == "diffusion" else task
  if path.is_file():
    path, part = _converted(checked, cause, task, path, file, workdir, config=config, **more)
  model = restore.load(path, task)
  wrong = _differences(model, config)
  if task == "diffusion" and "ema" not in part and part != recognition.ITSELF:
    wrong.append(f"the weights are {part} of the file and no average")
  found = f"step {model.step} in {path}, weights {model.sha256}"
  checked.tell(cause, task, found, "; ".join(wrong))
  return model


def _converted(
  checked: Checked,
  cause: str,
  name: str,
  path: Path,
  file: File,
  workdir: Path,
  *,
  config: ConfigDict | None = None,
  **more: Any,
) -> tuple[Path, str]:
  """(what `convert` makes of a file, anew where another one is given; which part of it)."""
  note, dest = workdir / f"{name}.json", workdir / name
  begun = {"sha256": checked.file(cause, f"{name} file", path, file), **more}
  noted = read_note(note) if note.exists() else {}
  if dest.exists() and not noted:
    raise InputError(f"{dest} is not of this command; give another --workdir.")
  same = dest.exists() and all(noted.get(key) == value for key, value in begun.items())
  if not same or "part" not in noted:
    if processes.several():
      raise InputError(f"{path} is not converted yet; begin with --check, in one process.")
    write_json(note, begun)  # whose the folder is, if this ends between
    remove_folder(dest)
    part = convert.convert(str(path), dest, config=config, **more).weights.part
    write_json(note, noted := begun | {"part": part})
  return dest, noted["part"]


def _differences(model: restore.Trained, config: ConfigDict) -> list[str]:
  """Where a training was another one than the recipe's; of weights alone what is known of them."""
  alone = model.step == 0 or folder.is_model(model.workdir)
  there, wanted = (dict(configuration.flat(x.to_dict())) for x in (model.config, config))
  names = (name for name in wanted if not name.startswith(_ELSEWHERE))
  differing = [
    f"config.{name} is {there.get(name)!r} instead of {wanted[name]!r}"
    for name in names
    if there.get(name) != wanted[name] and (not alone or name.startswith(_OF_WEIGHTS))
  ]
  steps = wanted["num_steps"] or there["num_steps"]
  if model.step and steps and model.step != steps:  # a model folder has no step to reach
    differing.append(f"its step is {model.step} instead of {steps}")
  return differing


def _check_generation(
  checked: Checked,
  tokenizer: restore.Trained,
  record: Record,
  given: Given,
  paths: Mapping[str, Path],
  workdir: Path,
) -> None:
  """Reference, latents and model, then all of them together."""
  config = config_of(record.recipe, record.changes, given)
  config.tokenizer = str(tokenizer.workdir)
  space: Any = None
  _check_reference(checked, record, paths["reference"])
  statistics = paths.get("statistics")
  if statistics and statistics.is_file():
    given_file = (statistics, record.statistics, workdir)
    statistics, _ = _converted(checked, "latents", "statistics", *given_file)
  if not given.train:
    more = {"tokenizer": config.tokenizer}
    if statistics:
      more["latents"] = str(statistics)
    found = _model(checked, record.weights, paths["diffusion"], workdir, config, **more)
    checked.diffusion, space = found, restore.space_of(found)
    _check_maker(checked, space.tokenizer, tokenizer)
  elif given.latents:
    space = restore.open_latents(given.latents)
    _check_store(checked, record, space)
    _check_maker(checked, space.manifest.get("tokenizer", {}), tokenizer)
  else:
    _check_pictures(checked, record.pictures, given.pictures)
    space = restore.open_latents(str(statistics)) if statistics else None
  if given.train:
    config.latents.path = given.latents or str(workdir / "latents")
    check_model(FrozenConfigDict(config))
  checked.config = config
  probes.together(checked, tokenizer, space, record)


def _check_reference(checked: Checked, record: Record, path: Path) -> None:
  """Names and shapes of the arrays of an npz."""
  pictures, stated = Npz(path), stored_statistics(str(path))
  shapes = {name: array.shape for name, array in stated.items()}
  shapes["arr_0"] = (len(pictures), pictures.size, pictures.size, 3)
  checked.reference = str(path)
  checked.file("reference", "FID's reference", path, record.reference)
  lacks = [f"{name} {shape}" for name, shape in record.arrays.items() if shapes.get(name) != shape]
  found = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
  checked.tell("reference", "its arrays", found, f"it lacks {', '.join(lacks)}" if lacks else "")


def _lpips(given: Given, config: ConfigDict) -> Lpips | None:
  """If its files are given, or where the recipe has them."""
  files = (given.lpips_vgg or config.perceptual.vgg, given.lpips_heads or config.perceptual.heads)
  if given.lpips_heads and not local_file(files[0]).is_file():
    raise InputError(f"--lpips_heads is given, but LPIPS' VGG16 is not at {files[0]}: --lpips_vgg.")
  there = files[0] and all(local_file(file).is_file() for file in files if file)
  return load_lpips(*files) if given.lpips_vgg or there else None


def _check_store(checked: Checked, record: Record, store: LatentStore) -> None:
  """Number, labels, and whether the statistics are those of the latents."""
  count, wanted = len(store), record.pictures
  # The published latents have one picture twice.
  wrong = "" if 0 <= count - wanted.count <= 1 else f"{wanted.name} has {wanted.count:,}"
  checked.tell("pictures", "latents", f"{count:,} in {store.path}", wrong)
  classes = len(np.unique(store.labels))
  wrong = "" if classes == wanted.classes else f"{wanted.classes} are needed"
  checked.tell("labels", "classes of the latents", str(classes), wrong)
  probes.stored(checked, store)


def _check_maker(checked: Checked, noted: Mapping[str, Any], tokenizer: restore.Trained) -> None:
  """The tokenizer by which latents say that they were made, where they say so."""
  if made_by := noted.get("sha256"):
    wrong = "" if made_by == tokenizer.sha256 else f"--tokenizer is {tokenizer.sha256}"
    checked.tell("latents", "latents made by", made_by, wrong)
