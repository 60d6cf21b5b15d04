"""Names in all scripts are drawn by a font that has them, or as a number: never as boxes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from launch.evaluation import sample_files
from launch.report import fonts, plots

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
NAMES = [
  "cat",
  "Ελλάδα",
  "дом",
  "مرحبا",
  "שלום",
  "狗",
  "ネコ",
  "강아지",
  "हिन्दी",
  "แมว",
  "🐱",
  "☀️",
  "a\nb\t$x_",
]
NOWHERE = "\U0010fffd"  # of no script


def ink(letter: str, path: Path) -> bytes:
  canvas = Image.new("L", (40, 40))
  ImageDraw.Draw(canvas).text((10, 10), letter, 255, ImageFont.truetype(path, 12))
  return canvas.tobytes()


def sheet(*names: str) -> np.ndarray:
  pictures = np.zeros((len(names), 8, 64, 3), np.uint8)
  return sample_files.class_sheet(pictures, np.arange(len(names)), names)


@pytest.mark.parametrize("name", NAMES)
def test_no_letter_is_a_box(name):
  if path := fonts.font_of(name):
    box = ink(NOWHERE, path)
    assert all(ink(letter, path) != box for letter in fonts.visible(name) if letter.isalpha())
  assert sheet(name).shape == (8 + 14, 64, 3)


@pytest.fixture
def files(monkeypatch) -> Iterator[list[Path]]:
  """The font files of a system with few."""
  found = [FONTS / "cmr10.ttf", FONTS / "none.ttf", fonts.usual()]
  monkeypatch.setattr(fonts, "_files", lambda: found)
  for cached in (fonts.font_of, sample_files._written):
    cached.cache_clear()
  yield found
  for cached in (fonts.font_of, sample_files._written):
    cached.cache_clear()


def test_a_name_that_no_font_has_becomes_its_number_and_that_is_told_once(files, capsys):
  files[:] = [fonts.usual()]
  np.testing.assert_array_equal(sheet("cat", "狗"), sheet("cat", "1"))
  sheet("cat", "狗")
  assert capsys.readouterr().out.count("note: no font of this system has all letters of") == 1


def test_another_font_of_the_system_is_found(files):
  found = [fonts.font_of(name) for name in ("cat", "مرحبا", "狗")]
  assert found == [files[0], files[2], None]


@pytest.mark.filterwarnings("error:Glyph")
@pytest.mark.parametrize("name", NAMES)
def test_a_chart_names_tokenizers_in_all_scripts(name, tmp_path):
  figure, ((axis,),) = plots.panels(size=(7, 5))
  plots.frontier(axis, {name: (1.0, 2.0)})
  plots.save(figure, tmp_path / "frontier.png", dpi=20)


def test_pictures_of_a_class_without_letters_have_its_number(tmp_path):
  np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), arr_1=np.arange(2))
  sample_files.write_pngs(tmp_path / "a.npz", tmp_path / "png", ["狗", "🐱"], seed=3)
  names = sorted(path.name for path in (tmp_path / "png").iterdir())
  assert names == ["000000_狗_seed3.png", "000001_1_seed3.png"]
