"""The files that samples are in: parts, the npz that ADM's evaluator reads, PNG folders, sheets.

Only a part of the samples is in memory at a time.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from launch.engine import console
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, write_json

SHEET_COLUMNS = 12
SHEET_PICTURES = 96
PICTURES_AT_ONCE = 256
PNG_SETTINGS = "settings.json"
FIRST, SECOND = "arr_0.npy", "arr_1.npy"


def part_path(folder: Path, start: int, count: int) -> Path:
  """The file of the samples from `start` on."""
  return folder / f"{start:09d}_{count}.npy"


def _parts(folder: Path, num_samples: int) -> Iterator[np.ndarray]:
  """All samples in order. Parts may come from runs with other batch sizes and overlap."""
  done = 0
  for path in sorted(folder.glob("*.npy")):
    start, count = (int(x) for x in path.stem.split("_"))
    if start + count > done:
      yield np.load(path, allow_pickle=False)[done - start : num_samples - start]
      done = start + count


def write_npz(output: Path, parts: Path, labels: np.ndarray) -> None:
  """Joins the parts of a folder as `arr_0` of an npz, with labels int32 [N] as `arr_1`.

  A contact sheet goes beside it, as .png.
  """
  first = next(_parts(parts, len(labels)))
  _write_sheet(output.with_suffix(".png"), parts, len(labels))
  header = {
    "descr": np.lib.format.dtype_to_descr(first.dtype),
    "fortran_order": False,
    "shape": (len(labels), *first.shape[1:]),
  }
  # Last: the npz exists only if everything does.
  with atomic_file(output) as file, zipfile.ZipFile(file, "w", allowZip64=True) as archive:
    with archive.open(FIRST, "w", force_zip64=True) as array:
      np.lib.format.write_array_header_1_0(array, header)
      for part in _parts(parts, len(labels)):
        array.write(part.tobytes())
    with archive.open(SECOND, "w", force_zip64=True) as array:
      np.lib.format.write_array(array, labels)


def _write_sheet(path: Path, parts: Path, num_samples: int) -> None:
  shown: list[np.ndarray] = []
  for part in _parts(parts, min(num_samples, SHEET_PICTURES)):
    shown.append(part)
    if sum(map(len, shown)) >= min(num_samples, SHEET_PICTURES):
      break
  with atomic_file(path) as file:
    Image.fromarray(contact_sheet(np.concatenate(shown))).save(file, "PNG")


def read_samples(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """The pictures of a file of samples, uint8 [N, H, W, 3], and labels, if there are any.

  Raises:
    InputError: it is none.
  """
  try:
    with np.load(path, allow_pickle=False) as stored:
      samples, labels = stored["arr_0"], stored.get("arr_1", np.zeros(0, np.int32))
  except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
    raise InputError(
      f"{path} is not a file of samples ({error}); give the npz of python -m launch.sample."
    ) from error
  if samples.dtype != np.uint8 or samples.ndim != 4 or samples.shape[-1] != 3:
    raise InputError(f"{path} holds {samples.dtype} {samples.shape}; needed is uint8 [N, H, W, 3].")
  return samples, labels


def claim_png_folder(folder: Path, noted: dict[str, Any]) -> None:
  """Makes a folder for PNG files and writes there what the samples depend on.

  Raises:
    InputError: the folder holds files of something else.
  """
  about = folder / PNG_SETTINGS
  if about.is_file():
    if json.loads(about.read_text()) != noted:
      raise InputError(
        f"{folder} holds pictures of other settings ({about}); give a new --output, or remove it."
      )
  elif folder.is_dir() and any(folder.iterdir()):
    raise InputError(f"{folder} holds other files; give a new --output, or empty it.")
  else:
    write_json(about, noted)


def write_pngs(output: Path, folder: Path) -> None:
  """Writes the pictures of an npz as FOLDER/000000.png, ..., where they are missing."""
  folder.mkdir(parents=True, exist_ok=True)

  def write(index: int, picture: np.ndarray) -> None:
    path = folder / f"{index:06d}.png"
    if not path.is_file():
      with atomic_file(path) as file:
        Image.fromarray(picture).save(file, "PNG")

  with zipfile.ZipFile(output) as archive, archive.open(FIRST) as array:
    np.lib.format.read_magic(array)
    (total, *shape), _, dtype = np.lib.format.read_array_header_1_0(array)
    size = int(np.prod(shape)) * dtype.itemsize
    with ThreadPoolExecutor() as threads, console.Bar("png", total) as bar:
      for start in range(0, total, PICTURES_AT_ONCE):
        count = min(PICTURES_AT_ONCE, total - start)
        pictures = np.frombuffer(array.read(count * size), dtype).reshape(count, *shape)
        list(threads.map(write, range(start, start + count), pictures))
        bar.update(start + count)


def contact_sheet(pictures_NHWC: np.ndarray, columns: int = SHEET_COLUMNS) -> np.ndarray:
  """Pictures, uint8, in rows as one [rows H, columns W, 3], the last row filled up with white."""
  count, height, width, channels = pictures_NHWC.shape
  rows = -(-count // columns)
  filled = np.full((rows * columns, height, width, channels), 255, np.uint8)
  filled[:count] = pictures_NHWC
  grid = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * height, columns * width, channels)
