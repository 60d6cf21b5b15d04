"""Sets of pictures, their statistics, and the figures that the commands write."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import weakref
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict
from PIL import Image
from safetensors.numpy import save_file

import launch.evaluate
from launch.evaluation import (
  figures,
  frontier,
  gaussians,
  generation,
  pictures,
  reconstruction,
  solvers,
  space,
  statistics,
  sweep,
)
from launch.evaluation.cells import StoredCells, open_cells
from launch.evaluation.features import EFFICIENTNET, Network, load_network
from launch.evaluation.figures import Entry, Options
from launch.evaluation.output import Output
from launch.evaluation.reference import (
  MOST_KEPT,
  open_reference,
  reference_of,
  statistics_of,
  store,
)
from launch.evaluation.sample_files import read_samples
from lightningdit_jax.store.latents import LatentStore
from vavae_jax.common.errors import InputError
from vavae_jax.metrics import confidence
from vavae_jax.metrics.distribution import Gaussian, Moments, inception_score

FEATURES = 6
RNG = np.random.default_rng(0)
PICTURES = RNG.integers(256, size=(23, 8, 8, 3), dtype=np.uint8)


def apply(params, image_BHWC):
  """Few features and classes, all that Inception's figures need."""
  small = jax.image.resize(image_BHWC.astype(jnp.float32), (len(image_BHWC), 8, 8, 3), "nearest")
  x = small.reshape(len(small), -1) @ params["w"] / 1e3
  return {"pool": x, "spatial": jnp.cos(x), "probabilities": jax.nn.softmax(x)}


@pytest.fixture(scope="module")
def network() -> Network:
  params = {"w": np.random.default_rng(1).standard_normal((8 * 8 * 3, FEATURES), np.float32)}
  return Network("adm", "FID", {"protocol": "adm", "weights_sha256": "0"}, params, apply)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  """Blocks of ten pictures in batches of four."""
  monkeypatch.setattr(statistics, "BLOCK", 10)
  monkeypatch.setattr(statistics, "CPU_BATCH", 4)
  monkeypatch.setattr(statistics, "SPLIT", 20)


def features(network: Network, array: np.ndarray) -> np.ndarray:
  return np.asarray(apply(network.params, array)["pool"], np.float64)


def npz(path, **arrays):
  np.savez_compressed(path, **arrays)
  return path


def test_streamed_statistics_are_those_of_all_at_once(network):
  found = statistics_of(pictures.Array(PICTURES), network, "samples", keep=True)
  all_NF = found.column("pool").astype(np.float64)
  np.testing.assert_allclose(all_NF, features(network, PICTURES), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(found.moments["pool"].mean, all_NF.mean(0), rtol=1e-9)
  np.testing.assert_allclose(found.moments["pool"].cov, np.cov(all_NF.T), rtol=1e-9)
  probabilities = np.asarray(jax.nn.softmax(all_NF), np.float64)
  np.testing.assert_allclose(found.inception_score(), inception_score(probabilities, 20), rtol=1e-6)


def test_statistics_survive_their_file(network):
  found = statistics_of(pictures.Array(PICTURES), network, "samples", keep=True)
  again = statistics.Statistics.of_tensors(found.to_tensors())
  np.testing.assert_array_equal(again.moments["spatial"].scatter, found.moments["spatial"].scatter)
  np.testing.assert_array_equal(again.column("pool"), found.column("pool"))
  assert again.inception_score() == found.inception_score()


class Dying(pictures.Array):
  """Pictures of which those from the second block on can be read only once it may."""

  def __init__(self, alive: bool):
    super().__init__(PICTURES)
    self.alive, self.reads = alive, []

  def read(self, start: int, stop: int) -> np.ndarray:
    self.reads.append(start)
    if start >= 20 and not self.alive:
      raise KeyboardInterrupt
    return super().read(start, stop)


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_an_evaluation_that_was_stopped_goes_on_and_ends_the_same(
  network, tmp_path, monkeypatch, seconds
):
  monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", seconds)
  compute = functools.partial(
    statistics_of, network=network, name="samples", keep=True, progress=tmp_path
  )
  with pytest.raises(KeyboardInterrupt):
    compute(Dying(alive=False))
  blocks = sorted(path.name[:12] for path in (tmp_path / "samples").glob("0*"))
  assert blocks == (["000000000_10", "000000010_10"] if seconds else [])  # or joined
  again = Dying(alive=True)
  found = compute(again)
  assert again.reads == [20]
  whole = statistics_of(pictures.Array(PICTURES), network, "samples", keep=True)
  for name, tensor in whole.to_tensors().items():
    np.testing.assert_array_equal(found.to_tensors()[name], tensor, err_msg=name)


def test_a_block_is_drawn_when_the_one_before_is_kept(network, tmp_path):
  """Else a kill would lose two, each of which takes minutes."""

  class Drawn(pictures.Sampled):
    size, about, kept = 8, {}, []

    def __init__(self):
      """Needs no model."""

    def __len__(self):
      return len(PICTURES)

    def read(self, start, stop):
      self.kept.append(len([*(tmp_path / "samples").glob("0*")]))
      return PICTURES[start:stop]

  statistics_of(Drawn(), network, "samples", progress=tmp_path)
  assert Drawn.kept == [0, 1, 2]


@pytest.mark.parametrize("change", ["other pictures", "damage"])
def test_what_was_found_of_others_or_is_damaged_is_computed_anew(
  network, tmp_path, monkeypatch, change
):
  monkeypatch.setattr(statistics, "SECONDS_BETWEEN_SAVES", 0.0)
  compute = functools.partial(statistics_of, network=network, name="x", progress=tmp_path)
  compute(pictures.Array(PICTURES[::-1] if change == "other pictures" else PICTURES))
  file = tmp_path / "x" / statistics.JOINED
  if change == "damage":
    file.write_bytes(file.read_bytes()[:-100])
  found = compute(pictures.Array(PICTURES))
  expected = statistics_of(pictures.Array(PICTURES), network, "x")
  np.testing.assert_array_equal(found.moments["pool"].mean, expected.moments["pool"].mean)


def test_a_damaged_block_is_named(network, tmp_path):
  compute = functools.partial(statistics_of, network=network, name="x", progress=tmp_path)
  compute(pictures.Array(PICTURES))
  (tmp_path / "x" / "000000010_10.safetensors").write_bytes(b"x")
  with pytest.raises(InputError, match=r"000000010_10\.safetensors is damaged"):
    compute(pictures.Array(PICTURES))


def test_files_that_were_written_anew_are_other_pictures(network, tmp_path):
  """Though they bear the same names."""
  folder, progress = tmp_path / "drawn", tmp_path / "progress"
  folder.mkdir()
  means = []
  for drawn in (PICTURES[:12], PICTURES[11:]):
    for i, picture in enumerate(drawn):
      Image.fromarray(picture).save(folder / f"{i:02d}.png")
    opened = pictures.open_pictures(str(folder))
    found = statistics_of(opened, network, "samples", progress=progress)
    means.append(found.moments["pool"].mean)
  np.testing.assert_allclose(means[1], features(network, PICTURES[11:]).mean(0), rtol=1e-5)
  assert np.abs(means[0] - means[1]).max() > 0.01


def test_pictures_of_two_sizes_compare_only_where_both_are_resized(network, tmp_path):
  reference = reference_of(pictures.Array(PICTURES[:, :4, :4]), network)
  output, options = Output(tmp_path / "x", "generation"), Options(precision_recall=False)
  generation.evaluate(pictures.Array(PICTURES), reference, network, output, options=options)
  other = dataclasses.replace(network, protocol=EFFICIENTNET, distance="FD-EfficientNet")
  with pytest.raises(InputError, match="samples of 8 px and a reference of 4 px"):
    generation.evaluate(pictures.Array(PICTURES), reference, other, output, options=options)


@pytest.mark.parametrize("statistics", [{}, {"mu": np.zeros(6), "sigma": np.eye(6)}])
@pytest.mark.parametrize(("size", "named"), [(8, "of 8 px"), (0, "that are no squares")])
def test_a_reference_of_another_size_is_refused_unread(
  network, size, named, statistics, tmp_path, monkeypatch
):
  path = npz(tmp_path / "reference.npz", arr_0=PICTURES[:, :4, :4], **statistics)
  other = dataclasses.replace(network, protocol=EFFICIENTNET, distance="FD-EfficientNet")
  monkeypatch.setattr("launch.evaluation.reference.statistics_of", pytest.fail)
  with pytest.raises(InputError, match=f"samples {named} and a reference of 4 px"):
    open_reference(str(path), other, size=size, keep=True)


@pytest.mark.parametrize("width", [4, 3])
def test_statistics_know_of_which_size_their_pictures_were(network, width, tmp_path, capsys):
  path, real = tmp_path / "reference.npz", pictures.Array(PICTURES[:, :4, :width])
  other = dataclasses.replace(network, protocol=EFFICIENTNET, distance="FD-EfficientNet")
  store(real, network, path)
  open_reference(str(path), other, size=real.size)
  with pytest.raises(InputError, match=r"samples of 8 px and a reference (of 4 px|that are no)"):
    open_reference(str(path), other, size=8)
  resized, options = open_reference(str(path), network, size=8), Options(precision_recall=False)
  output, second = Output(tmp_path / "x", "generation"), figures.Second(other, resized)
  compute = functools.partial(generation.evaluate, pictures.Array(PICTURES), resized, network)
  compute(output, options=options)
  assert "adm both resizes to 299" in capsys.readouterr().out
  with pytest.raises(InputError, match="samples of 8 px and a reference"):
    compute(output, options=options, second=second)
  with np.load(path) as whole:  # as it was written before it had the size
    npz(path, **{name: x for name, x in whole.items() if name != "size"})
  assert open_reference(str(path), other, size=8).size is None


@pytest.mark.parametrize("name", ["x.json", "x.png", "x.html", "x.progress", "x.points"])
def test_an_output_that_cannot_be_written_is_refused_at_once(name, tmp_path):
  if name in ("x.progress", "x.points"):
    (tmp_path / name).touch()
  else:
    (tmp_path / name).mkdir()
  with pytest.raises(InputError, match=f"{name} is to be a .*name another output"):
    Output(tmp_path / "x", "generation")


def test_figures_of_equal_sets_and_of_shifted_ones(network, tmp_path):
  reference = reference_of(pictures.Array(PICTURES), network, keep=True)
  options = Options(bootstrap=3, infinity=True)
  output = Output(tmp_path / "equal", "generation")
  found = generation.evaluate(pictures.Array(PICTURES), reference, network, output, options=options)
  assert abs(found["fid"]) < 1e-8
  assert abs(found["sfid"]) < 1e-8
  assert found["precision"] == found["recall"] == 1
  noted = json.loads(output.json.read_text())
  assert noted["figures"] == found
  assert noted["network"] == network.about
  assert noted["samples"]["pictures"] == len(PICTURES)
  assert noted["confidence"]["fid"]["resamples"] == 3
  assert "data:image/webp" in output.html.read_text()
  shifted = generation.evaluate(
    pictures.Array(255 - PICTURES // 4), reference, network, output, options=Options()
  )
  assert shifted["fid"] > 1
  assert shifted["precision"] < 1
  shift = features(network, PICTURES).mean(0) - features(network, 255 - PICTURES // 4).mean(0)
  assert shifted["fid_means"] == pytest.approx(shift @ shift)
  assert shifted["fid_means"] + shifted["fid_covariances"] == shifted["fid"]


@pytest.mark.parametrize("kind", ["named", "without labels", "too many"])
def test_the_page_of_samples_has_a_row_for_each_of_few_classes(network, tmp_path, kind):
  labels = np.arange(20) if kind == "too many" else np.arange(20) % 3
  with_labels = {} if kind == "without labels" else {"arr_1": labels}
  samples = npz(tmp_path / "samples.npz", arr_0=PICTURES[:20], **with_labels)
  samples.with_suffix(".json").write_text('{"class_names": ["cat", "dog"]}')
  reference = reference_of(pictures.Array(PICTURES), network, keep=True)
  output = Output(tmp_path / "found", "generation")
  opened = pictures.open_pictures(str(samples))
  generation.evaluate(opened, reference, network, output, options=Options())
  shown = re.findall(
    r'<div class="tiles".*?aria-label="(.*?)">(.*?)</div>', output.html.read_text()
  )
  counts = [(name, tiles.count("<img")) for name, tiles in shown]
  few = [("cat", 7), ("dog", 7), ("2", 6)]
  assert counts == (few if kind == "named" else [("pictures", 20)])


class Counted(pictures.Array):
  """Pictures that note how many of them were read."""

  read_at_all = 0

  def read(self, start, stop):
    self.read_at_all += stop - start
    return super().read(start, stop)


def judge(number: int) -> Network:
  """A classifier of three classes."""

  def judged(params, image_BHWC):
    features = apply(params, image_BHWC)["pool"]
    return {"pool": features, "scores": features[:, :3]}

  params = {"w": np.random.default_rng(number).standard_normal((8 * 8 * 3, FEATURES), np.float32)}
  about = {"protocol": "classifier", "weights_sha256": str(number)}
  return Network("classifier", f"FD-J{number}", about, params, judged)


@pytest.mark.parametrize("names", [("a", "b", "c"), ("a", "b")])
def test_class_accuracy_is_of_samples_with_the_judge_s_classes(names, tmp_path):
  network, labels = judge(3), np.arange(23) % 3
  reference = reference_of(pictures.Array(PICTURES), network)
  samples = pictures.Array(PICTURES)
  samples.classes = labels, list(names)
  output, options = Output(tmp_path / "x", "generation"), Options(precision_recall=False)
  found = generation.evaluate(samples, reference, network, output, options=options)
  warnings = json.loads(output.json.read_text())["warnings"]
  if len(names) == 3:
    right = features(network, PICTURES)[:, :3].argmax(1) == labels
    assert found["class_accuracy"] == right.mean()
    assert "<td>Class accuracy</td>" in output.html.read_text()
  else:
    assert "class_accuracy" not in found
    assert "labels of 2 classes, the judge of 3" in warnings[0]


def test_a_second_judge_sees_the_samples_that_the_first_sees(tmp_path):
  """Each says what it says alone; the samples are drawn once."""
  judges, options = (judge(3), judge(4)), Options(precision_recall=False)
  references = [reference_of(pictures.Array(PICTURES), each) for each in judges]
  second = figures.Second(judges[1], references[1])
  samples = 255 - PICTURES // 4

  def drawn(_=None):
    found = Counted(samples)
    found.classes = np.arange(23) % 3, ["a", "b", "c"]
    counted.append(found)
    return found

  counted: list[Counted] = []
  run = functools.partial(generation.evaluate, options=options)
  alone = [
    run(drawn(), reference, each, Output(tmp_path / f"{i}", "generation"))
    for i, (reference, each) in enumerate(zip(references, judges, strict=True))
  ]
  output = Output(tmp_path / "both", "generation")
  both = run(drawn(), references[0], judges[0], output, second=second)
  assert both == alone[0] | {f"second_{name}": x for name, x in alone[1].items()}
  noted = json.loads(output.json.read_text())
  assert noted["second"]["network"] == judges[1].about
  assert "<td>FD-J4</td>" in output.html.read_text()
  (point,) = sweep.sweep(
    {"cfg_scale": [1.0]},
    drawn,
    references[0],
    judges[0],
    Output(tmp_path / "sweep", "sweep"),
    options=options,
    second=second,
  )
  assert point == both | {"cfg_scale": 1.0}
  shown = len(samples)  # on the sheet, for which they are read once more
  assert [x.read_at_all for x in counted] == [23 + shown] * 4


def test_a_new_figure_is_one_entry(network, tmp_path, monkeypatch):
  """It stands in the JSON file and on the page under its own name."""
  entry = Entry("count", "Samples", "", lambda g: float(g.samples.moments["pool"].count), "pcs")
  table = {**figures.FIGURES, "generation": (*figures.FIGURES["generation"], entry)}
  monkeypatch.setattr(figures, "FIGURES", table)
  output, options = Output(tmp_path / "x", "generation"), Options(precision_recall=False)
  reference = reference_of(pictures.Array(PICTURES), network)
  found = generation.evaluate(pictures.Array(PICTURES), reference, network, output, options=options)
  distances = ["fid", "fid_means", "fid_covariances", "sfid", "sfid_means", "sfid_covariances"]
  assert list(found) == [*distances, "inception_score", "count"]
  assert json.loads(output.json.read_text())["figures"]["count"] == 23
  assert "<td>Samples</td><td>23 pcs</td>" in output.html.read_text()


def test_few_samples_are_measured_and_warned_of(network, tmp_path):
  reference = reference_of(pictures.Array(PICTURES), network)
  some = statistics_of(pictures.Array(PICTURES[:5]), network, "samples")
  options = Options(precision_recall=False)
  gathered = figures.Generated(some, reference, network, options)
  assert np.isfinite(figures.compute("generation", gathered)["fid"])
  assert "5 samples are fewer than the 6 features" in gathered.more()["warnings"][0]
  few = reference_of(pictures.Array(PICTURES[:4]), network)
  many = statistics_of(pictures.Array(PICTURES), network, "samples")
  gathered = figures.Generated(many, few, network, options)
  assert "4 reference are fewer" in gathered.more()["warnings"][0]
  with pytest.raises(InputError, match=r"There are 1 pictures \(samples\)"):
    statistics_of(pictures.Array(PICTURES[:1]), network, "samples")


@pytest.mark.parametrize(
  ("count", "options", "message"),
  [
    (MOST_KEPT, Options(bootstrap=2), ""),
    (MOST_KEPT + 1, Options(), "precision and recall take at most 100000: .*recall=false"),
    (10 * MOST_KEPT, Options(precision_recall=False, bootstrap=2), ""),
    (10 * MOST_KEPT + 1, Options(precision_recall=False, infinity=True), "take at most 1000000: "),
    (10 * MOST_KEPT + 1, Options(precision_recall=False), ""),
  ],
)
def test_samples_whose_features_are_too_many_to_keep_are_refused(count, options, message):
  with pytest.raises(InputError, match=message) if message else contextlib.nullcontext():
    generation.check(range(count), options)


def test_a_reference_may_be_statistics_of_its_own_protocol(network, tmp_path):
  own = reference_of(pictures.Array(PICTURES), network)
  about = {"network": network.about, "pictures": {"kind": "array"}}
  moments = {"mu": own.gaussian.mean, "sigma": own.gaussian.cov}
  spatial = {"mu_s": own.spatial.mean, "sigma_s": own.spatial.cov}
  path = npz(tmp_path / "ours.npz", about=np.array(json.dumps(about)), **moments, **spatial)
  some = statistics_of(pictures.Array(PICTURES[:9]), network, "samples")
  options = Options(precision_recall=False)

  def computed(reference):
    return figures.compute("generation", figures.Generated(some, reference, network, options))

  stored = open_reference(str(path), network)
  assert computed(stored) == pytest.approx(computed(own), rel=1e-9)
  about["network"] = {"protocol": "pytorch-fid"}
  other = npz(tmp_path / "other.npz", about=np.array(json.dumps(about)), **moments)
  with pytest.raises(InputError, match=r"was computed by .*pytorch-fid"):
    open_reference(str(other), network)
  for name, changed, message in (
    ("mean", {"mu": np.zeros(4)}, r"mean mu of shape \(4,\).* are 6"),
    ("spatial", {"mu_s": np.zeros(4)}, r"mean mu_s of shape \(4,\).* are 6"),
    ("covariance", {"sigma": -np.eye(6)}, "are not mean and covariance"),
    ("about", {"about": np.array("{")}, "does not say what it is of"),
  ):
    bad = npz(tmp_path / f"{name}.npz", **moments | spatial | changed)
    with pytest.raises(InputError, match=message):
      open_reference(str(bad), network)
  adm = npz(tmp_path / "adm.npz", arr_0=PICTURES, **moments)
  both = open_reference(str(adm), network, keep=True)
  np.testing.assert_allclose(both.features, features(network, PICTURES), rtol=1e-5, atol=1e-5)


def test_pictures_are_the_same_from_npz_folder_and_array(tmp_path):
  for i, picture in enumerate(PICTURES):
    Image.fromarray(picture).save(tmp_path / f"{i:02d}.png")
  file = npz(tmp_path / "x.npz", arr_0=PICTURES, arr_1=np.arange(23))
  for opened in (pictures.open_pictures(str(file)), pictures.open_pictures(str(tmp_path))):
    assert (len(opened), opened.size) == (23, 8)
    np.testing.assert_array_equal(opened.read(20, 23), PICTURES[20:])
    np.testing.assert_array_equal(opened.read(3, 5), PICTURES[3:5])  # backwards
    np.testing.assert_array_equal(pictures.take(opened, [7, 2]), PICTURES[[7, 2]])


def bad_sets(root) -> dict[str, str]:
  for name in ("mixed", "torn", "empty"):
    (root / name).mkdir()
  for side in (8, 9):
    Image.new("RGB", (side, 8)).save(root / "mixed" / f"{side}.png")
  Image.new("RGB", (8, 8)).save(root / "torn" / "a.png")
  (root / "torn" / "b.png").write_bytes((root / "torn" / "a.png").read_bytes()[:40])
  npz(root / "float.npz", arr_0=np.full((3, 8, 8, 3), np.nan, np.float32))
  npz(root / "flat.npz", arr_0=PICTURES[0])
  npz(root / "nothing.npz", other=PICTURES)
  npz(root / "none.npz", arr_0=PICTURES[:0])
  whole = npz(root / "cut.npz", arr_0=PICTURES).read_bytes()
  (root / "cut.npz").write_bytes(whole[: len(whole) // 2])
  return {
    "mixed": "9.png is 9 x 8 and the first picture 8 x 8",
    "torn": r"b\.png",
    "empty": "has no pictures",
    "float.npz": r"holds float32 \(3, 8, 8, 3\); needed is uint8",
    "flat.npz": r"holds uint8 \(8, 8, 3\)",
    "nothing.npz": "is not a file of pictures",
    "none.npz": "has no pictures",
    "cut.npz": "is not a file of pictures",
    "absent.npz": "There is no file",
  }


def read_all(spec: str) -> np.ndarray:
  opened = pictures.open_pictures(spec)
  return opened.read(0, len(opened))


def test_bad_sets_are_named_and_refused(tmp_path):
  for name, message in bad_sets(tmp_path).items():
    with pytest.raises(InputError, match=message):
      read_all(str(tmp_path / name))


def test_nobody_is_told_a_fid_without_inception(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  with pytest.raises(InputError, match=r"give --weights=PATH.*--protocol=efficientnet_lite0"):
    load_network("adm")
  with pytest.raises(InputError, match="choose one of adm, pytorch-fid"):
    load_network("fid")
  path = npz(tmp_path / "weights.npz", x=np.zeros(3))
  with pytest.raises(InputError, match="No model is known"):
    load_network("adm", str(path))


def test_results_replace_only_results_of_their_kind(tmp_path):
  """And a dot in the name is no suffix."""
  assert Output(tmp_path / "cfg3.5", "generation").json.name == "cfg3.5.json"
  (tmp_path / "samples.json").write_text('{"num_samples": 3}')
  with pytest.raises(InputError, match=r"samples\.json exists and is not an evaluation"):
    Output(tmp_path / "samples", "generation")
  (tmp_path / "old.json").write_text('{"evaluation": "generation"}')
  Output(tmp_path / "old", "generation")
  (tmp_path / "begun.png").touch()
  (tmp_path / "begun.progress").mkdir()
  (tmp_path / "begun.progress" / "evaluation.json").write_text('{"evaluation": "generation"}')
  Output(tmp_path / "begun", "generation")
  with pytest.raises(InputError, match="of this kind"):
    Output(tmp_path / "old", "latents")


def test_samples_of_a_model_are_those_of_launch_sample(pipeline, diffusion, tokenizer):
  drawn = pictures.Sampled(
    diffusion, tokenizer, diffusion.config.sample, count=18, labels="balanced", seed=0
  )
  written, _ = read_samples(pipeline / "samples.npz")
  # Those were drawn in a process that compiles differently: rounding may tip a level.
  assert np.abs(drawn.read(0, 18).astype(int) - written).max() <= 1
  np.testing.assert_array_equal(drawn.read(7, 9), drawn.read(0, 18)[7:9])
  # Another checkpoint takes the program of this one.
  other = dataclasses.replace(diffusion, params=jax.tree.map(lambda x: 1.1 * x, diffusion.params))
  settings, how = diffusion.config.sample, {"count": 18, "labels": "balanced", "seed": 0}
  program = pictures.sampler_of(diffusion, tokenizer, settings, seed=0)
  shared = pictures.Sampled(other, tokenizer, settings, **how, sampler=program).read(0, 3)
  np.testing.assert_array_equal(
    shared, pictures.Sampled(other, tokenizer, settings, **how).read(0, 3)
  )
  assert (shared != drawn.read(0, 3)).any()


def test_latents_are_decoded_by_their_tokenizer(pipeline, tokenizer):
  decoded = pictures.open_pictures(str(pipeline / "latents"))
  store = LatentStore(pipeline / "latents")
  assert (len(decoded), decoded.size) == (len(store), tokenizer.config.data.image_size)
  first = decoded.read(0, 3)
  np.testing.assert_array_equal(decoded.read(1, 3), first[1:])
  original = pictures.own_pictures(tokenizer, held_out=False).read(0, 3)
  near, far = (np.abs(first - x.astype(float)).mean() for x in (original, original[::-1]))
  assert near < far


class FewLatents:
  """Seven latents [2, 1, 3] of two classes, the second with one, and their mirror images."""

  path, manifest, shape, has_posteriors = "few", {}, (2, 1, 3), False
  mean, std, labels = np.zeros(3), np.ones(3), np.array([0, 0, 0, 0, 0, 0, 1])
  latents = np.random.default_rng(2).standard_normal((2, 7, 2, 1, 3)).astype(np.float32)

  def __len__(self):
    return len(self.labels)

  def read(self, records, flips, *, out, noise):
    assert noise is None
    out[:] = self.latents[flips.astype(int), records]


def test_a_class_s_draws_have_its_mean_and_covariance():
  drawn = gaussians._drawn(FewLatents(), np.zeros(20_000, int), seed=0).reshape(-1, 6)
  known = FewLatents.latents[:, :6].reshape(-1, 6)
  spread = np.sqrt(np.diag(np.cov(known.T)))
  assert np.abs((drawn.mean(0) - known.mean(0)) / spread).max() < 0.04
  unlike = (np.cov(drawn.T) - np.cov(known.T)) / np.outer(spread, spread)
  assert np.abs(unlike).max() < 0.06


@pytest.mark.parametrize(
  ("labels", "count", "message"),
  [
    ("balanced", 7, "1 latents of the class 1, and a covariance needs two"),
    ("balanced", 6, "latents of 1 classes; a Gaussian for each needs two or more"),
    ("2", 7, "There is no class 2"),
  ],
)
def test_latents_without_classes_or_with_too_few_have_no_gaussians(labels, count, message):
  store = FewLatents()
  store.labels = store.labels[:count]
  with pytest.raises(InputError, match=message):
    gaussians.Gaussians(store, None, count=4, labels=labels, seed=0)


def test_gaussians_of_classes_are_evaluated_as_samples(network, pipeline, tokenizer, tmp_path):
  """They are the same each time, and the page has a row for each class."""
  store = LatentStore(pipeline / "latents")
  how = {"count": 45, "labels": "balanced", "seed": 0}
  drawn = gaussians.Gaussians(store, tokenizer, **how)
  again = gaussians.Gaussians(store, tokenizer, **how)
  np.testing.assert_array_equal(drawn.read(3, 6), again.read(0, 6)[3:])
  labels, names = drawn.classes
  assert (list(labels[:10]), len(names)) == ([*range(9), 0], 9)
  reference = reference_of(pictures.open_pictures(str(pipeline / "latents")), network)
  output = Output(tmp_path / "gaussians", "generation")
  options = Options(precision_recall=False)
  found = generation.evaluate(drawn, reference, network, output, options=options)
  assert found["fid"] > 0
  noted = json.loads(output.json.read_text())
  assert noted["samples"]["kind"] == "gaussians"
  assert "&amp; Nature" in output.html.read_text()


def test_reconstruction_measures_what_the_tokenizer_makes(tokenizer, tmp_path):
  own = pictures.own_pictures(tokenizer, held_out=True)
  output = Output(tmp_path / "rebuilt", "reconstruction")
  found = reconstruction.evaluate(tokenizer, own, None, output, posterior="mode")
  rebuilt = reconstruction.reconstruct(tokenizer, own.read(0, len(own)))
  squares = np.square(own.read(0, len(own)).astype(float) - rebuilt).mean((1, 2, 3))
  np.testing.assert_allclose(found["psnr"], np.mean(10 * np.log10(255**2 / squares)), rtol=1e-4)
  assert json.loads(output.json.read_text())["exact"] == 0
  again = reconstruction.evaluate(tokenizer, own, None, output, posterior="sample", seed=1)
  assert again["psnr"] != found["psnr"]
  assert json.loads(output.json.read_text())["posterior"] == "sample"


def test_the_console_shows_four_decimals_and_the_unit_of_each_figure(tmp_path, capsys):
  units = {"gini": "± 0.012", "effective_dimensions": "of 48"}
  values = {"gini": 0.25, "effective_dimensions": 1234.56789}
  shown = figures.shown("latents", values, None, "a note", units=units)
  Output(tmp_path / "latents", "latents").write(
    {}, title="T", summary="S", figures=shown, sections=[]
  )
  printed = capsys.readouterr().out
  assert "0.2500 ± 0.012" in printed
  assert "1234.5679 of 48" in printed


def test_a_latent_space_has_its_figures(pipeline, tmp_path):
  output = Output(tmp_path / "space", "latents")
  found = space.evaluate(StoredCells(LatentStore(pipeline / "latents")), output, runs=2, count=60)
  noted = json.loads(output.json.read_text())
  assert len(noted["runs"]) == 2
  assert noted["runs"][0] != noted["runs"][1]
  assert 0 < found["gini"] < 1
  assert 0 < found["normalized_entropy"] <= 1
  assert 1 <= found["effective_dimensions"] <= LatentStore(pipeline / "latents").shape[2]
  assert output.png.is_file()


def test_latents_that_are_not_finite_have_no_figures(pipeline, monkeypatch):
  store = LatentStore(pipeline / "latents")
  monkeypatch.setattr(store, "mean", store.mean * np.nan)
  with pytest.raises(InputError, match=r"not finite; python -m launch\.encode --check="):
    StoredCells(store).draw(10, 0)


def test_a_file_of_cells_has_the_figures_of_a_latent_space(tmp_path):
  """As the reference publishes some: a .pt of one tensor [cells, Z]."""
  values = np.random.default_rng(0).standard_normal((60, 4)).astype(np.float32)
  file = tmp_path / "cells.safetensors"
  save_file({"cells": values}, file)
  found = space.evaluate(open_cells(str(file)), Output(tmp_path / "x", "latents"), runs=1)
  assert abs(found["energy_from_normal"]) < 0.1
  save_file({"cells": values[:9]}, file)
  with pytest.raises(InputError, match=r"shape \[9, 4\]; cells are floating.*least 50"):
    open_cells(str(file))


def test_signal_to_noise_of_the_linear_path():
  curves = space.signal_to_noise(np.array([4.0, 1.0, 0.25]), "Linear")
  times, values = np.array(curves["median"]).T
  np.testing.assert_allclose(values, 2 * np.log10(times / (100 - times)), atol=1e-5)


def test_a_grid_is_read_by_the_types_of_the_settings():
  defaults = {"cfg_scale": 1.0, "num_steps": 250, "method": "euler"}
  grid = sweep.parse_grid(["cfg_scale=1,2.5", "num_steps=10", "method=heun"], defaults)
  assert grid == {"cfg_scale": [1.0, 2.5], "num_steps": [10], "method": ["heun"]}
  for words, message in (
    ([], "at least one"),
    (["cfg=1"], "There are cfg_scale"),
    (["num_steps=1.5"], "num_steps is int"),
    (["cfg_scale=1", "cfg_scale=2"], "once"),
  ):
    with pytest.raises(InputError, match=message):
      sweep.parse_grid(words, defaults)


def test_a_sweep_goes_on_and_finds_the_best_point(network, tmp_path):
  reference = reference_of(pictures.Array(PICTURES), network)
  drawn = []

  def draw(point):
    drawn.append(point)
    dark = np.uint8(PICTURES * (1 - abs(point["cfg_scale"] - 2) / 4))
    return pictures.Array(dark + np.uint8(point["num_steps"]))

  output = Output(tmp_path / "sweep", "sweep")
  options = Options(precision_recall=False)
  run = functools.partial(
    sweep.sweep, reference=reference, network=network, output=output, options=options
  )
  points = run({"cfg_scale": [1.0, 2.0], "num_steps": [1, 0]}, draw)
  assert len(points) == 4
  noted = json.loads(output.json.read_text())
  assert {k: noted["best"][k] for k in ("cfg_scale", "num_steps")} == {
    "cfg_scale": 2.0,
    "num_steps": 0,
  }
  sheets = [tmp_path / name for name in noted["sheets"]]
  assert len({path.read_bytes() for path in sheets}) == 4
  kept = {path: path.stat().st_mtime_ns for path in output.points.iterdir()}
  assert len(run({"cfg_scale": [1.0, 2.0, 3.0], "num_steps": [1, 0]}, draw)) == 6
  assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_a_sweep_over_guides_has_one_of_them_on_the_devices(monkeypatch):
  def load(workdir, task, step, ema):
    config = SimpleNamespace(sample=None)
    return SimpleNamespace(config=config, sha256=str((workdir, step)), on=lambda devices: None)

  def sampler_of(diffusion, tokenizer, settings, seed, guide):
    del diffusion, tokenizer, settings, seed
    made.add(sampler := functools.partial(list, guide))
    return sampler

  made, plain = weakref.WeakSet(), {"cfg_interval_start": 0.0, "internal_scale": 1.0}
  flags = {"workdir": "a", "step": None, "ema": None, "seed": 0, "num_samples": 4, "labels": "all"}
  for module, name, value in (
    (launch.evaluate, "FLAGS", SimpleNamespace(**flags, tokenizer="")),
    (launch.evaluate.folder, "find", lambda source: source),
    (launch.evaluate.restore, "load", load),
    (launch.evaluate.restore, "tokenizer_of", lambda diffusion, _: diffusion),
    (launch.evaluate, "given_settings", lambda diffusion, **x: FrozenConfigDict(plain | x)),
    (launch.evaluate.checks, "check_sampling", lambda *_, **__: None),
    (launch.evaluate, "sampler_of", sampler_of),
    (launch.evaluate, "Sampled", lambda *_, sampler, **__: sampler),
  ):
    monkeypatch.setattr(module, name, value)
  for guide, wanted in (("b", 1), ("", 2)):  # of which one is without guidance
    draw = launch.evaluate._drawer(guide)
    for scale in (1.0, 2.0, 3.0):
      assert draw({"cfg_scale": scale}) is draw({"cfg_scale": scale, "step": 7})
    assert len(made) == wanted


def evaluation(path, kind: str, figures: dict, **more):
  path.write_text(json.dumps({"evaluation": kind, "figures": figures} | more))
  return path


def test_a_frontier_joins_evaluations_of_one_protocol(tmp_path):
  common = {"network": {"protocol": "adm"}, "samples": {"pictures": 9}, "reference": {}}
  pictures = {"listing": "a", "chosen": "b", "pictures": 7, "crop": "center 64 px"}
  shown = {"network": None, "lpips": None, "posterior": "mode", "pictures": pictures}
  words = []
  for name, psnr, fid in (("plain", 20.0, 9.0), ("aligned", 19.0, 5.0)):
    here = shown | {"pictures": pictures | {"source": f"folder:{name}"}}  # the same, elsewhere
    rebuilt = evaluation(tmp_path / f"{name}_r.json", "reconstruction", {"psnr": psnr}, **here)
    drawn = evaluation(tmp_path / f"{name}_g.json", "generation", {"fid": fid}, **common)
    words.append(f"{name}/d16:{rebuilt}:{drawn}")
  output = Output(tmp_path / "frontier", "frontier")
  points = frontier.frontier(words, output, "psnr", "fid")
  assert [list(point.values()) for point in points] == [
    ["plain/d16", 20.0, 9.0],
    ["aligned/d16", 19.0, 5.0],
  ]
  assert output.png.is_file()
  other = evaluation(
    tmp_path / "other.json", "generation", {"fid": 3.0}, **common | {"samples": {"pictures": 8}}
  )
  for bad, message in (
    (f"x:{tmp_path / 'plain_r.json'}:{other}", "other protocols"),
    (f"x:{other}:{other}", "is not what .* reconstruction writes"),
    ("x:y", "is not NAME"),
  ):
    with pytest.raises(InputError, match=message):
      frontier.frontier([words[0], bad], output, "psnr", "fid")
  others = [shown | {key: "x"} for key in ("network", "lpips", "posterior")]
  others += [shown | {"pictures": pictures | {key: "x"}} for key in pictures]
  for given in others:
    path = evaluation(tmp_path / "r.json", "reconstruction", {"psnr": 1.0}, **given)
    with pytest.raises(InputError, match=r"r\.json and .*plain_r\.json are of other protocols"):
      frontier.frontier([words[0], f"x:{path}:{tmp_path / 'plain_g.json'}"], output, "psnr", "fid")


def test_an_extrapolation_finds_the_bias_of_few_samples():
  exact = confidence.extrapolated([(n, 3.0 + 50 / n) for n in (10, 20, 40, 80)])
  np.testing.assert_allclose(exact[:2], [3.0, 50.0], rtol=1e-6)
  drawn = np.random.default_rng(0).standard_normal((2_000, 4))
  reference = Gaussian(np.zeros(4), np.eye(4))
  line = confidence.extrapolated(list(confidence.subset_distances(drawn, reference)))
  moments = Moments()
  moments.update(drawn)
  biased = reference.distance(moments.mean, moments.cov).distance
  assert abs(line.distance) < biased
  resamples = list(confidence.resampled(drawn, reference, 8))
  interval = confidence.interval(biased, resamples)
  assert interval.low < biased < interval.high
  assert 0 < interval.deviation < biased


def test_eight_devices_find_what_one_does(command, tmp_path):
  """By the command, in processes of their own."""
  large = np.repeat(np.repeat(PICTURES, 4, 1), 4, 2)
  samples, reference = (
    npz(tmp_path / f"{name}.npz", arr_0=x) for name, x in (("a", large), ("b", large[:, ::-1] // 2))
  )
  found = []
  for devices in (1, 8):
    output = tmp_path / f"on{devices}"
    done = command(
      "launch.evaluate",
      *("generation", f"--samples={samples}", f"--reference={reference}", f"--output={output}"),
      f"--protocol={EFFICIENTNET}",
      XLA_FLAGS=f"--xla_force_host_platform_device_count={devices}",
    )
    assert done.returncode == 0, done.stderr
    found.append(json.loads(output.with_suffix(".json").read_text())["figures"])
  assert found[0]["fd_efficientnet"] > 1
  assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_a_sweep_of_two_processes_is_that_of_one(command, two_processes, pipeline, tmp_path):
  """Drawn, measured, merged and written together, by several checkpoints of a guide."""
  model = pipeline / "diffusion"
  words = (
    "launch.evaluate",
    *("sweep", f"--workdir={model}", f"--guide={model}", "--num_samples=30", "--num_steps=3"),
    *("--grid=guide_step=4,6", "--cfg_scale=3", f"--reference={pipeline / 'samples.npz'}"),
    f"--protocol={EFFICIENTNET}",
  )
  two_processes(*words, f"--output={tmp_path / 'two'}")
  done = command(*words, f"--output={tmp_path / 'one'}")
  assert done.returncode == 0, done.stderr
  one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
  assert one["points"][0]["fd_efficientnet"] != one["points"][1]["fd_efficientnet"]
  for ours, theirs in zip(one["points"], two["points"], strict=True):
    assert theirs == ours
  assert "30 samples are fewer" in one["warnings"][1]


def test_solvers_are_compared_on_the_same_noise(diffusion, tmp_path):
  """The settings themselves are at distance 0, and more steps of Euler come nearer."""
  settings = FrozenConfigDict(diffusion.config.sample.to_dict() | {"num_steps": 33})
  grid = {"method": ["euler"], "num_steps": [5, 17, 33]}
  output = Output(tmp_path / "solvers", "solvers")
  points = solvers.evaluate(diffusion, settings, grid, output, count=9)
  far, near, same = (point["distance"] for point in points)
  assert same == 0 < near < far < 1
  assert [point["evaluations"] for point in points] == [4, 16, 32]
  assert all(point["distance_95"] >= point["distance"] for point in points)
  assert json.loads(output.json.read_text())["points"] == points
  assert output.png.stat().st_size > 1_000
  with pytest.raises(InputError, match="leap"):
    solvers.evaluate(diffusion, settings, {"method": ["euler", "leap"]}, output)


def test_a_sweep_is_refused_before_its_first_point(command, pipeline, tmp_path):
  for grid, message, *more in (
    ("method=euler,leap", "leap"),
    ("ema=0.77", "keeps averages of decays"),
    ("guide_step=3", "has checkpoints of the steps", f"--guide={pipeline / 'diffusion'}"),
    ("num_steps=3", "There are 3 samples; at least 4 are needed", "--num_samples=3"),
  ):
    done = command(
      "launch.evaluate",
      *("sweep", f"--workdir={pipeline / 'diffusion'}", f"--grid={grid}", "--reference=x.npz"),
      *more,
      *(f"--protocol={EFFICIENTNET}", f"--output={tmp_path / 'x'}"),
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_flags_of_another_evaluation_are_refused(command, tmp_path):
  for words, message in (
    (["latents", "--samples=x.npz"], "--samples; see python -m launch.evaluate latents --help"),
    (["generation", "--samples=a"], "--reference is missing; give --reference=REFERENCE"),
    (["generation", "--samples=a", "--reference=b", "--seed=1"], "--seed does not apply"),
    (["generation", "--gaussians=a", "--reference=b", "--method=heun"], "--method does not apply"),
    (["everything"], "invalid choice: 'everything'"),
  ):
    done = command("launch.evaluate", *words, f"--output={tmp_path / 'x'}")
    assert done.returncode == 2
    assert re.match(f"error: .*{message}", done.stderr), done.stderr


def test_each_evaluation_shows_its_own_flags_alone(command):
  sweep, frontier = (command("launch.evaluate", n, "--help").stdout for n in ("sweep", "frontier"))
  for flag in ("--grid:", "--workdir:", "--protocol:", "--cfg_scale:", "--reference:"):
    assert flag in sweep
    assert flag not in frontier
  assert "--point:" in frontier
  assert "python -m launch.evaluate frontier" in frontier
