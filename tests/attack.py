"""Files of users, damaged at random: each is read, or refused in one line.

  python -m tests.attack --count=10000 --output=attack.json

Of each kind `--count` files are made from sound ones, by flipping, cutting, doubling and replacing
a few bytes, and read as a command would. docs/reliability.md has the table.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from launch.engine import console
from launch.engine.checkpoint import read_config
from launch.engine.circumstances import circumstances
from launch.prepare import prepare
from lightningdit_jax.store.latents import LatentStore
from tests import cases
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json
from vavae_jax.data import sources
from vavae_jax.weights.state_dicts import read_content

FORMATS = cases.FOLDER / "formats"
SECONDS = 10.0  # that reading may take
# Bytes that mean something to pickles, archives, pictures and headers of arrays.
WORDS = (
  *(b"\xff\xff\xff\xff", b"\x00\x00\x00\x80", b"../", b"R", b"c", b"l\xff\xff\xff\x7f", b"PK"),
  *(b"\xff\xe1", b"Exif\0\0", b"IDAT", b"zTXt", b"iCCP", b"ustar", b'"', b"{", b"\x80"),
)


def mutated(content: bytes, draw: np.random.Generator) -> bytes:
  """A few bytes flipped, cut off, taken out, doubled, or replaced by words."""
  data = bytearray(content)
  for _ in range(draw.integers(1, 4)):
    place, kind = int(draw.integers(len(data))), draw.integers(5)
    if kind == 0:
      data[place] ^= 1 << int(draw.integers(8))
    elif kind == 1:
      del data[place:]
    elif kind == 2:
      del data[place : place + int(draw.integers(1, 64))]
    elif kind == 3:
      data[place:place] = data[place : place + int(draw.integers(1, 64))]
    else:
      word = WORDS[draw.integers(len(WORDS))]
      data[place : place + len(word)] = word
    if not data:
      break
  return bytes(data)


def pictures() -> list[tuple[str, bytes]]:
  """(name, content) of pictures with metadata, in the formats that people have."""
  draw = np.random.default_rng(0)
  small = Image.fromarray(draw.integers(256, size=(12, 16, 3), dtype=np.uint8))
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = 6, "a description"
  text = PngInfo()
  text.add_text("comment", "words" * 50, zip=True)
  deep = Image.fromarray(draw.integers(4096, size=(12, 16)).astype(np.uint16))
  options: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "a.jpg": (small, {"exif": exif, "quality": 80}),
    "b.png": (small, {"pnginfo": text, "icc_profile": b"x" * 200}),
    "c.webp": (small, {"exif": exif}),
    "d.gif": (small.convert("P"), {}),
    "e.tiff": (deep, {}),
    "f.bmp": (small, {}),
    "g.png": (deep, {}),
  }
  found = []
  for name, (picture, more) in options.items():
    buffer = io.BytesIO()
    picture.save(buffer, Image.registered_extensions()[Path(name).suffix], **more)
    found.append((name, buffer.getvalue()))
  return found


def archives() -> list[tuple[str, bytes]]:
  """A zip, a tar, and a tar in a tar, of those pictures in class folders."""
  zipped, tarred, nested = io.BytesIO(), io.BytesIO(), io.BytesIO()
  with zipfile.ZipFile(zipped, "w") as archive:
    for name, content in pictures():
      archive.writestr(f"cat/{name}", content)
  for buffer, entries in ((tarred, pictures()), (nested, None)):
    with tarfile.open(fileobj=buffer, mode="w") as archive:
      for name, content in entries or [("inner.tar", tarred.getvalue())]:
        info = tarfile.TarInfo(f"dog/{name}")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
  return [("a.zip", zipped.getvalue()), ("b.tar", tarred.getvalue()), ("c.tar", nested.getvalue())]


def weights(folder: Path) -> list[tuple[str, bytes]]:
  """One file of each format."""
  statistics = read_content(FORMATS / "latents" / "latents_stats.pt")
  save_file({name: np.array(x) for name, x in statistics.items()}, folder / "x.safetensors")
  np.savez(folder / "x.npz", **statistics)
  paths = [FORMATS / "torch_zip.pt", FORMATS / "torch_legacy.pt", *sorted(folder.iterdir())]
  return [(path.name, path.read_bytes()) for path in paths]


def read_pictures(spec: str) -> None:
  """All of a source."""
  source = sources.open_source(spec)
  for index in range(min(len(source), 50)):
    source.picture(index)


Kind = tuple[list[tuple[str, bytes]], Callable[[Path], Any]]


def kinds(folder: Path) -> Iterator[tuple[str, Kind]]:
  """Name -> (sound files, how one of them is read)."""
  made = folder / "weights"
  made.mkdir()
  yield "weights", (weights(made), read_content)
  yield "pictures", (pictures(), lambda path: read_pictures(f"folder:{path.parent}"))
  yield "archives", (archives(), lambda path: read_pictures(f"{path.suffix[1:]}:{path}"))
  write_json(folder / "config.json", {"task": "x", "seed": 0, "model": {}, "optimizer": {}})
  note = [("config.json", (folder / "config.json").read_bytes())]
  yield "notes", (note, lambda path: read_config(path.parent))
  shard, statistics = (
    next(path for path in sorted((FORMATS / "latents").iterdir()) if path.suffix == suffix)
    for suffix in (".safetensors", ".pt")
  )

  def read_store(path: Path) -> None:
    shutil.copy(statistics, path.parent)
    LatentStore(path.parent)[0]

  yield "latents", ([(shard.name, shard.read_bytes())], read_store)
  (folder / "pictures").mkdir()
  for name, content in pictures():
    (folder / "pictures" / name).write_bytes(content)
  records = folder / "records"
  prepare(f"folder:{folder / 'pictures'}", records, shard_size=10, max_corrupt=0, threads=1)
  whole = [(path.name, path.read_bytes()) for path in sorted(records.iterdir())]

  def read_records(path: Path) -> None:
    for name, content in whole:
      if name != path.name:
        (path.parent / name).write_bytes(content)
    read_pictures(f"arrayrecord:{path.parent}")

  yield "records", (whole, read_records)


def attack(name: str, kind: Kind, count: int, seed: int = 0) -> dict[str, Any]:
  """How many files were read and refused, and what else happened, with the first traceback."""
  sound, read = kind
  draw = np.random.default_rng(seed)
  seen: Counter[str] = Counter()
  first, slowest = "", 0.0
  for i in range(count):
    file, content = sound[i % len(sound)]
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / file
      path.write_bytes(mutated(content, draw))
      began = time.monotonic()
      try:
        read(path)
        seen["read"] += 1
      except InputError:
        seen["refused"] += 1
      except Exception as error:
        seen[type(error).__name__] += 1
        first = first or traceback.format_exc()
      slowest = max(slowest, time.monotonic() - began)
  held = set(seen) <= {"read", "refused"} and slowest < SECONDS
  return {"kind": name, "count": count, "held": held, "slowest": slowest, **seen, "first": first}


def main() -> None:
  """The command."""
  found = []
  with tempfile.TemporaryDirectory() as folder:
    for name, kind in kinds(Path(folder)):
      found.append(attack(name, kind, FLAGS.count, FLAGS.seed))
      console.say(json.dumps(found[-1], indent=1))
  rows = [[str(x.get(k, 0)) for k in ("kind", "count", "read", "refused", "held")] for x in found]
  console.table("Attacks", ("kind", "files", "read", "refused", "held"), rows)
  if FLAGS.output:
    write_json(Path(FLAGS.output), {"kinds": found, "run": circumstances()})


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_integer("count", 10_000, "Files of each kind.", lower_bound=1)
  flags.DEFINE_integer("seed", 0, "Of the damages.", lower_bound=0)
  flags.DEFINE_string("output", "", "A JSON file for the results.")
  console.run_command(main)
