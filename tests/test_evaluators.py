"""The evaluators of both trainings give the same on 1, 2 and 4 processes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import safetensors.numpy

from launch.engine.evaluators import evaluate
from launch.engine.parts import Parts
from launch.evaluation import drawn, reference, training
from launch.evaluation.pictures import Array
from tests.evaluators_everywhere import HELD_OUT, cells
from vavae_jax.common import mesh
from vavae_jax.common.batches import in_shares

LAYOUTS = ("4:2:2",)  # tests/test_processes.py has two processes
# Those four are in reverse; the two of two devices each are interleaved.
ORDERS = (*LAYOUTS, "2:2:2:batches")


@pytest.fixture(scope="module")
def found(command, pipeline, tmp_path_factory):
  """By layout: all that the evaluators gave."""
  output = tmp_path_factory.mktemp("evaluators")
  done = command("tests.evaluators_everywhere", pipeline, output, ",".join(["1:1:1", *ORDERS]))
  assert done.returncode == 0, done.stderr
  return {path.stem: dict(np.load(path)) for path in output.glob("*.npz")}


@pytest.mark.parametrize("layout", ORDERS)
def test_batches_are_those_of_one_process_in_any_order_of_the_devices(found, layout):
  names = ("tokenizer/image", "tokenizer/label", "diffusion/latent", "diffusion/label", "twice")
  for name in names:
    np.testing.assert_array_equal(found[layout][name], found["1:1:1"][name], name)
  np.testing.assert_array_equal(found[layout]["twice"], 2 * np.arange(7))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_validation_losses_of_several_processes_are_those_of_one(found, layout):
  """The last batch of 8 has 3 records, fewer than there are of four processes."""
  assert HELD_OUT % 8 == 3
  names = [name for name in found[layout] if name.startswith("validation/")]
  assert len(names) == 18
  for name in names:
    assert found[layout][name] == pytest.approx(found["1:1:1"][name], rel=1e-6), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_and_their_distance_of_several_processes_are_those_of_one(found, layout):
  """Each device draws as many at once as the only one does."""
  for name in ("samples/grid", "samples/fd_cells"):
    np.testing.assert_array_equal(found[layout][name], found["1:1:1"][name], name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reconstructions_of_several_processes_are_those_of_one(found, layout):
  names = [name for name in found[layout] if name.startswith("reconstruction/")]
  assert len(names) == 4
  for name in names:
    # Sums in another order: a number at the edge of two uint8 values may fall to either side.
    one, other = (found[x][name].astype(float) for x in ("1:1:1", layout))
    if name.endswith("/pictures"):
      assert abs(one - other).max() <= 1
    else:
      assert other == pytest.approx(one, rel=1e-5, abs=1e-6), name


@pytest.mark.parametrize(
  ("total", "labels"),
  [(3, [0, 1, 3]), (4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 4]), (7, [*range(5), 0, 1])],
)
def test_fewer_samples_than_classes_are_of_classes_from_all_over(total, labels):
  found = training._labelled(lambda _, __, label_B: label_B, None, 5, total, np.arange(total))
  assert found.tolist() == labels


@pytest.mark.parametrize("left", [[], [range(3)], [range(2), range(4, 7)], [range(1, 4), range(5)]])
def test_samples_that_are_there_are_not_drawn_again(left, tmp_path):
  """And of the pictures that overlap, as where a lost disk came back, one counts."""
  parts = Parts(tmp_path / "parts", 7, 2, ".x.safetensors")
  parts.folder.mkdir()
  pictures = np.arange(7, dtype=np.uint8).repeat(3).reshape(7, 1, 1, 3)
  for part in left:
    shown = pictures[part.start : min(part.stop, 3)]
    some = {"pool": np.float32(part)[:, None] + 0.5, drawn.SHOWN: shown}
    parts.path(part).write_bytes(safetensors.numpy.save(some))
  parts.path(range(6, 7)).write_bytes(b"damaged")
  batches = []

  def sample(index):
    batches.append(index.tolist())
    return pictures[index]

  def keep(some):
    return {"pool": np.float32(some[:, 0, 0, :1]) + 0.5}

  work, pieces = drawn.draw(sample, keep, parts, mesh.make_mesh(), 3), 0
  while True:
    try:
      assert next(work) is None
      pieces += 1
    except StopIteration as end:
      found = end.value
      break
  missing = sorted({*range(7)}.difference(*left))
  assert [index for batch in batches for index in batch] == missing
  assert [len(batch) for batch in batches] == [2] * (len(missing) // 2) + [1] * (len(missing) % 2)
  assert pieces == len(batches)
  features = np.concatenate(list(drawn.in_order(found, "pool", 7)))
  np.testing.assert_array_equal(features[:, 0], np.arange(7) + 0.5)
  shown = np.concatenate(list(drawn.in_order(found, drawn.SHOWN, 3)))
  np.testing.assert_array_equal(shown, pictures[:3])
  drawn.remove(parts.folder)
  assert not parts.folder.exists()


@pytest.mark.parametrize(("change", "computed"), [("", 1), ("picture", 2), ("damage", 2)])
def test_the_real_pictures_of_a_distance_are_computed_once(change, computed, tmp_path, monkeypatch):
  pictures = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
  calls, compute = [], reference.statistics_of

  def statistics_of(*given):
    calls.append(given)
    return compute(*given)

  monkeypatch.setattr(reference, "statistics_of", statistics_of)
  path = tmp_path / "reference.npz"
  first = reference.kept_gaussian(Array(pictures), cells(""), path)
  pictures[3] += change == "picture"
  if change == "damage":
    path.write_bytes(path.read_bytes()[:-9])
  again = reference.kept_gaussian(Array(pictures), cells(""), path)
  assert len(calls) == computed
  assert np.array_equal(first.mean, again.mean) == (change != "picture")


def test_weights_are_named_by_their_bits():
  weights = {"a": np.float32([1, 2]), "b": np.float32([3])}
  name = drawn.identity(weights, [1])
  assert name == drawn.identity(weights, [1]) != drawn.identity(weights, [2])
  weights["b"] = np.nextafter(weights["b"], 4)
  assert drawn.identity(weights, [1]) != name


def test_rows_of_a_share_are_loaded_when_their_turn_comes():
  loaded = []

  def load(rows):
    loaded.append(rows.tolist())
    return rows

  found = list(in_shares(lambda x: 2 * x, load, 7, 3, mesh.make_mesh()))
  assert loaded == [[0, 1, 2], [3, 4, 5], [6, 6, 6]]
  assert [rows.tolist() for rows, _ in found] == [[0, 1, 2], [3, 4, 5], [6]]
  assert [out.tolist() for _, out in found] == [[0, 2, 4], [6, 8, 10], [12]]


class Recorder:
  """A writer that remembers what it is given."""

  def __init__(self):
    self.told = []

  def picture(self, step, name, image_HWC):
    self.told.append((step, name))

  def scalars(self, step, values):
    self.told.append((step, *sorted(values)))

  def flush(self):
    self.told.append("flushed")


@pytest.mark.parametrize("stop", [None, (5, 2, 1)])
def test_an_evaluation_may_be_left_between_its_pieces(stop):
  writer, places = Recorder(), []

  def long(state):
    yield None
    yield None
    yield {"loss": state, "grid": np.zeros((1, 1, 3), np.uint8)}
    writer.told.append("tidied up")

  def go_on(*place):
    places.append(place)
    if place == stop:
      raise KeyboardInterrupt

  evaluators = {"short": (1, lambda state: {"loss": state}), "long": (1, long)}
  stopped = pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext()
  with stopped:
    evaluate(evaluators, ["short", "long"], writer, 5, 1.0, go_on)
  short = [(5, "short/loss", "short/took_seconds"), "flushed"]
  if stop:
    assert places == [(5, 1, 0), (5, 2, 0), (5, 2, 1)]
    assert writer.told == short
  else:
    assert places == [(5, 1, 0), (5, 2, 0), (5, 2, 1), (5, 2, 2)]
    told = [(5, "long/grid"), (5, "long/loss", "long/took_seconds"), "flushed", "tidied up"]
    assert writer.told == short + told
