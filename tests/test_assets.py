"""The embedded images match their description, and the script rebuilds such files."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from vavae_jax import assets
from vavae_jax.assets import build
from vavae_jax.common.errors import InputError


@pytest.fixture(scope="module")
def emoji():
  return assets.load_emoji()


def test_shapes_types_and_ranges(emoji):
  images, labels, names, class_names = emoji
  assert images.shape == (1852, 64, 64, 3)
  assert images.dtype == np.uint8
  assert labels.dtype == np.int32
  assert len(names) == len(labels) == 1852
  assert np.unique(labels).tolist() == list(range(9))
  assert len(class_names) == 9


def test_pictures_are_under_their_names(emoji):
  images, labels, names, class_names = emoji

  def mean_colour(name):
    return images[names.index(name)].reshape(-1, 3).mean(0)

  assert names[0] == "grinning face"
  assert class_names[labels[names.index("red apple")]] == "Food & Drink"
  assert class_names[labels[-1]] == "Flags"
  assert mean_colour("red apple").argmax() == 0
  assert mean_colour("green heart").argmax() == 1
  assert mean_colour("blue heart").argmax() == 2


def test_background_is_white(emoji):
  images, *_ = emoji
  corners = images[:, [0, 0, -1, -1], [0, -1, 0, -1]]
  assert np.mean((corners == 255).all(-1)) > 0.9


def test_picture_and_description_must_fit(tmp_path, monkeypatch):
  Image.new("RGB", (128, 64)).save(tmp_path / "emoji.webp", lossless=True)
  description = {"tile": 64, "columns": 3, "class_names": ["a"], "tiles": [["1", "one", 0]]}
  (tmp_path / "emoji.json").write_text(json.dumps(description))
  monkeypatch.setattr(assets.resources, "files", lambda package: tmp_path)
  with pytest.raises(ValueError, match=r"128 x 64 pixels, emoji\.json describes 192 x 64"):
    assets.load_emoji()


def picture(colour, alpha) -> bytes:
  file = io.BytesIO()
  Image.new("RGBA", (256, 256), (*colour, alpha)).save(file, "PNG")
  return file.getvalue()


ENTRIES = [
  {"name": "SECOND", "unified": "00A9-FE0F", "category": "Late", "sort_order": 7},
  {"name": "FIRST", "unified": "1F600", "category": "Early", "sort_order": 3},
  {"name": "NO PICTURE", "unified": "1F601", "category": "None", "sort_order": 1},
]
PICTURES = {
  "1f600.webp": picture((255, 0, 0), 255),
  "a9-fe0f.webp": picture((0, 0, 255), 0),
  "1f600-1f3fb.webp": picture((0, 255, 0), 255),
}


def pack(path, files) -> None:
  """An archive as `npm pack` writes it, with two members that must not be followed."""
  with tarfile.open(path, "w:gz") as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(f"package/{name}")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
    link = tarfile.TarInfo("package/assets/1f601.webp")
    link.type, link.linkname = tarfile.SYMTYPE, str(path)
    archive.addfile(tarfile.TarInfo("package/assets/../1f601.webp"), io.BytesIO())
    archive.addfile(link)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
  fluent, datasource = (tmp_path_factory.mktemp("npm") / f"{i}.tgz" for i in range(2))
  pack(fluent, {f"assets/{name}": content for name, content in PICTURES.items()})
  pack(datasource, {"emoji.json": json.dumps(ENTRIES).encode()})
  return fluent, datasource


def test_build_joins_by_code_in_standard_order(packages):
  atlas, description = build.build(*packages)
  assert description["tiles"] == [["1f600", "first", 0], ["a9", "second", 1]]
  assert description["class_names"] == ["Early", "Late"]
  assert atlas.getpixel((32, 32)) == (255, 0, 0)
  # Blue, but wholly transparent: nothing of it may show on the white.
  assert atlas.getpixel((64 + 32, 32)) == (255, 255, 255)


def test_what_is_written_is_what_is_loaded(packages, tmp_path, monkeypatch):
  build.write(*build.build(*packages), tmp_path)
  monkeypatch.setattr(assets.resources, "files", lambda package: tmp_path)
  images, labels, names, class_names = assets.load_emoji()
  assert images[0, 32, 32].tolist() == [255, 0, 0]
  assert (labels.tolist(), names, class_names) == ([0, 1], ["first", "second"], ["Early", "Late"])


def test_swapped_packages_are_named(packages):
  with pytest.raises(InputError, match=r"1\.tgz has no files in 'package/assets'"):
    build.build(*packages[::-1])
