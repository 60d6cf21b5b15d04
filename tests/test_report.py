"""A page is one whole, self-contained, escaped file; charts show what they are given."""

from __future__ import annotations

import base64
import io
import itertools
import math
import os
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from launch.evaluation import overview, solvers, sweep
from launch.evaluation.pictures import FromSource
from launch.report import html, plots
from launch.report.charts import Curve, line_chart, scatter, training_section
from launch.report.html import Figure, Section, number, write_page
from tests.charts import crowded

HOSTILE = "<script>alert(\"1\")</script> & 'co'"
VOID = {"meta", "img"}
NOISY = Curve("Noisy", "loss", {"total": [(i, 2 - i / 200 + i % 3) for i in range(200)]})
SPARSE = Curve("Sparse", "dB", {"PSNR": [(5, 1e-3), (9, 10.0)], HOSTILE: [(1, 2.0)]}, log_y=True)
FIGURES = [Figure("PSNR", 23.456, "dB", "held-out", "higher"), Figure("n", 123456.0, note=HOSTILE)]
POINTS = np.array([[0.0, 1.0], [2.0, -1.0], [0.01, 1.0]])


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


SAMPLES, ORIGINALS, REBUILT = pictures(2, 3, 5, 7), pictures(4, 5, 7), pictures(4, 5, 7) // 2


def written(tmp_path, title: str = "A title") -> str:
  """A page with every kind of part."""
  names = ["faces", HOSTILE]
  sections = [
    Section("Samples", HOSTILE, [html.picture_rows(dict(zip(names, SAMPLES, strict=True)), 3)]),
    Section("Pairs", "", [html.picture_pairs(ORIGINALS, REBUILT, ("original", HOSTILE))]),
    training_section([NOISY, SPARSE]),
    Section("Latents", "", [scatter(POINTS, np.array([0, 1, 0]), names, pictures(3, 5, 7))]),
    Section("Figures", "", [html.figures_table(FIGURES, ["Not FID.", HOSTILE])]),
    Section("All runs", "", [html.bars({"train": 100.0, HOSTILE: 25.0})]),
    Section("Details", "", [html.details(HOSTILE, "steps: 3\nname: " + HOSTILE)]),
    Section("Table", "", [html.table(("a", HOSTILE), [("1", HOSTILE)])]),
  ]
  path = tmp_path / "page.html"
  hero = html.strip(SAMPLES.reshape(-1, 5, 7, 3), HOSTILE)
  write_page(path, title, sections, summary=HOSTILE, figures=FIGURES, hero=hero)
  return path.read_text("utf-8")


def test_page_is_well_formed(tmp_path):
  page = Page(written(tmp_path))
  assert page.errors == []
  anchors = [attributes["id"] for tag, attributes in page.elements if tag == "section"]
  assert " ".join(anchors) == "samples pairs training latents figures all-runs details table"
  links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
  assert links == [f"#{anchor}" for anchor in anchors]
  ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
  assert len(ids) == len(set(ids))


def test_page_loads_nothing(tmp_path):
  text = written(tmp_path)
  assert "script" not in {tag for tag, _ in Page(text).elements}
  assert not re.search(r"https?:|@import|url\((?!data:|#)", text)
  for tag, attributes in Page(text).elements:
    for name in {"src", "href", "xlink:href", "srcset"} & attributes.keys():
      assert attributes[name].startswith(("data:", "#")), tag


def test_hostile_text_stays_text(tmp_path):
  text = written(tmp_path, title=HOSTILE)
  assert "<script" not in text
  texts = Page(text).texts
  # Title twice, summary, caption, class row, legends of chart and map, thumbnail, note, caveat,
  # stage, details, head and cell of the table.
  assert texts.count(HOSTILE) == 14
  assert "steps: 3\nname: " + HOSTILE in texts


@pytest.mark.parametrize("name", [r"$\frac{$/d16", "a\n\x1b\udcff"])
def test_names_in_figures_and_pages_may_have_any_character(tmp_path, name):
  figure, ((axis,),) = plots.panels(size=(7, 5))
  plots.frontier(axis, {name: (1.0, 2.0)})
  plots.save(figure, tmp_path / "frontier.png", dpi=20)
  write_page(tmp_path / "page.html", name, [])
  assert (tmp_path / "page.html").read_bytes().decode()


def test_pictures_are_exact_and_in_order(tmp_path):
  uris = [a["src"] for tag, a in Page(written(tmp_path)).elements if tag == "img"]
  shown = [
    np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))
    for uri in uris
  ]
  samples = SAMPLES.reshape(6, 5, 7, 3)
  pairs = np.stack([ORIGINALS, REBUILT], axis=1).reshape(8, 5, 7, 3)
  np.testing.assert_array_equal(shown, np.concatenate([samples, samples, pairs]))


def test_every_figure_caveat_and_time_is_on_the_page(tmp_path):
  texts = Page(written(tmp_path)).texts
  for text in ["PSNR", "23.46 dB", "held-out", "higher", "n", "123.5k", "Not FID."]:
    assert text in texts
  for text in ["train", "1 min 40 s", "25.0 s"]:
    assert text in texts


def test_sections_without_content_are_left_out(tmp_path):
  nothing = np.zeros((0, 5, 7, 3), np.uint8)
  sections = [
    Section("Rows", "", [html.picture_rows({"a": nothing}, 3)]),
    Section("Pairs", "", [html.picture_pairs(nothing, nothing, ("a", "b"))]),
    training_section([Curve("Empty", "loss", {"total": [(1, float("nan"))]})]),
    Section("Latents", "", [scatter(np.zeros((0, 2)), np.zeros(0, int), [])]),
    Section("Figures", "", [html.figures_table([])]),
    Section("Table", "", [html.table(("a",), [])]),
  ]
  write_page(tmp_path / "page.html", "Empty", sections)
  page = Page((tmp_path / "page.html").read_text("utf-8"))
  assert page.errors == []
  assert [a["id"] for _, a in page.elements if "id" in a] == ["table"]


def test_thumbnails_do_not_hide_one_another(tmp_path):
  elements = Page(written(tmp_path)).elements
  assert len([tag for tag, _ in elements if tag == "image"]) == 2  # of three, two share a place


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  old = written(tmp_path)

  def full_disk(_):
    raise OSError("No space left on device")

  monkeypatch.setattr(os, "fsync", full_disk)
  with pytest.raises(OSError, match="No space"):
    written(tmp_path, title="new")
  assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
  assert (tmp_path / "page.html").read_text("utf-8") == old


def test_noisy_curves_are_smoothed_and_sparse_ones_dotted():
  noisy, sparse = map(line_chart, (NOISY, SPARSE))
  assert ("opacity: 0.28" in noisy, "<use" in noisy) == (True, False)
  assert ("opacity: 0.28" in sparse, sparse.count("<use")) == (False, 3)


def test_a_chart_is_one_picture_with_a_name_for_screen_readers():
  drawn = line_chart(Curve('<Loss> "a"', "y", {"a": [(0, 1.0), (1, 2.0)]}))
  assert drawn.count("<svg ") == 1
  assert '<svg role="img" aria-label="&lt;Loss&gt; &quot;a&quot;" ' in drawn


def test_charts_take_the_colours_of_the_page():
  """So that they can be read in light and dark mode."""
  chart = line_chart(NOISY)
  assert {"currentColor", "var(--line)", "var(--c0)"} <= {*re.findall(r"[:] ([\w()-]+)", chart)}
  assert not re.search(r"#[0-9a-f]{6}\b", chart)
  assert line_chart(NOISY) == chart  # the same for the same values


def test_a_log_axis_drops_what_has_no_logarithm_and_a_legend_shows_last_values():
  points = [(0, 1e-2), (1, 0.0), (2, float("inf")), (3, 1.0), (4, 100.0)]
  chart = line_chart(Curve("Log", "loss", {"total": points}, log_y=True))
  heights = [float(y) for y in re.findall(r'<use [^>]*y="([\d.]+)"', chart)]
  assert len(heights) == 3
  np.testing.assert_allclose(heights[0] - heights[1], heights[1] - heights[2], atol=1e-3)
  for tick in ("0.01", "1", "100"):
    assert f">{tick}</text>" in chart
  assert "<b>100</b>" in chart


@pytest.fixture
def drawn(monkeypatch) -> list:
  """The figures that a test makes."""
  figures, panels = [], plots.panels

  def keep(*sizes, **options):
    figure, axes = panels(*sizes, **options)
    figures.append(figure)
    return figure, axes

  monkeypatch.setattr(plots, "panels", keep)
  return figures


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("last", [1, 2, 500, 1000, 12345, 80_000, 2_600_000])
def test_all_numbers_at_a_chart_can_be_read(drawn, last, log_y):
  steps = np.unique(np.linspace(min(last, 10), last, 100).astype(int)).tolist()
  values = [(step, 3 * math.exp(-i / 50) + 0.2) for i, step in enumerate(steps)]
  half = [(step, value / 2) for step, value in values]
  assert line_chart(Curve("Loss", "loss", {"a": values, "b": half}, log_y=log_y))
  (figure,) = drawn
  figure.draw_without_rendering()
  figure.set_layout_engine("none")  # the page changes only the size of the texts
  for size in (11, 15):  # of style.css, for wide pages and for phones
    for text in figure.findobj(Text):
      text.set_fontsize(size)
    assert crowded(figure) == [], size


def test_no_dot_at_the_edge_of_a_chart_is_cut(drawn):
  assert line_chart(Curve("Loss", "loss", {"a": [(0, 1.0), (9, 2.0)]}))
  assert not any(line.get_clip_on() for line in drawn[0].axes[0].lines)


def test_names_of_tokenizers_near_each_other_can_be_read(drawn, tmp_path):
  points = {"plain/d4": (21.4, 7.3), "aligned/d4": (21.3, 7.6), "plain/d16": (26.7, 1.3)}
  points |= {"aligned/d16": (26.6, 1.5), "plain/d128": (49.0, 3.0), "aligned/d128": (48.6, 3.2)}
  figure, ((axis,),) = plots.panels(size=(7, 5))
  plots.frontier(axis, points)
  axis.set(xlabel="PSNR", ylabel="FD", yscale="log")
  assert crowded(figure) == []


def test_solvers_can_be_read_though_one_has_no_distance(tmp_path):
  grid = zip((5, 17, 33), (0.4, 0.2, 0.0), (0.0100, 0.0101, 0.0102), strict=True)
  points = [{"num_steps": n, "distance": y, "seconds": x} for n, y, x in grid]
  solvers._draw(points, ["num_steps"], tmp_path / "solvers.png")  # which is checked as it is saved


def test_all_cells_of_a_sweep_can_be_read(drawn, tmp_path):
  grid = {"cfg_scale": (1.0, 1.25, 10.5), "num_steps": (50, 250), "timestep_shift": (0.1, 0.3)}
  points = [dict(zip(grid, x, strict=True), fid=1234.5) for x in itertools.product(*grid.values())]
  sweep._heat_map(grid, points, "fid", tmp_path / "sweep.png")
  assert crowded(drawn[0]) == []


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
  ("make", "message"),
  [
    (lambda: html.picture_rows({"a": SAMPLES.astype(np.float32)[0]}, 3), "is float32"),
    (lambda: html.picture_pairs(ORIGINALS, REBUILT[:3], ("a", "b")), "shorter"),
    (lambda: scatter(np.zeros((3, 3)), np.zeros(3, int), ["a"]), r"points are \(3, 3\)"),
    (lambda: scatter(np.full((3, 2), np.nan), np.zeros(3, int), ["a"]), "hold NaN"),
    (lambda: scatter(POINTS, np.array([0, 1]), ["a", "b"]), "as many labels"),
    (lambda: scatter(POINTS, np.array([0, 1, 2]), ["a", "b"]), "needs? integers below 2"),
    (lambda: scatter(POINTS, np.zeros(3), ["a", "b"]), "integers"),
    (lambda: scatter(POINTS, np.zeros(3, int), ["a"], pictures(2, 5, 7)), "as many"),
    (lambda: Figure("PSNR", 1.0, better="up"), "better is 'up'"),
  ],
)
def test_parts_that_do_not_fit_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_a_latent_is_shown_by_its_own_picture(tmp_path):
  """The store has no place for one that could not be read; the pictures have another there."""
  for i in range(5):
    Image.new("RGB", (4, 4), (50 * i,) * 3).save(tmp_path / f"{i}.png")
  (tmp_path / "1.png").write_bytes(b"broken")
  training = FromSource(f"folder:{tmp_path}", 4, max_corrupt=1)
  store = SimpleNamespace(manifest={"skipped": [training.source.name(1)]})
  shown = overview.pictures_of(store, training, np.arange(4))
  assert shown[:, 0, 0, 0].tolist() == [0, 100, 150, 200]
