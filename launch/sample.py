r"""Samples pictures with a trained LightningDiT and its tokenizer.

  python -m launch.sample --workdir=RUNS/diffusion --output=RUNS/samples.npz --num_samples=1000

Writes one npz as ADM's evaluator reads it (arr_0 uint8 pictures, arr_1 labels), a contact sheet
beside it (.png) and the settings (.json). Sample i is a function of the seed and i alone, whatever
the batch size and the number of devices. A run that was stopped goes on when started again.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

import lightningdit_jax.training
from launch import trained
from launch.engine import console, mesh
from launch.engine.batches import in_batches
from lightningdit_jax import latents
from vavae_jax import images
from vavae_jax.errors import InputError
from vavae_jax.files import atomic_file, write_json

Sampler = Callable[..., np.ndarray]
SHEET_COLUMNS = 12
SHEET_PICTURES = 96


def labels_for(kind: str, num_samples: int, num_classes: int, seed: int) -> np.ndarray:
  """The label of each sample.

  Args:
    kind: "balanced" (every class as often), "uniform" (random), or labels as in "3,7,7", repeated.
    num_samples: how many.
    num_classes: labels are below it.
    seed: of the random ones.

  Returns:
    int32 [num_samples].

  Raises:
    InputError: no such kind, or a label out of range.
  """
  if kind == "balanced":
    return np.arange(num_samples, dtype=np.int32) % num_classes
  if kind == "uniform":
    return np.random.default_rng(seed).integers(num_classes, size=num_samples, dtype=np.int32)
  try:
    given = [int(x) for x in kind.split(",")]
  except ValueError as error:
    raise InputError(
      f'--labels is {kind!r}; give "balanced", "uniform", or numbers such as 3,7,7.'
    ) from error
  if min(given) < 0 or max(given) >= num_classes:
    raise InputError(f"--labels is {kind!r}; labels must lie in 0..{num_classes - 1}.")
  return np.resize(np.asarray(given, np.int32), num_samples)


def make_sampler(
  diffusion: trained.Trained,
  tokenizer: trained.Trained,
  settings: FrozenConfigDict,
  seed: int,
  devices: jax.sharding.Mesh,
) -> Sampler:
  """A compiled function from indices and labels to pictures.

  Args:
    diffusion: the trained model; its latent store gives the statistics.
    tokenizer: whose decoder makes the pictures.
    settings: as `config.sample`.
    seed: of the set of samples.
    devices: from `mesh.make_mesh`.

  Returns:
    (index int32 [B], label int32 [B]) -> uint8 [B, H, W, 3], for any B; it runs in batches of
    `settings.batch_size`, the last one filled up. Takes other parameters as third argument.
  """
  config = diffusion.config
  store = lightningdit_jax.training.open_store(config.latents.path)
  mean, std = latents.statistics(store, latent_norm=config.latents.latent_norm)

  @jax.jit
  def run(params: Any, decoder: Any, batch: dict[str, jax.Array]) -> jax.Array:
    normalised = lightningdit_jax.training.sample_latents(
      config, params, batch["index"], batch["label"], seed=seed, sample=settings
    )
    z_BhwZ = latents.denormalise(normalised, mean, std, config.latents.latent_multiplier)
    return images.to_uint8(trained.autoencoder(tokenizer, decoder).decode(z_BhwZ))

  def sample(index_B: np.ndarray, label_B: np.ndarray, params: Any = None) -> np.ndarray:
    params = diffusion.params if params is None else params
    batch = {"index": index_B.astype(np.int32), "label": label_B.astype(np.int32)}
    decode = functools.partial(run, params, tokenizer.params)
    return np.concatenate(list(in_batches(decode, batch, settings.batch_size, devices)))

  return sample


def sample_set(
  diffusion: trained.Trained,
  tokenizer: trained.Trained,
  output: Path,
  *,
  num_samples: int,
  labels: str = "balanced",
  seed: int = 0,
  settings: FrozenConfigDict | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Samples a set and writes it, or what is missing of it.

  Args:
    diffusion: from `trained.load`.
    tokenizer: likewise.
    output: the npz; finished batches wait in the folder `output.parts` beside it.
    num_samples: how many.
    labels: see `labels_for`.
    seed: of noise and labels.
    settings: as `config.sample`; the training's own if None.

  Returns:
    (uint8 [N, H, W, 3], int32 [N]).

  Raises:
    InputError: settings do not fit, or `output` was begun with other ones.
  """
  settings = settings or diffusion.config.sample
  lightningdit_jax.training.check_sampling(settings, diffusion.config.model)
  label_N = labels_for(labels, num_samples, diffusion.config.model.num_classes, seed)
  # The batch size is no part of what a sample is.
  noted = {
    "diffusion": diffusion.sha256,
    "diffusion_step": diffusion.step,
    "tokenizer": tokenizer.sha256,
    "num_samples": num_samples,
    "labels": labels,
    "seed": seed,
    **{k: v for k, v in settings.to_dict().items() if k != "batch_size"},
  }
  parts, about = output.with_suffix(".parts"), output.with_suffix(".json")
  if output.is_file() or parts.is_dir() or about.is_file():
    _check_begun(output, about, noted)
  if output.is_file():
    shutil.rmtree(parts, ignore_errors=True)
    with np.load(output) as stored:
      return stored["arr_0"], stored["arr_1"]
  parts.mkdir(parents=True, exist_ok=True)
  write_json(about, noted)
  run = make_sampler(diffusion, tokenizer, settings, seed, mesh.make_mesh())
  size = settings.batch_size
  with console.Bar("sample", num_samples) as bar:
    for start in range(0, num_samples, size):
      index_B = np.arange(start, min(start + size, num_samples))
      path = parts / f"{start:09d}_{len(index_B)}.npy"
      if not path.is_file():
        pictures = run(index_B, label_N[index_B])
        with atomic_file(path) as file:
          np.save(file, pictures)
      bar.update(start + len(index_B))
  pictures = _collect(parts, num_samples)
  with atomic_file(output.with_suffix(".png")) as file:
    Image.fromarray(contact_sheet(pictures[:SHEET_PICTURES])).save(file, "PNG")
  # Last: its being there says that everything is.
  with atomic_file(output) as file:
    np.savez(file, arr_0=pictures, arr_1=label_N)
  shutil.rmtree(parts)
  return pictures, label_N


def _check_begun(output: Path, about: Path, noted: dict[str, Any]) -> None:
  begun = json.loads(about.read_text()) if about.is_file() else {}
  if differing := [k for k in noted if begun.get(k) != noted[k]]:
    raise InputError(
      f"{output} was begun with another {', '.join(differing)}; give a new --output, or the "
      "settings it was begun with."
    )


def _collect(parts: Path, num_samples: int) -> np.ndarray:
  """Parts may come from runs with other batch sizes: the last to name a sample gives it."""
  pictures: np.ndarray | None = None
  for path in sorted(parts.glob("*.npy")):
    start, part = int(path.stem.split("_")[0]), np.load(path, allow_pickle=False)
    if pictures is None:
      pictures = np.zeros((num_samples, *part.shape[1:]), np.uint8)
    pictures[start : start + len(part)] = part
  if pictures is None:
    raise InputError(f"num_samples is {num_samples}; at least 1 is needed.")
  return pictures


def contact_sheet(pictures_NHWC: np.ndarray, columns: int = SHEET_COLUMNS) -> np.ndarray:
  """Pictures in rows of `columns` as one, the last row filled up with white.

  Args:
    pictures_NHWC: uint8.
    columns: pictures a row.

  Returns:
    uint8 [rows H, columns W, 3].
  """
  count, height, width, channels = pictures_NHWC.shape
  rows = -(-count // columns)
  filled = np.full((rows * columns, height, width, channels), 255, np.uint8)
  filled[:count] = pictures_NHWC
  grid = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * height, columns * width, channels)


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  diffusion = trained.load(Path(FLAGS.workdir), "diffusion", FLAGS.step)
  override = Path(FLAGS.tokenizer) if FLAGS.tokenizer else None
  settings = diffusion.config.sample.to_dict()
  settings |= {k: FLAGS[k].value for k in settings if FLAGS[k].value is not None}
  output = Path(FLAGS.output)
  if output.suffix != ".npz":
    raise InputError(f"--output is {output}; its name must end in .npz.")
  sample_set(
    diffusion,
    trained.tokenizer_of(diffusion, override),
    output,
    num_samples=FLAGS.num_samples,
    labels=FLAGS.labels,
    seed=FLAGS.seed,
    settings=FrozenConfigDict(ConfigDict(settings)),
  )
  console.table(
    "Samples",
    ("what", "where"),
    [
      (f"{FLAGS.num_samples} pictures", str(output)),
      ("contact sheet", str(output.with_suffix(".png"))),
      ("settings", str(output.with_suffix(".json"))),
    ],
  )


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The diffusion model's workdir.", required=True)
  flags.DEFINE_string("output", None, "The npz to write.", required=True)
  flags.DEFINE_integer("num_samples", 1000, "How many.", lower_bound=1)
  flags.DEFINE_string("labels", "balanced", 'Or "uniform", or numbers as in 3,7,7, repeated.')
  flags.DEFINE_integer("seed", 0, "Of noise and labels.")
  flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.")
  flags.DEFINE_string("tokenizer", "", "The tokenizer's workdir, where the latents do not say.")
  flags.DEFINE_integer("num_steps", None, "Grid points of the solver.", lower_bound=2)
  flags.DEFINE_string("method", None, "Solver: euler.")
  flags.DEFINE_float("timestep_shift", None, "Shift of the time grid; 0 is none.")
  flags.DEFINE_float("cfg_scale", None, "Guidance; 1 is none.")
  flags.DEFINE_float("cfg_interval_start", None, "No guidance where t is smaller.")
  flags.DEFINE_integer("cfg_channels", None, "Guidance on the first channels only; 0: on all.")
  flags.DEFINE_integer("batch_size", None, "Samples at once, over all devices.")
  console.run_command(main)
