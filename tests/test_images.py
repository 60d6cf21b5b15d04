"""Image sources, crops, splits and the pipeline of batches."""

from __future__ import annotations

import json

import numpy as np
import PIL
import pytest
from PIL import Image

from tests import cases
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.data import images, sources
from vavae_jax.data.order import Share


@pytest.fixture
def folder(tmp_path):
  """Two classes, one nested, of pictures in every mode that people have."""
  rng = np.random.default_rng(0)
  rgb = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
  for name, mode in (("b/1.png", "RGB"), ("b/2.png", "P"), ("a/x/3.png", "L"), ("a/4.jpg", "CMYK")):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rgb.convert(mode).save(path)
  (tmp_path / "a" / "notes.txt").write_text("no picture")
  return tmp_path


@pytest.mark.parametrize("key", ["200x150", "90x300", "64x64", "130x131", "40x50"])
def test_center_crop_is_the_reference_s_bit_for_bit(key):
  width, height = map(int, key.split("x"))
  coarse = procedural.uniform(f"photo_{key}", (height // 10 + 1, width // 10 + 1, 3))
  photo = np.repeat(np.repeat((255 * coarse).astype(np.uint8), 10, 0), 10, 1)[:height, :width]
  # Pillow 13 takes the passes of tall pictures in another order, and rounds between them.
  earlier = key == "90x300" and int(PIL.__version__.partition(".")[0]) < 13
  name = "center_crop_before_pillow13.npz" if earlier else "center_crop.npz"
  with np.load(cases.FOLDER / name) as arrays:
    np.testing.assert_array_equal(
      images.center_crop(Image.fromarray(photo), 64), arrays[f"crop64_{key}"]
    )


def test_folder_lists_classes_and_files_in_order(folder):
  source = sources.open_source(f"folder:{folder}")
  assert source.class_names == ["a", "b"]
  assert [source[i]["label"] for i in range(len(source))] == [0, 0, 1, 1]
  assert all(source[i]["image"].shape == (9, 12, 3) for i in range(len(source)))


def test_transparency_is_white(tmp_path):
  (tmp_path / "a").mkdir()
  Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a" / "1.png")
  assert sources.open_source(f"folder:{tmp_path}")[0]["image"].min() == 255


def test_pictures_stand_upright(tmp_path):
  (tmp_path / "a").mkdir()
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  Image.new("RGB", (8, 4)).save(tmp_path / "a" / "1.jpg", exif=exif)
  assert sources.open_source(f"folder:{tmp_path}")[0]["image"].shape == (8, 4, 3)


def test_an_unreadable_picture_is_named(folder):
  path = folder / "a" / "4.jpg"
  path.write_bytes(path.read_bytes()[:60])
  with pytest.raises(InputError, match=r"4\.jpg"):
    sources.open_source(f"folder:{folder}")[0]


def test_all_pictures_or_some_of_them_are_tried(folder):
  (folder / "a" / "4.jpg").write_bytes(b"no picture")
  source = sources.open_source(f"folder:{folder}")
  with pytest.raises(InputError, match=r"4\.jpg"):
    sources.check_readable(source)
  sources.check_readable(source, limit=0)


@pytest.mark.parametrize("spec", ["folder:/nowhere/at/all", "folder:", "photos", "embedded:cats"])
def test_a_source_that_is_not_there_is_named(spec):
  with pytest.raises(InputError, match=spec.removeprefix("folder:") or "folder"):
    sources.open_source(spec)


def test_an_empty_folder_is_refused(tmp_path):
  with pytest.raises(InputError, match="no pictures"):
    sources.open_source(f"folder:{tmp_path}")


def batches(folder, seed):
  source = sources.open_source(f"folder:{folder}")
  data = images.training_batches(source, np.arange(4), Share(3), size=8, seed=seed)
  return iter(data)


def test_batches_are_a_function_of_the_seed(folder):
  same, again, other = (np.stack([next(it)["image"] for _ in range(4)]) for it in
                        (batches(folder, 0), batches(folder, 0), batches(folder, 1)))  # fmt: skip
  np.testing.assert_array_equal(same, again)
  assert same.shape == (4, 3, 8, 8, 3)
  assert not np.array_equal(same, other)


def test_batches_continue_from_their_state(folder):
  iterator = batches(folder, 0)
  next(iterator)
  state = json.loads(json.dumps(iterator.get_state()))
  expected = next(iterator)["image"]
  fresh = batches(folder, 0)
  fresh.set_state(state)
  np.testing.assert_array_equal(next(fresh)["image"], expected)


def test_crops_without_chance_are_made_once(folder, monkeypatch):
  """Batches are the same whether the crops stay in memory or not."""

  def drawn(kept):
    monkeypatch.setattr(images, "KEPT", kept)
    source, read = sources.open_source(f"folder:{folder}"), []
    picture = source.picture
    monkeypatch.setattr(source, "picture", lambda i: read.append(i) or picture(i))
    share, how = Share(3, threads=1), {"crop": "center", "flip": True}
    data = iter(images.training_batches(source, np.arange(4), share, size=8, seed=0, **how))
    return np.stack([next(data)["image"] for _ in range(6)]), read

  (kept, once), (made, often) = drawn(images.KEPT), drawn(0)
  np.testing.assert_array_equal(kept, made)
  assert sorted(once) == [0, 1, 2, 3]
  assert len(often) >= 18


def test_random_crops_differ_in_place():
  ramp = np.tile(np.arange(40, dtype=np.uint8)[None, :, None], (20, 1, 3))
  rng = np.random.default_rng(0)
  crops = [images.random_crop(Image.fromarray(ramp), 20, rng) for _ in range(8)]
  assert all(crop.shape == (20, 20, 3) for crop in crops)
  assert len({int(crop[0, 0, 0]) for crop in crops}) > 3


def test_uint8_survives_the_way_to_float_and_back():
  values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
  np.testing.assert_array_equal(images.to_uint8(images.to_float(values)), values)
