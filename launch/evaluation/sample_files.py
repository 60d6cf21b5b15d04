"""The files that samples are in: parts, the npz that ADM's evaluator reads, PNG folders, sheets.

Only a part of the samples is in memory at a time.
"""

from __future__ import annotations

import functools
import re
import struct
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from launch.engine import console
from launch.engine.parts import Parts, rows_of
from launch.report import fonts
from vavae_jax.common.errors import InputError, printable
from vavae_jax.common.files import atomic_file, read_note, sha256_of

SHEET_COLUMNS = 12
SHEET_PICTURES = 96
PICTURES_AT_ONCE = 256
_CAPTION = 14  # pixels above a picture
FIRST, SECOND = "arr_0.npy", "arr_1.npy"
# What reading a damaged npz raises.
DAMAGES = (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile)


def write_npz(output: Path, parts: Parts, labels: np.ndarray, names: Sequence[str] = ()) -> None:
  """Joins parts as `arr_0` of an npz, with labels int32 [N] as `arr_1`.

  A contact sheet goes beside it, as .png; `names` are of the classes, where they have any.
  """
  shown = np.concatenate(list(rows_of(parts, min(len(labels), SHEET_PICTURES))))
  with atomic_file(output.with_suffix(".png")) as file:
    Image.fromarray(class_sheet(shown, labels[: len(shown)], names)).save(file, "PNG")
  header = {
    "descr": np.lib.format.dtype_to_descr(shown.dtype),
    "fortran_order": False,
    "shape": (len(labels), *shown.shape[1:]),
  }
  # Last: the npz exists only if everything does.
  with atomic_file(output) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
    with archive.open(FIRST, "w", force_zip64=True) as array:
      np.lib.format.write_array_header_1_0(array, header)
      for part in rows_of(parts, len(labels)):
        array.write(part.tobytes())
    with archive.open(SECOND, "w", force_zip64=True) as array:
      np.lib.format.write_array(array, labels)


class Npz:
  """The `arr_0` of an npz, as `launch.sample` and ADM write it: a `pictures.PictureSet`."""

  def __init__(self, path: Path):
    """Raises InputError if the file is damaged, or has no uint8 [N,H,W,3]."""
    self._path = path
    try:
      # Stays open: seeking back in a compressed file starts anew.
      self._file = path.open("rb")
      archive = zipfile.ZipFile(self._file)
      self._array = archive.open(FIRST)
      major, _ = np.lib.format.read_magic(self._array)
      read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
      self._shape, fortran, dtype = read[major](self._array)
      self._begin = self._array.tell()
      if (entry := archive.getinfo(FIRST)).compress_type == zipfile.ZIP_STORED:
        # Read directly: a member of an archive is read through to where one seeks.
        self._file.seek(entry.header_offset + 26)
        self._begin += entry.header_offset + 30 + sum(struct.unpack("<HH", self._file.read(4)))
        self._array = self._file
    except DAMAGES as error:
      raise InputError(
        f"{path} is not a file of pictures ({error}); give an npz with uint8 [N,H,W,3] as arr_0, "
        "such as python -m launch.sample writes."
      ) from error
    if dtype != np.uint8 or len(self._shape) != 4 or self._shape[-1] != 3 or fortran:
      raise InputError(
        f"{path} holds {dtype} {self._shape}; needed is uint8 [N,H,W,3]. Floats in [0,1] or [-1,1] "
        "must be brought to 8 bits first, by your own rounding; NaN is no picture."
      )
    _, height, width, _ = self._shape
    self.size = height if height == width else 0

  @functools.cached_property
  def about(self) -> dict[str, Any]:
    return {"kind": "npz", "sha256": sha256_of(self._path), "pictures": len(self)}

  @functools.cached_property
  def classes(self) -> tuple[np.ndarray, list[str]]:
    """(label of each, names of the classes), both empty where nobody wrote them down."""
    with self._path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
      labels = stored.get("arr_1", np.zeros(0, np.int32))
    try:
      names = read_note(self._path.with_suffix(".json"), class_names=list)["class_names"]
    except (OSError, InputError):  # launch.sample wrote none
      names = []
    return labels, names

  def __len__(self) -> int:
    return self._shape[0]

  def read(self, start: int, stop: int) -> np.ndarray:
    shape = (stop - start, *self._shape[1:])
    size = int(np.prod(self._shape[1:]))
    try:
      self._array.seek(self._begin + start * size)
      return np.frombuffer(self._array.read((stop - start) * size), np.uint8).reshape(shape)
    except DAMAGES as error:
      raise InputError(f"{self._path} is damaged ({error}); write it again.") from error


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """The pictures of an npz, uint8 [N,H,W,3], and labels, if there are any; errors: see `Npz`."""
  pictures = Npz(path)
  return pictures.read(0, len(pictures)), pictures.classes[0]


def write_pngs(output: Path, folder: Path, names: Sequence[str], seed: int) -> None:
  """Writes the pictures of an npz as FOLDER/000000_CLASS_seed0.png, ..., where they are missing."""
  folder.mkdir(parents=True, exist_ok=True)
  pictures = Npz(output)
  labels = pictures.classes[0]

  def write(index: int, picture: np.ndarray) -> None:
    name = re.sub(r"[^\w-]+", "-", class_name(labels[index], names))[:60].strip("-")
    path = folder / f"{index:06d}_{name or labels[index]}_seed{seed}.png"
    if not path.is_file():
      with atomic_file(path) as file:
        Image.fromarray(picture).save(file, "PNG")

  with ThreadPoolExecutor() as threads, console.Bar("png", len(pictures)) as bar:
    for start in range(0, len(pictures), PICTURES_AT_ONCE):
      stop = min(start + PICTURES_AT_ONCE, len(pictures))
      list(threads.map(write, range(start, stop), pictures.read(start, stop)))
      bar.update(stop)


def class_name(label: int, names: Sequence[str]) -> str:
  """What a class is called; its number where nobody named it."""
  return names[label] if label < len(names) else str(label)


@functools.cache
def _written(label: int, name: str) -> tuple[str, Any]:
  """A class's name and a font that has its letters, else its number, which each font has."""
  name = printable(name)
  if path := fonts.font_of(name):
    return fonts.visible(name), ImageFont.truetype(path, fonts.SIZE)
  console.say(
    f"note: no font of this system has all letters of {name}; sheets show the class's "
    f"number, {label}; pages and samples.json its name"
  )
  return str(label), ImageFont.truetype(fonts.usual(), fonts.SIZE)


def class_sheet(
  pictures_NHWC: np.ndarray, labels: np.ndarray, names: Sequence[str] = ()
) -> np.ndarray:
  """Samples, uint8, sorted by class as one picture [H, W, 3], the class written above its first.

  A class has a row of its own where all have equally many samples, up to twelve.
  """
  counts = np.unique(labels, return_counts=True)[1]
  own_rows = len({*counts.tolist()}) == 1 and 1 < counts[0] <= SHEET_COLUMNS
  columns = int(counts[0]) if own_rows else min(SHEET_COLUMNS, len(labels))
  order = np.argsort(labels, kind="stable")
  above = ((0, 0), (_CAPTION, 0), (0, 0), (0, 0))
  captioned = np.pad(pictures_NHWC[order], above, constant_values=255)
  canvas = Image.fromarray(contact_sheet(captioned, columns))
  height, width = captioned.shape[1:3]
  draw = ImageDraw.Draw(canvas)
  right = canvas.width
  for place in reversed(range(len(labels))):
    row, column = divmod(place, columns)
    if column == columns - 1:
      right = canvas.width  # of what the text may take
    if column and labels[order[place]] == labels[order[place - 1]]:
      continue
    label = int(labels[order[place]])
    text, font = _written(label, class_name(label, names))
    while text and draw.textlength(text, font) > right - column * width - 2:
      text = text[:-1]
    draw.text((column * width + 1, row * height), text, "black", font)
    right = column * width
  return np.asarray(canvas)


def contact_sheet(pictures_NHWC: np.ndarray, columns: int = SHEET_COLUMNS) -> np.ndarray:
  """Pictures, uint8, in rows as one [rows H, columns W, 3], the last row filled up with white."""
  count, height, width, channels = pictures_NHWC.shape
  rows = -(-count // columns)
  filled = np.full((rows * columns, height, width, channels), 255, np.uint8)
  filled[:count] = pictures_NHWC
  grid = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * height, columns * width, channels)
