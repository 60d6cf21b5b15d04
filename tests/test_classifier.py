"""A classifier that judges: what it is, what it learns, and the distance in its features."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from configs.lab import dilemma
from launch import tasks
from launch.engine.step import jit_init
from launch.evaluation.features import load_network
from launch.evaluation.pictures import open_pictures
from vavae_jax import classification
from vavae_jax.common.errors import InputError
from vavae_jax.metrics.classifier import Classifier, Conv


def configuration(pictures, **changes):
  config = dilemma.judge("tiny")
  config.update_from_flattened_dict(
    {"data.source": f"folder:{pictures}", "data.image_size": 16, "optimizer.ema_decays": (0.5,)}
  )
  config.update_from_flattened_dict(changes)
  return FrozenConfigDict(config)


def test_features_are_of_one_picture_and_the_head_is_linear_in_them():
  network = Classifier(num_classes=5, width=8, depth=2, norm_groups=4, rngs=nnx.Rngs(0))
  image = jax.random.uniform(jax.random.key(1), (3, 16, 12, 3), minval=-1)
  run = jax.jit(network.__call__)
  features, logits = run(image)
  assert features.shape == (3, network.feature_size) == (3, 32)
  np.testing.assert_allclose(logits, network.head(features), rtol=1e-5, atol=1e-6)
  among_others, _ = run(image.at[0].multiply(-1))
  np.testing.assert_allclose(among_others[1:], features[1:], rtol=1e-4, atol=1e-5)
  assert np.std(features, axis=0).max() > 1e-3


def test_standardised_filters_do_not_know_their_kernels_mean_and_scale():
  image = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
  conv, changed = (
    Conv(3, 4, 2, standardised=True, dtype=jnp.float32, rngs=nnx.Rngs(0)) for _ in "ab"
  )
  changed.kernel[...] = 3 * conv.kernel[...] + jnp.arange(4)
  np.testing.assert_allclose(changed(image), conv(image), atol=1e-4)
  assert conv(image).shape == (2, 4, 4, 4)


def test_it_learns_to_tell_classes_apart(pictures):
  config = configuration(pictures, **{"batch_size": 32, "optimizer.decay_steps": 0})
  state = jit_init(functools.partial(classification.init_state, config))(jax.random.key(0))
  step = jax.jit(functools.partial(classification.train_step, config, None))
  batch = next(iter(classification.train_data(config, None, 0)))
  losses = []
  for _ in range(20):
    state, metrics = step(state, {}, batch, jax.random.key(0))
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.8 * losses[0]
  assert int(state.step) == 20
  moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), state.params, state.ema["0.5"])
  assert 0 < max(jax.tree.leaves(moved)) < 1
  (_, evaluate) = classification.evaluators(config)["held_out"]
  found = evaluate(state)
  assert [f"held_out/{name}" for name in found] == classification.figures(config)
  assert 0 <= found["accuracy"] <= 1
  assert found["pictures"] == len(classification.selection.share(config.data, held_out=True))


def test_a_shifted_picture_is_a_crop_of_the_reflected_one():
  """Every place is as likely, and pictures of a batch are shifted by their own."""
  pictures = np.random.default_rng(0).integers(256, size=(400, 5, 4, 3), dtype=np.uint8)
  found = np.asarray(classification.shifted(jax.random.key(0), pictures, 1))
  padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), "reflect")
  crops = {(y, x): padded[:, y : y + 5, x : x + 4] for y in range(3) for x in range(3)}
  counts = [(crop == found).all((1, 2, 3)).sum() for crop in crops.values()]
  assert sum(counts) == 400
  assert min(counts) > 400 / 9 / 2


@pytest.mark.parametrize(
  ("changes", "named"),
  [
    ({"model.num_classes": 4}, r"has 9 classes, but config\.model\.num_classes is 4"),
    ({"model.norm_groups": 3}, "norm_groups=3 does not divide width=8"),
    ({"model.patch_size": 3}, "image_size is 16, no multiple of patch_size=3"),
    ({"data.pad": 16}, r"data\.pad is 16; it must be below image_size=16"),
    ({"data.held_out": 0.0}, r"held_out is 0\.0"),
    ({"loss.label_smoothing": 1.0}, r"label_smoothing is 1\.0"),
    ({"batch_size": 1000}, "fewer than one batch"),
  ],
)
def test_what_cannot_be_trained_is_refused(pictures, changes, named):
  with pytest.raises(InputError, match=named):
    classification.check(tasks.frozen(configuration(pictures, **changes)))


def test_it_is_trained_and_judges_by_the_released_commands(command, pictures, tmp_path):
  settings = (
    "--config=configs/lab/dilemma.py:tiny,judge",
    f"--config.data.source=folder:{pictures}",
  )
  judge = tmp_path / "judge"
  done = command("launch.train", *settings, f"--workdir={judge}", "--config.name=Drawn")
  assert done.returncode == 0, done.stderr
  lines = [json.loads(line) for line in (judge / "metrics.jsonl").read_text().splitlines()]
  assert 0 <= lines[-1]["held_out/accuracy"] <= 1
  own = ("--protocol=classifier", f"--weights={judge}", "--image_size=64")
  reference = tmp_path / "reference.npz"
  words = (*own, f"--reference=folder:{pictures}", f"--output={reference}")
  done = command("launch.evaluate", "statistics", *words)
  assert done.returncode == 0, done.stderr
  done = command("launch.evaluate", "statistics", *words)
  assert (done.returncode, "has these statistics already" in done.stdout) == (0, True)
  other = [word.replace("--image_size=64", "--image_size=32") for word in words]
  done = command("launch.evaluate", "statistics", *other)
  assert (done.returncode, "holds something else" in done.stderr) == (2, True)
  network = load_network("classifier", str(judge))
  assert (network.distance, network.sizes) == ("FD-Drawn", {"pool": 32, "scores": 9})
  output = tmp_path / "same"
  words = (*own, f"--samples=folder:{pictures}", f"--reference={reference}", f"--output={output}")
  words += (f"--second_weights={judge}",)
  done = command("launch.evaluate", "generation", *words)
  assert done.returncode == 0, done.stderr
  found = json.loads(output.with_suffix(".json").read_text())["figures"]
  assert abs(found["fd_drawn"]) < 1e-3
  assert abs(found["second_fd_drawn"]) < 1e-3
  assert found["second_class_accuracy"] == found["class_accuracy"]
  opened = open_pictures(f"folder:{pictures}")
  labels = opened.classes[0]
  scores = network.apply(network.params, opened.read(0, len(opened)))["scores"]
  assert found["class_accuracy"] == np.mean(np.argmax(scores, 1) == labels)
  with pytest.raises(InputError, match=r"--weights=WORKDIR of a classifier"):
    load_network("classifier")
