r"""Encodes pictures to a latent store, which LightningDiT trains on.

  python -m launch.encode --workdir=RUNS/tokenizer --output=DATA/latents

The pictures are those that the tokenizer was trained on (--source takes others, --held_out the ones
that training left out). Each is stored as one posterior sample of itself and one of its mirror
image; the noise is a function of seed and index. Shards are written whole, in the published layout,
so a run that was stopped goes on with the first missing one when started again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import FrozenConfigDict

from launch import trained
from launch.engine import console, mesh
from lightningdit_jax import latents
from vavae_jax import images
from vavae_jax.errors import InputError
from vavae_jax.files import write_json

BEGUN = "encoding.json"


def encode(
  tokenizer: trained.Trained,
  output: Path,
  *,
  source: str = "",
  held_out: bool = False,
  batch_size: int = 64,
  shard_size: int = 10_000,
  seed: int = 0,
) -> latents.LatentStore:
  """Writes the latent store of a source, or what is missing of it.

  Args:
    tokenizer: from `trained.load`.
    output: the store's folder.
    source: as in `config.data.source`; "" is the tokenizer's own.
    held_out: encode the held-out share instead of the training share.
    batch_size: pictures at once, over all devices; rounded up to a multiple of their number.
    shard_size: records a shard.
    seed: of the posterior's noise.

  Returns:
    The finished store.

  Raises:
    InputError: nothing to encode, or `output` was begun with other settings.
  """
  data = tokenizer.config.data
  spec = source or data.source
  pictures = images.open_source(spec)
  train, rest = images.split(len(pictures), data.held_out, data.split_seed)
  indices = rest if held_out else train
  if not len(indices):
    raise InputError(f"{spec} has no pictures to encode.")
  manifest = {
    "tokenizer": {
      "workdir": str(tokenizer.workdir.absolute()),
      "step": tokenizer.step,
      "sha256": tokenizer.sha256,
    },
    "source": spec,
    "held_out": held_out,
    "image_size": data.image_size,
    "class_names": list(pictures.class_names),
    "shard_size": shard_size,
    "seed": seed,
    "records": len(indices),
  }
  devices = mesh.make_mesh()
  batch_size = mesh.round_up(batch_size, devices)
  _claim(output, manifest)
  run = _encoder(tokenizer, devices, seed)
  starts = range(0, len(indices), shard_size)
  with console.Bar("encode", len(indices)) as bar:
    for number, start in enumerate(starts):
      shard = indices[start : start + shard_size]
      path = output / f"latents_rank00_shard{number:03d}.safetensors"
      if not path.exists():
        parts = []
        for i in range(0, len(shard), batch_size):
          parts.append(_encode_batch(run, pictures, shard[i : i + batch_size], data, batch_size))
          bar.update(start + i + len(parts[-1][2]))
        latents.write_shard(path, *(np.concatenate(column) for column in zip(*parts, strict=True)))
      bar.update(start + len(shard))
  latents.finish_store(output, manifest, seed)
  return latents.LatentStore(output)


def _claim(output: Path, manifest: dict[str, Any]) -> None:
  path = output / BEGUN
  if path.is_file():
    begun = json.loads(path.read_text())
    if differing := [k for k in manifest if _identity(begun.get(k)) != _identity(manifest[k])]:
      raise InputError(
        f"{output} holds latents that were begun with another {', '.join(differing)}; give a new "
        "folder, or the settings it was begun with, or delete it."
      )
  if not path.is_file() and any(output.glob("*.safetensors")):
    raise InputError(f"{output} holds latents that launch.encode did not write; give another one.")
  write_json(path, manifest)


def _identity(noted: Any) -> Any:
  """A tokenizer is known by its hash, wherever its workdir has gone."""
  return noted.get("sha256") if isinstance(noted, dict) else noted


def _encoder(tokenizer: trained.Trained, devices: jax.sharding.Mesh, seed: int) -> Any:
  """(indices, uint8 batch) -> samples of the pictures and of their mirror images."""

  @jax.jit
  def run(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    model = trained.autoencoder(tokenizer, params)
    picture = images.to_float(batch["image"])
    key = jax.random.key(seed)

    def noise(flip: int, shape: tuple[int, ...]) -> jax.Array:
      def one(i: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, 2 * i + flip), shape[1:])

      return jax.vmap(one)(batch["index"])

    plain, mirror = model.encode(picture), model.encode(picture[:, :, ::-1])
    return (
      plain.sample(noise(0, plain.mean.shape)),
      mirror.sample(noise(1, mirror.mean.shape)),
    )

  def on_devices(batch: dict[str, np.ndarray]) -> list[np.ndarray]:
    with jax.set_mesh(devices):
      return jax.device_get(run(tokenizer.params, mesh.to_global(batch, devices)))

  return on_devices


def _encode_batch(
  run: Callable[[dict[str, np.ndarray]], list[np.ndarray]],
  pictures: images.Source,
  indices: np.ndarray,
  data: FrozenConfigDict,
  batch_size: int,
) -> tuple[np.ndarray, ...]:
  """The last batch is filled up by repeating, so that one shape compiles and devices divide it."""
  filled = np.resize(indices, batch_size)
  batch = {
    "image": images.load_crops(pictures, filled, data.image_size),
    "index": filled.astype(np.int32),
  }
  plain, mirror = run(batch)
  labels = np.array([pictures[int(i)]["label"] for i in indices])
  return plain[: len(indices)], mirror[: len(indices)], labels


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  store = encode(
    trained.load(Path(FLAGS.workdir), "tokenizer", FLAGS.step),
    Path(FLAGS.output),
    source=FLAGS.source,
    held_out=FLAGS.held_out,
    batch_size=FLAGS.batch_size,
    shard_size=FLAGS.shard_size,
    seed=FLAGS.seed,
  )
  height, width, channels = store.shape
  console.table(
    "Latent store",
    ("what", "value"),
    [
      ("records", str(len(store))),
      ("shape", f"{height} x {width}, {channels} channels"),
      ("mean std of a channel", f"{float(jnp.mean(store.std)):.3f}"),
      ("folder", str(store.path)),
    ],
  )


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("workdir", None, "The tokenizer's workdir.", required=True)
  flags.DEFINE_string("output", None, "The latent store's folder.", required=True)
  flags.DEFINE_string("source", "", "Other pictures, such as folder:DIR.")
  flags.DEFINE_bool("held_out", False, "Encode the pictures that training left out.")
  flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.")
  flags.DEFINE_integer("batch_size", 64, "Pictures at once, over all devices.", lower_bound=1)
  flags.DEFINE_integer("shard_size", 10_000, "Records a shard.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of the posterior's noise.")
  console.run_command(main)
