"""The report is one whole, self-contained, escaped file; charts show what they are given."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from launch.report.charts import Curve, line_chart, number
from launch.report.html import Figure, Report, write_report

HOSTILE = "<script>alert(\"1\")</script> & 'co'"
VOID = {"meta", "img", "path", "circle", "image", "rect"}


class Page(HTMLParser):
  """Parses a page, collects its elements and text, and notes tags that do not match."""

  def __init__(self, html: str):
    super().__init__()
    self.open, self.errors, self.elements, self.texts = [], [], [], []
    self.feed(html)
    self.close()
    self.errors += self.open

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    if not self.open or self.open.pop() != tag:
      self.errors.append(tag)

  def handle_data(self, data):
    self.texts.append(data.strip())


def pictures(*shape: int) -> np.ndarray:
  return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def report(**changes) -> Report:
  default = Report(
    title="A title",
    summary="A summary",
    class_names=["faces", HOSTILE],
    samples=pictures(2, 3, 5, 7),
    originals=pictures(4, 5, 7),
    reconstructions=pictures(4, 5, 7) // 2,
    curves=[
      Curve("Noisy", "loss", {"total": [(i, 2 - i / 200 + i % 3) for i in range(200)]}),
      Curve("Sparse", "dB", {"PSNR": [(5, 1e-3), (9, 10.0)], HOSTILE: [(1, 2.0)]}, log_y=True),
    ],
    latents_2d=np.array([[0.0, 1.0], [2.0, -1.0], [0.01, 1.0]]),
    latents_label=np.array([0, 1, 0]),
    latents_caption="A caption",
    figures=[
      Figure("PSNR", 23.456, "dB", "held-out", "higher"),
      Figure("count", 123456.0, note=HOSTILE),
    ],
    caveats=["Not FID.", HOSTILE],
    timings={"train": 100.0, "sample": 25.0},
    config="steps: 3\nname: " + HOSTILE,
    versions={"jax": "0.10.2"},
    latents_thumbnails=pictures(3, 5, 7),
  )
  return dataclasses.replace(default, **changes)


def written(tmp_path, **changes) -> str:
  path = tmp_path / "report.html"
  write_report(report(**changes), path)
  return path.read_text("utf-8")


def test_page_is_well_formed(tmp_path):
  page = Page(written(tmp_path))
  assert page.errors == []
  ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
  assert ids == ["samples", "reconstructions", "training", "latents", "figures", "run"]
  links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
  assert links == [f"#{id}" for id in ids]


def test_page_loads_nothing(tmp_path):
  html = written(tmp_path)
  assert "script" not in {tag for tag, _ in Page(html).elements}
  assert not re.search(r"https?:|@import|url\((?!data:)", html)
  for tag, attributes in Page(html).elements:
    for name in {"src", "href", "xlink:href", "srcset"} & attributes.keys():
      assert attributes[name].startswith(("data:", "#")), tag


def test_hostile_text_stays_text(tmp_path):
  html = written(tmp_path, title=HOSTILE, summary=HOSTILE, latents_caption=HOSTILE)
  assert "<script" not in html
  texts = Page(html).texts
  # Title twice, summary, class row, latents caption and legend, thumbnail, chart legend, note,
  # caveat.
  assert texts.count(HOSTILE) == 10
  assert "steps: 3\nname: " + HOSTILE in texts


def test_pictures_are_exact_and_in_order(tmp_path):
  given = report()
  uris = [a["src"] for tag, a in Page(written(tmp_path)).elements if tag == "img"]
  shown = [
    np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
    for uri in uris
  ]
  hero = given.samples.swapaxes(0, 1).reshape(6, 5, 7, 3)
  rows = given.samples.reshape(6, 5, 7, 3)
  pairs = np.stack([given.originals, given.reconstructions], axis=1).reshape(8, 5, 7, 3)
  np.testing.assert_array_equal(shown, np.concatenate([hero, rows, pairs]))


def test_every_figure_caveat_and_version_is_on_the_page(tmp_path):
  texts = Page(written(tmp_path)).texts
  for text in ["PSNR", "23.46", "dB", "held-out", "higher", "count", "123.5k", "Not FID."]:
    assert text in texts
  for text in ["train", "1 min 40 s", "25.0 s", "2 min 05 s in all.", "jax", "0.10.2"]:
    assert text in texts


def test_empty_parts_leave_their_section_out(tmp_path):
  nothing = np.zeros((0, 5, 7, 3), np.uint8)
  page = Page(
    written(
      tmp_path,
      originals=nothing,
      reconstructions=nothing,
      curves=[Curve("Empty", "loss", {"total": [(1, float("nan"))]})],
      latents_2d=np.zeros((0, 2)),
      latents_label=np.zeros(0, int),
      latents_thumbnails=None,
    )
  )
  assert page.errors == []
  assert {a["id"] for _, a in page.elements if "id" in a} == {"samples", "figures", "run"}


def test_thumbnails_do_not_hide_one_another(tmp_path):
  elements = Page(written(tmp_path)).elements
  assert len([tag for tag, _ in elements if tag == "image"]) == 2  # of three, two share a place


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  old = written(tmp_path)

  def full_disk(_):
    raise OSError("No space left on device")

  monkeypatch.setattr(os, "fsync", full_disk)
  with pytest.raises(OSError, match="No space"):
    write_report(report(title="new"), tmp_path / "report.html")
  assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
  assert (tmp_path / "report.html").read_text("utf-8") == old


def test_noisy_curves_are_smoothed_and_sparse_ones_dotted():
  noisy, sparse = map(line_chart, report().curves)
  assert ('class="raw"' in noisy, "<circle" in noisy) == (True, False)
  assert ('class="raw"' in sparse, sparse.count("<circle")) == (False, 3)


def test_curve_ends_where_its_values_say():
  """A straight line runs through the frame from one corner to the other."""
  chart = line_chart(Curve("Line", "loss", {"total": [(i, 3.0 + i) for i in range(0, 40, 10)]}))
  x, y = (
    np.array(re.findall(r"([\d.]+) ([\d.]+)", chart.split('class="line" d="')[1])).astype(float).T
  )
  np.testing.assert_allclose(np.diff(x), np.diff(x)[0], atol=0.11)
  np.testing.assert_allclose(np.diff(y), np.diff(y)[0], atol=0.11)
  assert x[0] < x[-1]
  assert y[0] > y[-1]


def test_log_axis_places_decades_evenly_and_drops_what_has_no_logarithm():
  points = [(0, 1e-2), (1, 0.0), (2, float("inf")), (3, 1.0), (4, 100.0)]
  chart = line_chart(Curve("Log", "loss", {"total": points}, log_y=True))
  heights = [float(y) for y in re.findall(r'cy="([\d.]+)"', chart)]
  assert len(heights) == 3
  np.testing.assert_allclose(heights[0] - heights[1], heights[1] - heights[2], atol=0.11)
  for tick in ("0.01", "1", "100"):
    assert f">{tick}</text>" in chart


def test_a_flat_line_lies_in_the_middle():
  chart = line_chart(Curve("Flat", "loss", {"total": [(0, 2.0), (1, 2.0)]}))
  assert re.findall(r'cy="([\d.]+)"', chart) == ["122.0", "122.0"]


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (0.123456, "0.1235"),
    (-2.0, "-2"),
    (9999.7, "10k"),
    (12345, "12.35k"),
    (999_990, "1M"),
    (float("nan"), "not finite"),
  ],
)
def test_number(value, text):
  assert number(value) == text


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"samples": pictures(3, 3, 5, 7)}, "samples has shape"),
    ({"samples": np.zeros((2, 3, 5, 7, 3), np.float32)}, "samples is float32"),
    ({"originals": pictures(3, 5, 7)}, "reconstructions has shape"),
    ({"latents_2d": np.zeros((3, 3))}, "latents_2d has shape"),
    ({"latents_2d": np.full((3, 2), np.nan)}, "latents_2d holds NaN"),
    ({"latents_label": np.array([0, 1])}, "latents_label has shape"),
    ({"latents_label": np.array([0, 1, 2])}, "needs integers"),
    ({"latents_label": np.array([0.0, 1.0, 1.0])}, "needs integers"),
    ({"latents_thumbnails": pictures(2, 5, 7)}, "latents_thumbnails has shape"),
    ({"figures": [Figure("PSNR", 1.0, better="up")]}, "better is 'up'"),
  ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, changes, message):
  with pytest.raises(ValueError, match=message):
    written(tmp_path, **changes)
  assert list(tmp_path.iterdir()) == []
