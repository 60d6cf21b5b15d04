r"""Samples pictures with a trained LightningDiT and its tokenizer.

  python -m launch.sample --workdir=RUNS/diffusion --output=RUNS/samples.npz --num_samples=1000

Writes one npz as ADM's evaluator reads it (arr_0 uint8 pictures, arr_1 labels), a contact sheet
beside it (.png), the settings (.json), and with --png a folder of the pictures (no suffix). Sample
i is a function of the seed and i alone, to the bit on any number of devices and processes, which
share the work (launch/engine/processes.py). A run that was stopped goes on when started again, with
as many as there are then. The settings are the training's config.sample, changed by the flags given
here; --guide is autoguidance by another training on the same latents.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import FrozenConfigDict

from launch import restore
from launch.engine import console, processes
from launch.engine.configuration import check_begun, claim_folder
from launch.engine.log import NotFinite
from launch.engine.ownership import owned
from launch.engine.parts import ROWS, Parts, make_rows
from launch.evaluation.sample_files import write_npz, write_pngs
from lightningdit_jax import checks, sampling
from lightningdit_jax.store import latents
from lightningdit_jax.store.space import Space, labels_for
from vavae_jax import folder
from vavae_jax.common import mesh
from vavae_jax.common.batches import Batches
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import (
  check_free,
  check_outputs,
  place,
  read_note,
  remove_folder,
  write_json,
)
from vavae_jax.common.keys import LAST_SEED
from vavae_jax.common.sharding import pin_batch, whole
from vavae_jax.data.images import to_uint8

Sampler = Callable[..., np.ndarray]
PNG_SETTINGS = "settings.json"  # of a folder of pictures
SETTINGS = {"config.sample.": "--"}  # in messages: the flags that change them


def program_of(settings: FrozenConfigDict) -> FrozenConfigDict:
  """What of settings a sampler is compiled for: one serves all settings that are the same here."""
  off = {} if sampling.is_guided(settings) else {"cfg_scale": 1.0, "cfg_interval_start": 1.0}
  return FrozenConfigDict(settings.to_dict() | off | dict.fromkeys(_numbers_of(settings)))


def _numbers_of(settings: FrozenConfigDict) -> dict[str, np.float32]:
  """What a sampler's program takes as arguments; not a start at 0, which known saves a branch."""
  numbers = sampling.numbers_of(settings)
  return {k: x for k, x in numbers.items() if x or k != "cfg_interval_start"}


def make_sampler(
  config: FrozenConfigDict,
  space: Space,
  tokenizer: restore.Trained,
  settings: FrozenConfigDict,
  seed: int,
  devices: jax.sharding.Mesh,
  guide: restore.Trained | None = None,
) -> Sampler:
  """A compiled function from parameters, indices and labels to pictures.

  `config` and `space` are of the diffusion model; `settings` are as `config.sample`; `guide` is a
  second model to be guided away from.

  Returns:
    (params of the diffusion model, index [B], label [B], perhaps other settings of the same
    `program_of`) -> uint8 [B, H, W, 3], for any B; each device runs batches of
    `settings.batch_size`, the last one filled up. On a mesh of several processes each gets the
    pictures of its devices. NotFinite instead of pictures that are black because of numbers that
    are not finite.
  """
  mean, std = latents.statistics(space, latent_norm=config.latents.latent_norm)

  @jax.jit
  def run(
    params: Any, away: Any, decoder: Any, numbers: dict[str, jax.Array], batch: dict[str, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    normalised = sampling.sample_latents(
      config,
      params,
      batch["index"],
      batch["label"],
      seed=seed,
      sample=settings,
      guide=(guide.config, away) if guide else None,
      numbers=numbers,
    )
    z_BhwZ = latents.denormalise(normalised, mean, std, config.latents.latent_multiplier)
    image_BHWC = restore.autoencoder(tokenizer.config, decoder).decode(z_BhwZ)
    return pin_batch(to_uint8(image_BHWC)), whole(jnp.isfinite(image_BHWC).all((1, 2, 3)))

  batches = Batches(run, settings.batch_size, devices, console.say_here)
  away = guide.params if guide else None

  def sample(
    params: Any, index_B: np.ndarray, label_B: np.ndarray, now: FrozenConfigDict = settings
  ) -> np.ndarray:
    batch = {"index": index_B.astype(np.int32), "label": label_B.astype(np.int32)}
    found = batches(batch, params, away, tokenizer.params, _numbers_of(now))
    pictures, finite = (np.concatenate(parts) for parts in zip(*found, strict=True))
    if not finite.all():
      raise NotFinite(
        f"{np.sum(~finite)} of {len(finite)} samples have numbers that are not finite; change the "
        "solver's settings (SDE: diffusion_norm, last_step), or give --dtype=float32."
      )
    return pictures

  return sample


def sample_set(
  diffusion: restore.Trained,
  tokenizer: restore.Trained,
  output: Path,
  *,
  num_samples: int,
  labels: str = "balanced",
  seed: int = 0,
  settings: FrozenConfigDict | None = None,
  guide: restore.Trained | None = None,
  png: bool = False,
) -> None:
  """Samples a set and writes it, or what is missing of it; the arguments are the command's.

  Finished batches wait in the folder `output.parts` beside the npz `output`. `settings` are as
  `config.sample`; the training's own if None.

  Raises:
    InputError: settings do not fit, or `output` was begun with other ones.
  """
  settings = settings or diffusion.config.sample
  checks.check_sampling(settings, diffusion.config, guide and guide.config)
  if guide:
    checks.check_guide(diffusion.config, guide.config, settings)
  space = restore.space_of(diffusion)
  count, names = diffusion.config.model.num_classes, space.class_names
  label_N = labels_for(labels, num_samples, count, seed, names)
  # The batch size is no part of what a sample is.
  noted = {
    "diffusion": diffusion.sha256,
    "diffusion_step": diffusion.step,
    "tokenizer": tokenizer.sha256,
    "guide": guide.sha256 if guide else None,
    "num_samples": num_samples,
    "labels": labels,
    "seed": seed,
    **{k: v for k, v in settings.to_dict().items() if k != "batch_size"},
  }
  parts = Parts(output.with_suffix(".parts"), num_samples, settings.batch_size, ROWS)

  def begin() -> bool:
    about = output.with_suffix(".json")
    check_outputs((output, about, output.with_suffix(".png")), (parts.folder,))
    if output.is_file() or parts.folder.is_dir() or about.is_file():
      check_begun(output, read_note(about) if about.is_file() else {}, noted)
    if png:
      claim_folder(output.with_suffix(""), PNG_SETTINGS, noted)
    if output.is_file():
      return False
    one = 3 * tokenizer.config.data.image_size**2
    done = sum(map(len, parts.there()))
    what = "for the samples in parts and as one file"
    check_free(output.parent, one * (2 * num_samples - done), what)
    write_json(about, noted | {"label": label_N.tolist(), "class_names": list(names)})
    parts.folder.mkdir(exist_ok=True)
    return True

  def finish() -> None:
    if not output.is_file():
      parts.check_complete()
      write_npz(output, parts, label_N, names)
    remove_folder(parts.folder)
    if png:
      write_pngs(output, output.with_suffix(""), names, seed)

  if processes.first_does(begin):
    devices = mesh.local_mesh()
    here = (space, tokenizer.on(devices), settings, seed, devices, guide and guide.on(devices))
    run, params = make_sampler(diffusion.config, *here), diffusion.on(devices).params
    make_rows(parts, lambda index_B: run(params, index_B, label_N[index_B]), devices.size, "sample")
    processes.wait_for_all()
  processes.first_does(finish)


def define_flags(num_samples: int, least: int) -> None:
  """Defines the flags of the samples of a model, one for each of `config.sample` among them."""
  flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
  flags.DEFINE_float("ema", None, "Decay of the average to use; the first if not given, 0: none.")
  flags.DEFINE_integer(
    "num_samples", num_samples, "Number of samples.", lower_bound=least, upper_bound=10**8
  )
  text = (
    "balanced, uniform (as the paper's), or names and numbers of classes such as 3,7,cat, repeated;"
    " a name with commas in quotes: '\"cat, wild\",dog'."
  )
  flags.DEFINE_string("labels", "balanced", text)
  flags.DEFINE_integer("seed", 0, "Seed of noise and labels.", lower_bound=0, upper_bound=LAST_SEED)
  for name, key in checks.SAMPLE.items():
    kind = {int: "integer", float: "float", str: "string"}[type(key.default)]
    possible = key.needed()
    text = f"{key.text} {possible[0].upper()}{possible[1:]}."
    getattr(flags, f"DEFINE_{kind}")(name, None, text)
    flags.FLAGS[name].default_as_str = f"the model's own, usually {key.default!r}"  # for --help


def define_guide() -> None:
  """Defines --guide."""
  text = f"A second, weaker model to be guided away from: {folder.TAKEN}"
  flags.DEFINE_string("guide", "", text)


def given_settings(diffusion: restore.Trained, **changes: Any) -> FrozenConfigDict:
  """The model's own `config.sample` with the flags that were given and these changes."""
  given = {k: flags.FLAGS[k].value for k in checks.SAMPLE if flags.FLAGS[k].value is not None}
  return checks.changed(diffusion.config.sample, **given | changes)


def main() -> None:
  fixed = ("num_samples", "labels", "guide", *checks.SAMPLE.keys() - {"batch_size"})
  if FLAGS.published and (given := sorted(name for name in fixed if FLAGS[name].present)):
    raise InputError(f"--published and --{given[0]} exclude each other; leave one of them out.")
  diffusion = restore.load(folder.find(FLAGS.workdir), "diffusion", FLAGS.step, FLAGS.ema)
  guide = None
  if FLAGS.guide:
    guide = restore.load(folder.find(FLAGS.guide), "diffusion", FLAGS.guide_step, FLAGS.guide_ema)
  drawn = {"num_samples": FLAGS.num_samples, "labels": FLAGS.labels}
  if FLAGS.published:
    if "published" not in diffusion.config:
      raise InputError(f"--published: {FLAGS.workdir} is older than this flag and names no labels.")
    drawn = diffusion.config.published.to_dict()
  output = place(FLAGS.output)
  if output.suffix != ".npz":
    raise InputError(f"--output is {output}; its name must end in .npz.")
  tokenizer = restore.tokenizer_of(diffusion, FLAGS.tokenizer)
  with owned(output, beside=True), console.naming(SETTINGS):
    sample_set(
      diffusion,
      tokenizer,
      output,
      **drawn,
      seed=FLAGS.seed,
      settings=given_settings(diffusion),
      guide=guide,
      png=FLAGS.png,
    )
  endings = {f"{drawn['num_samples']} pictures": ".npz", "contact sheet": ".png"}
  endings |= {"settings": ".json"} | ({"PNG files": ""} if FLAGS.png else {})
  rows = [(what, str(output.with_suffix(ending))) for what, ending in endings.items()]
  console.table("Samples", ("what", "where"), rows)
  reference = f"--reference={tokenizer.config.data.source or 'PICTURES'}"
  words = (f"--samples={output}", reference, f"--output={output.with_suffix('')}_generation")
  console.say_next("evaluate", "generation", *words, "--protocol=efficientnet_lite0")


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, folder.TAKEN, required=True)
  flags.DEFINE_string("output", None, "The npz to write.", required=True)
  text = f"The tokenizer, where it has moved: {folder.TAKEN}"
  flags.DEFINE_string("tokenizer", "", text)
  define_guide()
  flags.DEFINE_integer("guide_step", None, "Step of its checkpoint; the newest if not given.")
  flags.DEFINE_float("guide_ema", None, "Decay of its average; the first if not given, 0: none.")
  flags.DEFINE_boolean("png", False, "Also write a folder of PNG files.")
  text = "Draws as the number that the recipe names was made: count, labels and sampler."
  flags.DEFINE_boolean("published", False, text)
  define_flags(1_000, least=1)
  console.run_command(main, several=True)
