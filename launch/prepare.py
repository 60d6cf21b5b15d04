r"""Prepares pictures as ArrayRecord files, the fastest to read at random from any disk or bucket.

  python -m launch.prepare --source=tar:ILSVRC2012_img_train.tar --output=data/imagenet/train
  python -m launch.train --config.data.source=arrayrecord:data/imagenet/train ...

--source is any that a training takes: folder:DIR, zip:FILE, tar:FILES, tfds:NAME/SPLIT, hf:PATH.
The pictures' files are copied byte for byte; each is decoded once, so that an unreadable one is
named now and not in the middle of a training. A run that was stopped goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from absl import flags

from launch.engine import console
from launch.engine.configuration import claim_folder
from launch.engine.ownership import owned
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import check_free, local_place, read_note, remove_partial, write_json
from vavae_jax.data import sources
from vavae_jax.data.sources.base import decode
from vavae_jax.data.sources.records import DESCRIPTION, Records, check_path, write_records

BEGUN = "preparing.json"


def prepare(
  source: str, output: Path, *, shard_size: int = 2_000, max_corrupt: int = 0, threads: int = 4
) -> Records:
  """Writes the ArrayRecord files of a source, or what is missing of them, and opens them.

  The settings are the command's flags.

  Raises:
    InputError: too many unreadable pictures, or the folder was begun with another source.
  """
  check_path(output)
  pictures = sources.open_source(source)
  keys = pictures.keys()
  begun = {"source": source, "identity": pictures.identity(), "shard_size": shard_size}
  claim_folder(output, BEGUN, begun)
  remove_partial(output)  # left by a run that was killed
  done = sum(file.lstat().st_size for file in output.iterdir())
  check_free(output, int(pictures.sizes().sum()) - done, "for the pictures; give another --output")
  count = -(-len(pictures) // shard_size)
  counts: dict[str, int] = {}
  known: dict[str, dict[str, Any]] = {"names": {}, "sha256": {}}
  skipped: list[str] = []
  with console.Bar("prepare", len(pictures)) as bar:
    for number in range(count):
      name = f"pictures-{number:05d}-of-{count:05d}.array_record"
      noted = output / f"{name}.json"
      chosen = range(number * shard_size, min((number + 1) * shard_size, len(pictures)))
      if not noted.is_file():
        left_out: dict[int, str] = {}
        found = _read(pictures, chosen, threads, left_out, max_corrupt - len(skipped), bar)
        sha256 = write_records(output / name, found)
        kept = [keys[index] for index in chosen if index not in left_out]
        about = {"records": len(kept), "skipped": list(left_out.values()), "sha256": sha256}
        write_json(noted, about | ({"names": kept} if pictures.has_names else {}))
      advice = "delete it, and its pictures are read again"
      note = read_note(noted, advice=advice, records=int, skipped=list)
      counts[name] = note["records"]
      skipped += note["skipped"]
      for what in known.keys() & note.keys():
        known[what][name] = note[what]
      bar.update(chosen.stop)
  description = {
    "class_names": list(pictures.class_names),
    "shards": counts,
    "skipped": skipped,
    "source": source,
  }
  # Earlier versions noted neither.
  description |= {what: each for what, each in known.items() if len(each) == count}
  write_json(output / DESCRIPTION, description)
  return Records(str(output))


def _read(
  pictures: sources.Source,
  chosen: range,
  threads: int,
  left_out: dict[int, str],
  allowed: int,
  bar: console.Bar,
) -> Iterator[tuple[bytes, int]]:
  """Files and labels of the readable pictures; `left_out` gets messages about the others."""

  def one(index: int) -> tuple[bytes, int] | str:
    try:
      data, label = pictures.encoded(index)
      decode(data, pictures.name(index))
    except sources.Unreadable as error:
      return str(error)
    return data, label

  with ThreadPoolExecutor(threads) as pool:
    # In portions, since all files of a shard would fill the memory.
    for begin in range(chosen.start, chosen.stop, 16 * threads):
      portion = range(begin, min(begin + 16 * threads, chosen.stop))
      for index, found in zip(portion, pool.map(one, portion), strict=True):
        if not isinstance(found, str):
          yield found
          continue
        left_out[index] = found
        console.say(f"left out: {found}")
        if len(left_out) > allowed:
          raise InputError(f"More pictures than --max_corrupt allows cannot be read; last: {found}")
      bar.update(portion.stop)


def main() -> None:
  folder = local_place(FLAGS.output)
  with owned(folder):
    found = prepare(
      FLAGS.source,
      folder,
      shard_size=FLAGS.shard_size,
      max_corrupt=FLAGS.max_corrupt,
      threads=FLAGS.threads,
    )
  size = sum(file.stat().st_size for file in folder.glob("*.array_record"))
  left_out = len(read_note(folder / DESCRIPTION, skipped=list)["skipped"])
  rows = [
    ("pictures", f"{len(found):,}"),
    ("left out", str(left_out)),
    ("classes", f"{len(found.class_names)}: {', '.join(found.class_names[:5])}, ..."),
    ("size", f"{size / 2**30:.2f} GiB"),
    ("source for a configuration", f"arrayrecord:{FLAGS.output}"),
  ]
  console.table("Prepared", ("what", "value"), rows)
  where = f"--workdir={folder.with_name(f'{folder.name}_tokenizer')}"
  source = f"--config.data.source=arrayrecord:{FLAGS.output}"
  words = (where, source, "--config.teacher.weights=FILE")
  console.say_next("train", "--config=configs/vavae_f16d32.py", *words)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("source", None, "The pictures, such as zip:FILE.", required=True)
  flags.DEFINE_string("output", None, "The folder to write.", required=True)
  flags.DEFINE_integer("shard_size", 2_000, "Pictures a file.", lower_bound=1)
  flags.DEFINE_integer(
    "max_corrupt", 0, "How many unreadable pictures to leave out.", lower_bound=0
  )
  flags.DEFINE_integer("threads", 4, "Threads that read and decode.", 1, 1024)
  console.run_command(main)
