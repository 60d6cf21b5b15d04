"""PatchGAN against the reference case, and what its running statistics do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import cases
from tests.reference import procedural
from vavae_jax.common import functional
from vavae_jax.convert import discriminator_from_torch, discriminator_to_torch
from vavae_jax.discriminator import PatchDiscriminator

IMAGE = procedural.normal("image", (3, 16, 20, 3))


def tiny(**kwargs) -> PatchDiscriminator:
  sizes = {"ndf": 4, "n_layers": 2} | kwargs
  return cases.random_weights(functional.abstract(lambda r: PatchDiscriminator(**sizes, rngs=r)))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_logits_and_statistics_match_reference(mode):
  _, weights, expected = cases.load("patchgan")
  model = discriminator_from_torch(weights)
  image = np.tanh(cases.nhwc(procedural.normal("disc_x", (2, 3, 64, 64))))
  logits = model(jnp.asarray(image), train=mode == "train")
  cases.assert_near(logits, cases.nhwc(expected[mode]), 1e-5)
  after = discriminator_to_torch(model)
  running = [name for name in weights if "running" in name]
  assert running
  for name in running:
    then = weights[name] if mode == "eval" else expected[f"running/{name}"]
    cases.assert_near(after[name], then, 1e-6)


def test_statistics_come_out_of_a_differentiated_step():
  """As training uses it: merged, called and taken apart inside jit and grad."""
  graph, *states = nnx.split(tiny(), nnx.Param, nnx.BatchStat)
  params, statistics = map(nnx.to_pure_dict, states)

  @jax.jit
  def step(params, statistics, image):
    def loss(params):
      model = nnx.merge(graph, params, statistics)
      return model(image, train=True).mean(), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    return jax.grad(loss, has_aux=True)(params)

  gradient, updated = step(params, statistics, IMAGE)
  assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
  assert jax.tree.structure(statistics) == jax.tree.structure(updated)
  for old, new in zip(jax.tree.leaves(statistics), jax.tree.leaves(updated), strict=True):
    assert not jnp.allclose(old, new)


def test_groups_are_judged_as_batches_of_their_own():
  graph, *states = nnx.split(tiny(bn_group=2), nnx.Param, nnx.BatchStat)
  states = list(map(nnx.to_pure_dict, states))
  image = procedural.normal("groups", (4, 16, 20, 3))
  grouped = nnx.merge(graph, *states)
  logits = grouped(image, train=True)
  alone = []
  for i in (0, 2):
    whole = nnx.merge(nnx.graphdef(tiny()), *states)
    cases.assert_near(logits[i : i + 2], whole(image[i : i + 2], train=True), 1e-5)
    alone.append(whole.layers[1].norm.mean[...])
  cases.assert_near(grouped.layers[1].norm.mean[...], sum(alone) / 2, 1e-5)


def test_an_image_is_judged_by_itself_in_evaluation():
  model = tiny()
  logits = model(IMAGE, train=False)
  assert logits.shape == (3, 2, 3, 1)
  cases.assert_near(model(IMAGE[1:2], train=False), logits[1:2], 1e-5)


def test_bfloat16_stays_near_float32():
  exact, rounded = (tiny(dtype=dtype)(IMAGE, train=True) for dtype in (jnp.float32, jnp.bfloat16))
  assert rounded.dtype == jnp.float32
  cases.assert_near(rounded, exact, 0.05)


def test_images_too_small_are_refused():
  with pytest.raises(ValueError, match=r"n_layers=2, which needs 12 x 12 pixels"):
    tiny()(jnp.zeros((3, 11, 20, 3)), train=False)
