"""Tokens led around blocks: the authors' own numbers, and what must not depend on the route."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from configs import base
from lightningdit_jax import convert, routing, sampling
from lightningdit_jax.model import LightningDiT
from tests import cases
from tests.reference import procedural
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError

PLAIN = {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False}


@pytest.fixture(scope="module")
def authors():
  """(what CompVis/tread computed, the same model here, how it ran)."""
  spec, weights, expected = cases.load("tread")
  options = spec["config"] | PLAIN
  return expected, convert.from_torch(weights, **options), spec


def test_predictions_and_gradients_are_the_authors(authors):
  expected, model, spec = authors
  graph, params = nnx.split(model)
  x = jnp.asarray(cases.nhwc(procedural.normal("x", (3, 4, 8, 8))))
  given = (x, procedural.uniform("t", (3,)), jnp.asarray(spec["inputs"]["y"]))
  route = spec["route"]
  stretch = (route["start_layer_idx"], route["end_layer_idx"] + 1)

  def predict(params, kept):
    route = None if kept is None else routing.Route(*stretch, kept)
    return nnx.merge(graph, params)(*given, route)

  cases.assert_near(jax.jit(predict)(params, None), cases.nhwc(expected["plain"]), 1e-5)

  def squares(params, kept):
    predicted = predict(params, kept)
    return jnp.sum(predicted**2), predicted

  grads, predicted = jax.jit(jax.grad(squares, has_aux=True))(params, expected["kept"])
  cases.assert_near(predicted, cases.nhwc(expected["routed"]), 1e-5)
  ours = convert.to_torch(nnx.merge(graph, grads))
  watched = [name for name in expected if name.startswith("grad/")]
  for name in watched:
    cases.assert_near(ours[name.removeprefix("grad/")], expected[name], 1e-4)
  assert len(watched) == 4


def test_guidance_by_routing_is_the_authors(authors):
  """Their time runs from 1 to 0, and the velocity with it; their example drops all labels."""
  expected, model, spec = authors
  settings, null = spec["sampling"], spec["config"]["num_classes"]
  route = spec["route"]
  stretch = (route["start_layer_idx"], route["end_layer_idx"] + 1)

  @jax.jit
  def velocity(x, t, stronger, weaker):
    towards, away = (
      lambda x, t, y, kept=kept: -model(x, 1 - t, y, routing.Route(*stretch, kept))
      for kept in (stronger, weaker)
    )
    guided = sampling.guided(
      *(towards, jnp.full(len(x), null), null),
      **{"cfg_scale": settings["scale"], "cfg_channels": 0, "guide": away},
    )
    return guided(x, t)

  x = jnp.asarray(cases.nhwc(procedural.normal("x", (3, 4, 8, 8))))
  steps = settings["num_steps"]
  for i in range(steps):
    kept = [expected[f"kept_{2 * i + j}"] for j in range(2)]
    assert [ids.shape[1] for ids in kept] == [12, 5]
    x += velocity(x, i / steps, *kept) / steps
  cases.assert_near(x, cases.nhwc(expected["z"]), 1e-5)


@pytest.mark.parametrize(("attention", "width"), [("xla", 16), ("pallas", 128)])
def test_a_route_that_keeps_all_tokens_changes_nothing(attention, width):
  """In whatever order they go through: each has the angles of its own place."""
  options = {"in_channels": 3, "hidden_size": width, "depth": 2, "num_heads": 2, "num_classes": 9}
  options |= {"use_qknorm": True, "mlp_ratio": 1.0, "input_size": 4, "attention": attention}
  build = functools.partial(LightningDiT, **options)
  model = cases.random_weights(functional.abstract(lambda rngs: build(rngs=rngs)))
  graph, params = nnx.split(model)
  x = jax.random.normal(jax.random.key(0), (2, 3, 4, 3))
  order = jnp.asarray([np.random.RandomState(i).permutation(12) for i in range(2)])

  @functools.partial(jax.jit, static_argnums=1)
  def gradients(params, routed):
    def loss(params):
      route = routing.Route(0, 1, order) if routed else None
      return jnp.sum(nnx.merge(graph, params)(x, jnp.array([0.1, 0.9]), jnp.arange(2), route) ** 2)

    return jax.grad(loss)(params)

  near = functools.partial(cases.assert_near, tolerance=1e-4, floor=1e-5)
  jax.tree.map(near, gradients(params, True), gradients(params, False))


def settings(**changes) -> FrozenConfigDict:
  config = base.diffusion()
  config.dtype = "float32"
  model = {"hidden_size": 16, "depth": 3, "num_heads": 2, "num_classes": 9, "in_channels": 4}
  config.model.update(model | {"input_size": 4, "attention": "xla", "scan_unroll": 1})
  config.route.update(first=1, last=-2)
  config.sample.update(num_steps=3, cfg_scale=2.0, cfg_interval_start=0.0, cfg_channels=0)
  config.update_from_flattened_dict(changes)
  return FrozenConfigDict(config)


def test_training_draws_other_tokens_for_every_latent():
  config = settings(**{"route.share": 0.3})
  kept = np.asarray(routing.drawn(config, jax.random.key(0), 200))
  assert kept.shape == (200, 12)  # int(0.3 16) go around
  assert all(len(set(row)) == 12 for row in kept)
  # Each place equally often: within four standard deviations of 200 draws.
  assert np.abs(np.bincount(kept.ravel(), minlength=16) / 200 - 0.75).max() < 0.13
  assert len({tuple(sorted(row)) for row in kept}) > 150


@pytest.mark.parametrize("shares", [(0.25, 0.75), (0.25, 0.0)])
def test_a_routed_sample_is_a_function_of_its_index(shares):
  """Guided by fewer tokens or by the null label; and its tokens are drawn anew at every time."""
  config = settings(**dict(zip(("sample.routed", "sample.guide_routed"), shares, strict=True)))
  build = functools.partial(LightningDiT, **config.model)
  params = nnx.state(cases.random_weights(functional.abstract(lambda rngs: build(rngs=rngs))))
  params = nnx.to_pure_dict(params)

  @jax.jit
  def draw(index):
    return sampling.sample_latents(
      config, params, index, jnp.zeros_like(index), seed=0, sample=config.sample
    )

  some = draw(jnp.arange(4))
  cases.assert_near(draw(jnp.arange(2, 6))[:2], some[2:], 1e-6)
  plain = settings()
  other = sampling.sample_latents(
    plain, params, jnp.arange(4), jnp.zeros(4, jnp.int32), seed=0, sample=plain.sample
  )
  assert np.abs(other - some).max() > 1e-2 * np.abs(some).max()


@pytest.mark.parametrize(("first", "last"), [(3, -1), (1, 0), (0, 3), (0, -4)])
def test_a_route_around_no_blocks_is_refused(first, last):
  route = FrozenConfigDict({"share": 0.5, "first": first, "last": last})
  with pytest.raises(InputError, match=f"first={first} and last={last} are no stretch of the 3"):
    routing.stretch(route, 3)
