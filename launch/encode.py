r"""Encodes pictures to a latent store, which LightningDiT trains on, or checks a store.

  python -m launch.encode --workdir=RUNS/tokenizer --output=DATA/latents
  python -m launch.encode --check=DATA/latents

The pictures are those that the tokenizer was trained on (--source takes others, --held_out the ones
that training left out). Each is stored as one posterior sample of itself and one of its mirror
image; the noise is a function of seed and index. With --moments the posteriors themselves are
stored, and training draws anew in each epoch. Batches wait as files until one of the processes
that share the work (launch/engine/processes.py) joins them to shards in the published layout, on a
disk that all of them see or in a bucket. A run that was stopped goes on with what is missing when
started again, with as many processes as there are then.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import FrozenConfigDict

import configs.base
from launch import restore
from launch.engine import console, processes
from launch.engine.configuration import check_begun
from launch.engine.ownership import owned
from launch.evaluation import check_latents
from launch.evaluation.encoded_files import Encoded
from lightningdit_jax import encoding
from lightningdit_jax.store import fetching, latents, shards
from vavae_jax import folder
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import (
  check_free,
  check_outputs,
  place,
  read_note,
  write_json,
)
from vavae_jax.common.keys import LAST_SEED
from vavae_jax.data import changes, images, selection, sources
from vavae_jax.training import latent_shape

BEGUN = "encoding.json"
_NOTES = BEGUN, latents.STATISTICS, latents.MANIFEST
DTYPES = ("float32", "bfloat16")


class _Batch(NamedTuple):
  """The pictures of a part, and names and messages of those that cannot be read, by their rows."""

  part: range
  arrays: dict[str, np.ndarray]  # as `encoding.columns` takes them, filled up to the batch size
  label: np.ndarray  # int64 [len(part)]
  skipped: dict[int, tuple[str, str]]


def encode(
  tokenizer: restore.Trained,
  output: Path,
  *,
  source: str = "",
  held_out: bool = False,
  places: range | None = None,
  batch_size: int = 64,
  shard_size: int = 10_000,
  seed: int = 0,
  dtype: str = "float32",
  moments: bool = False,
  max_corrupt: int = 0,
  threads: int = 4,
) -> latents.LatentStore:
  """Writes the latent store of a source, or what is missing of it.

  The settings are the command's flags; `batch_size` is of each device, so that a latent comes out
  the same to the bit whatever their number. `places` as for `chosen_pictures`.

  Raises:
    InputError: nothing to encode, too many unreadable pictures, or `output` was begun with other
      settings.
  """
  check_outputs(output / name for name in _NOTES)
  data = tokenizer.config.data if source else restore.data_of(tokenizer)
  spec = source or data.source
  pictures = sources.open_source(spec)
  indices = chosen_pictures(tokenizer, spec, held_out=held_out, places=places)
  manifest = {
    "tokenizer": {
      "workdir": folder.address(tokenizer.workdir),
      "step": tokenizer.step,
      "sha256": tokenizer.sha256,
    },
    "source": spec,
    "listing": pictures.listing(),
    "held_out": held_out,
    "image_size": data.image_size,
    "class_names": list(pictures.class_names),
    "shard_size": shard_size,
    "seed": seed,
    "dtype": dtype,
    "moments": moments,
    "records": len(indices),
    **({"places": [places.start, places.stop]} if places else {}),
  }
  _claim(output, manifest)
  devices = mesh.local_mesh()
  batch_size *= devices.size
  encoded = Encoded(output, len(indices), shard_size, batch_size)

  def begin() -> int:
    size = encoded.room() * _bytes_of_one(tokenizer.config, dtype, moments)
    check_free(output, size, "for the latents and their parts; give another --output")
    encoded.begin()
    return encoded.lost()

  def finish() -> None:
    processes.check_seen(encoded.paths)
    _check_lost(encoded.lost(), max_corrupt, output)
    latents.finish_store(output, manifest, seed, encoded.paths)
    encoded.finish()

  lost = processes.first_does(begin)
  _check_lost(lost, max_corrupt, output)
  load = functools.partial(_load, pictures, data.image_size, batch_size, indices)
  pure = functools.partial(encoding.columns, seed=seed, dtype=dtype, moments=moments)
  run = _encoder(tokenizer, devices, pure)
  mine, done = encoded.mine(), 0
  with console.Bar("encode", sum(map(len, mine))) as bar:
    for batch, found in _one_late(_loaded(load, mine, threads), run):
      lost = _leave_out(batch.skipped.values(), lost, max_corrupt)
      columns = {k: x[: len(batch.part)] for k, x in jax.device_get(found).items()}
      names = {row: name for row, (name, _) in batch.skipped.items()}
      encoded.add(batch.part, columns, batch.label, names)
      bar.update(done := done + len(batch.part))
  encoded.join()
  processes.first_does(finish)
  processes.check_seen([output / latents.MANIFEST])
  return latents.LatentStore(output)


def _bytes_of_one(config: FrozenConfigDict, dtype: str, moments: bool) -> int:
  """What a shard stores of one picture."""
  columns = shards.POSTERIORS if moments else shards.SAMPLES
  return math.prod(latent_shape(config)) * len(columns) * jnp.dtype(dtype).itemsize


def chosen_pictures(
  tokenizer: restore.Trained,
  source: str = "",
  *,
  held_out: bool = False,
  places: range | None = None,
) -> np.ndarray:
  """Which pictures of a source, "": the tokenizer's own, are encoded: ascending indices.

  `places`: only those at these places of a shuffled order, always the same.
  """
  data = tokenizer.config.data if source else restore.data_of(tokenizer)
  spec = source or data.source
  pictures = sources.open_source(spec)
  if spec == data.source:
    changes.check(tokenizer.workdir, data)
    train, rest = selection.split(pictures, data)
    indices = rest if held_out else train
  elif held_out:
    raise InputError(f"--held_out is for {data.source}; training left out nothing of {spec}.")
  else:
    indices = np.arange(len(pictures))
  if places:
    indices = np.sort(np.random.default_rng(0).permutation(indices)[places.start : places.stop])
  if not len(indices):
    raise InputError(f"{spec} has no pictures to encode.")
  return indices


def _leave_out(skipped: Iterable[tuple[str, str]], lost: int, allowed: int) -> int:
  """Reports the unreadable pictures of a batch; returns how many this process knows by now."""
  for name, message in skipped:
    lost += 1
    console.say(f"left out ({lost} of at most {allowed}): {message}")
    _check_lost(lost, allowed, name)
  return lost


def _check_lost(lost: int, allowed: int, last: Any) -> None:
  if lost > allowed:
    raise InputError(
      f"{lost} pictures cannot be read, and --max_corrupt allows {allowed}; the last: {last}"
    )


def _claim(output: Path, manifest: dict[str, Any]) -> None:
  """Notes in the folder what is encoded, or finds that it is the same; by the first process."""
  path = output / BEGUN

  def claim() -> None:
    if path.is_file():
      _check_same(output, read_note(path, tokenizer=dict), manifest)
    elif any(output.glob("*.safetensors")):
      raise InputError(
        f"{output} holds latents that launch.encode did not write; give another one."
      )
    write_json(path, manifest)

  processes.first_does(claim)
  processes.check_seen([path])
  _check_same(output, read_note(path, tokenizer=dict), manifest)


def _check_same(output: Path, begun: dict[str, Any], manifest: dict[str, Any]) -> None:
  """A tokenizer is known by its hash, wherever its workdir has gone."""
  both = [{**m, "tokenizer": m.get("tokenizer", {}).get("sha256")} for m in (begun, manifest)]
  check_begun(output, *both)


def _loaded(
  load: Callable[[range], _Batch], parts: Sequence[range], threads: int
) -> Iterator[_Batch]:
  """The parts in their order, each loaded ahead by a thread."""
  import grain  # which takes half a second

  data = grain.MapDataset.range(len(parts)).map(lambda i: load(parts[int(i)]))
  yield from data.to_iter_dataset(grain.ReadOptions(threads, 2 * threads))


def _load(
  pictures: sources.Source, side: int, batch_size: int, indices: np.ndarray, part: range
) -> _Batch:
  image = np.zeros((batch_size, side, side, 3), np.uint8)
  index = np.zeros(batch_size, np.int32)
  label = np.zeros(len(part), np.int64)
  skipped: dict[int, tuple[str, str]] = {}
  for row, record in enumerate(indices[part.start : part.stop].tolist()):
    try:
      picture, label[row] = pictures.picture(record)
    except sources.Unreadable as error:
      skipped[row] = pictures.name(record), str(error)
      continue
    image[row], index[row] = images.center_crop(picture, side), record
  return _Batch(part, {"image": image, "index": index}, label, skipped)


def _one_late(
  batches: Iterator[_Batch], run: Callable[[_Batch], dict[str, jax.Array]]
) -> Iterator[tuple[_Batch, dict[str, jax.Array]]]:
  """Each batch when the next one is under way on the devices: a kill loses both.

  With one alone, the devices would wait while it is written.
  """
  waiting: list[tuple[_Batch, dict[str, jax.Array]]] = []
  for batch in batches:
    waiting.append((batch, run(batch)))
    if len(waiting) > 1:
      yield waiting.pop(0)
  yield from waiting


def _encoder(
  tokenizer: restore.Trained, devices: jax.sharding.Mesh, pure: Callable[..., Any]
) -> Callable[[_Batch], dict[str, jax.Array]]:
  """`encoding.columns` of a batch, all of one size, on these devices."""
  params = tokenizer.on(devices).params

  @jax.jit
  def run(params: Any, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return pure(restore.autoencoder(tokenizer.config, params), arrays)

  def on_devices(batch: _Batch) -> dict[str, jax.Array]:
    with jax.set_mesh(devices):
      return run(params, mesh.to_global(batch.arrays, devices))

  return on_devices


def main() -> None:
  if FLAGS.check:
    path = fetching.local_folder(FLAGS.check)
    check_latents.check(path)
    say_training(latents.LatentStore(path))
    return
  if not (FLAGS.workdir and FLAGS.output):
    raise InputError("Give --workdir and --output to encode, or --check to check; see --help.")
  names: tuple[str, ...] = ("source", "held_out", "batch_size", "shard_size", "seed", "dtype")
  names += ("moments", "max_corrupt", "threads")
  settings: dict[str, Any] = {name: FLAGS[name].value for name in names}
  tokenizer = restore.load(folder.find(FLAGS.workdir), "tokenizer", FLAGS.step)
  with owned(output := place(FLAGS.output)):
    store = encode(tokenizer, output, **settings)
  height, width, channels = store.shape
  drift = np.abs(store.mean - store.manifest["exact_mean"]) / store.std
  console.table(
    "Latent store",
    ("what", "value"),
    [
      ("records", str(len(store))),
      ("left out", str(len(store.manifest["skipped"]))),
      ("shape", f"{height} x {width}, {channels} channels, {FLAGS.dtype}"),
      ("holds", "posteriors" if store.has_posteriors else "one sample of each posterior"),
      ("mean std of a channel", f"{float(np.mean(store.std)):.3f}"),
      ("mean of 10,000 off that of all by", f"{drift.max():.4f} std at most"),
      ("folder", str(store.path)),
    ],
  )
  if FLAGS.held_out:
    words = (f"--latents={store.path}", f"--output={store.path}_figures")
    console.say_next("evaluate", "latents", *words)
  else:
    say_training(store)


def say_training(store: latents.LatentStore) -> None:
  """Prints the command that trains on latents, which have to be squares."""
  height, width, channels = store.shape
  if height == width and len(store):
    name = f"{store.path.name}_diffusion"
    keys = [f"model.input_size={height}", f"model.in_channels={channels}"]
    if len(store) < configs.base.diffusion().batch_size:
      keys.append(f"batch_size={1 << (len(store).bit_length() - 1)}")  # which devices divide
    recipe = "--config=configs/lightningdit.py:B/1"
    where = (f"--workdir={store.path.with_name(name)}", f"--config.latents.path={store.path}")
    console.say_next("train", recipe, *where, *(f"--config.{key}" for key in keys))


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", f"The tokenizer: {folder.TAKEN}")
  flags.DEFINE_string("output", "", "The latent store's folder.")
  flags.DEFINE_string("check", "", "Verify this store instead of making one.")
  flags.DEFINE_string("source", "", "Other pictures, such as folder:DIR.")
  flags.DEFINE_bool("held_out", False, "Encode the pictures that training left out.")
  flags.DEFINE_integer("step", None, "Step of the checkpoint; the newest if not given.")
  flags.DEFINE_integer("batch_size", 64, "Pictures at once on each device.", lower_bound=1)
  flags.DEFINE_integer("shard_size", 10_000, "Records a shard.", lower_bound=1)
  flags.DEFINE_integer(
    "seed", 0, "Seed of the posterior's noise.", lower_bound=0, upper_bound=LAST_SEED
  )
  flags.DEFINE_enum("dtype", "float32", DTYPES, "Of the latents; bfloat16 halves their size.")
  flags.DEFINE_bool("moments", False, "Store posteriors; each epoch of training draws from them.")
  flags.DEFINE_integer(
    "max_corrupt", 0, "How many unreadable pictures to leave out.", lower_bound=0
  )
  flags.DEFINE_integer("threads", 4, "Threads that decode pictures.", 1, 1024)
  console.run_command(main, several=True)
