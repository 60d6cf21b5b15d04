"""A font of this system that has the letters of a name, so that no name is drawn as boxes.

Matplotlib brings DejaVu Sans, which has no Chinese, no Japanese, no Hindi and few emoji; most
systems have fonts for the scripts that their people read.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

SIZE = 10  # pixels, of names above pictures; fonts that have only large letters fail at it
_INVISIBLE = ("Cc", "Cf", "Zs")  # Unicode's categories


def visible(text: str) -> str:
  """The text without what only chooses between forms of the letter before it, as in emoji."""
  return "".join(letter for letter in text if not "\ufe00" <= letter <= "\ufe0f")


@functools.cache
def font_of(text: str) -> Path | None:
  """A font file with all letters of a text, first of all DejaVu Sans; None if no font has them."""
  shown = (x for x in visible(text) if unicodedata.category(x) not in _INVISIBLE)
  needed = frozenset(map(ord, shown))
  return next((path for path in _files() if needed <= _letters(path)), None)


def usual() -> Path:
  """DejaVu Sans, which has all numbers."""
  import matplotlib  # which takes half a second

  return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _files() -> Iterator[Path]:
  """DejaVu Sans, then the system's fonts, plain ones first."""
  from matplotlib import font_manager

  yield usual()
  system = font_manager.fontManager.ttflist
  plain = sorted(system, key=lambda x: (x.style != "normal", abs(_weight(x.weight) - 400), x.fname))
  for path in dict.fromkeys(Path(entry.fname) for entry in plain):
    if "lastresort" not in path.name.lower():  # it has every letter, each a box
      yield path


def _weight(weight: str | int) -> int:
  from matplotlib.font_manager import weight_dict

  return weight_dict.get(weight, 400) if isinstance(weight, str) else weight


@functools.cache
def _letters(path: Path) -> frozenset[int]:
  """What a font can draw at `SIZE`; nothing if it cannot be read."""
  from matplotlib.ft2font import FT2Font

  try:
    ImageFont.truetype(path, SIZE)
    return frozenset(FT2Font(str(path)).get_charmap())
  except (OSError, RuntimeError):  # a bitmap font, or one that was removed since it was listed
    return frozenset()
