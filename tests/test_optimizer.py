"""The schedule, and what the moving average does with it."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import (
  averaged,
  learning_rate,
  make_optimizer,
  mean_gradients,
  start_emas,
  update_emas,
)


def settings(**changes: float) -> FrozenConfigDict:
  plain = {"learning_rate": 0.1, "b1": 0.9, "b2": 0.99, "weight_decay": 0.0, "clip_norm": 0.0}
  return FrozenConfigDict(ConfigDict(plain | {"warmup_steps": 0, "decay_steps": 0} | changes))


@pytest.mark.parametrize(
  ("changes", "expected"),
  [
    ({}, [0.1, 0.1, 0.1, 0.1]),
    ({"warmup_steps": 4}, [0.0, 0.05, 0.1, 0.1]),
    ({"warmup_steps": 2, "decay_steps": 6}, [0.0, 0.1, 0.05, 0.0]),
    ({"decay_steps": 4}, [0.1, 0.05, 0.0, 0.0]),
  ],
)
def test_rate_at_steps_0_2_4_and_6(changes, expected):
  schedule = learning_rate(settings(**changes))
  np.testing.assert_allclose([schedule(step) for step in (0, 2, 4, 6)], expected, atol=1e-7)


def test_a_warm_up_longer_than_the_decay_is_refused():
  with pytest.raises(InputError, match="decay_steps is 5, but the warm-up alone takes 5 steps"):
    make_optimizer(settings(warmup_steps=5, decay_steps=5))


def test_an_optimizer_that_starts_late_is_where_the_schedule_is():
  """Adam's first update is the rate itself: the one of step 3 is half of the first."""
  params = {"w": jnp.ones(3)}
  first = {}
  for start in (0, 3):
    optimizer = make_optimizer(settings(decay_steps=6), step=jnp.int32(start))
    updates, _ = jax.jit(optimizer.update)({"w": jnp.ones(3)}, optimizer.init(params), params)
    first[start] = updates["w"]
  np.testing.assert_allclose(first[0], -0.1, rtol=1e-5)
  np.testing.assert_allclose(first[3], -0.05, rtol=1e-5)


def test_clipping_is_by_the_norm_of_all_gradients():
  """What Adam averages has norm 1, and the directions of the gradients."""
  optimizer = make_optimizer(settings(clip_norm=1.0))
  params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
  state = optimizer.init(params)
  _, state = optimizer.update({"a": jnp.full(1, 3.0), "b": jnp.full(1, 4.0)}, state, params)
  (adam,) = [
    s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")
  ]
  np.testing.assert_allclose([adam.mu["a"][0], adam.mu["b"][0]], [0.06, 0.08], rtol=1e-5)


def test_muon_steps_every_matrix_of_every_block_by_itself():
  """By the formulas, one matrix at a time; all other parameters step as without it."""
  shapes = {"qkv": (2, 8, 24), "w12": (2, 8, 20), "w3": (2, 10, 8), "adaLN_modulation": (2, 8, 48)}
  pieces = {"qkv": 3, "w12": 2, "w3": 1, "adaLN_modulation": 6}

  def tree(name):
    matrices = {x: {"kernel": procedural.normal(name + x, shape)} for x, shape in shapes.items()}
    rest = {"bias": procedural.normal(name, (2, 8)), "kernel": procedural.normal(name, (8, 8))}
    return jax.tree.map(jnp.asarray, {"blocks": matrices | {"norm": rest}, "embedder": rest})

  params, gradients = tree("params"), [tree("first"), tree("second")]
  ends = []
  for changes in ({}, {"muon": True}):
    optimizer = make_optimizer(settings(weight_decay=0.1, clip_norm=1.0, **changes))
    state, update, end = optimizer.init(params), jax.jit(optimizer.update), params
    for grads in gradients:
      updates, state = update(grads, state, end)
      end = optax.apply_updates(end, updates)
    ends.append(end)
  for place in (["blocks", "norm"], ["embedder"]):
    adam, ours = (functools.reduce(dict.get, place, end) for end in ends)
    jax.tree.map(np.testing.assert_array_equal, ours, adam)
  norms = [float(optax.tree.norm(grads)) for grads in gradients]
  for name, count in pieces.items():
    start, *grads, last = (x["blocks"][name]["kernel"] for x in (params, *gradients, ends[1]))
    clipped = [grad / norm for grad, norm in zip(grads, norms, strict=True)]
    for layer in range(2):
      parts = [np.split(np.float64(x[layer]), count, axis=1) for x in (start, last, *clipped)]
      for w, found, *given in zip(*parts, strict=True):
        average = np.zeros_like(w)
        for g in given:
          average = 0.95 * average + g
          step = 0.2 * max(w.shape) ** 0.5 * newton_schulz(g + 0.95 * average)
          w = w - 0.1 * (step + 0.1 * w)
        np.testing.assert_allclose(found, w, rtol=1e-4, atol=1e-5)


def newton_schulz(x):
  x = x / np.linalg.norm(x)
  for _ in range(5):
    square = x @ x.T
    x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
  return x


def test_emas_move_by_their_shares():
  emas = update_emas(start_emas({"w": jnp.zeros(2)}, (0.9, 0.5)), {"w": jnp.ones(2)})
  np.testing.assert_allclose(emas["0.9"]["w"], 0.1, rtol=1e-6)
  np.testing.assert_allclose(emas["0.5"]["w"], 0.5, rtol=1e-6)


def test_inference_uses_the_first_average_or_the_parameters():
  state = SimpleNamespace(params="params", ema={"0.5": "half", "0.9": "nine tenths"})
  assert averaged(settings(ema_decays=(0.9, 0.5)), state) == "nine tenths"
  assert averaged(settings(ema_decays=()), state) == "params"


@pytest.mark.parametrize("count", [2, 6])
def test_gradients_in_parts_are_those_of_the_whole(count):
  def loss_fn(params, batch):
    error = (batch["x"] @ params - batch["y"]) ** 2
    return jnp.mean(error), {"size": jnp.mean(jnp.abs(batch["y"]))}

  key = jax.random.split(jax.random.key(0), 3)
  batch = {"x": jax.random.normal(key[0], (12, 3)), "y": jax.random.normal(key[1], (12,))}
  params = jax.random.normal(key[2], (3,))
  whole, parts = (
    jax.jit(functools.partial(mean_gradients, loss_fn, count=c))(params, batch) for c in (1, count)
  )
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), whole, parts)
