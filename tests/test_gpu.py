"""What only a GPU computes, beside the same by XLA, in float32 or on the CPU.

JAX_PLATFORMS=cuda,cpu .venv/bin/python -m pytest -m gpu
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import FrozenConfigDict

from configs import base
from lightningdit_jax import sampling, training
from lightningdit_jax.attention import attend
from tests.reference import procedural

pytestmark = pytest.mark.gpu
BATCH, SIZE, CHANNELS, CLASSES = 8, 16, 4, 10


def distance(a, b):
  """Relative, of trees."""
  a, b = (
    np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])
    for tree in (a, b)
  )
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("head", [64, 72])  # B/1's and XL/1's
def test_cudnns_attention_rounds_no_worse_than_xlas(head):
  q, k, v, out = (procedural.normal(name, (2, 16, 256, head)) for name in ("q", "k", "v", "out"))

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def run(implementation, dtype):
    def attention(*inputs):
      return attend(*(x.astype(dtype) for x in inputs), implementation).astype(jnp.float32)

    y, pull = jax.vjp(attention, *map(jnp.asarray, (q, k, v)))
    return y, *pull(jnp.asarray(out))

  with jax.default_matmul_precision("highest"):
    exact = run("xla", "float32")
  for ours, fused, wanted in zip(
    run("xla", "bfloat16"), run("cudnn", "bfloat16"), exact, strict=True
  ):
    assert distance(fused, wanted) < max(2 * distance(ours, wanted), 1e-2)


def configuration(**changes) -> FrozenConfigDict:
  config = base.diffusion()
  config.batch_size = BATCH
  config.model.update(input_size=SIZE, in_channels=CHANNELS, hidden_size=128, depth=2, num_heads=2)
  config.model.num_classes = CLASSES
  config.sample.update(num_steps=20, cfg_scale=2.0, cfg_interval_start=0.1)
  config.update_from_flattened_dict(changes)
  return FrozenConfigDict(config)


def start(config):
  """A state whose last layer is not zero, as after some training."""
  state = jax.jit(functools.partial(training.init_state, config))(jax.random.key(0))
  leaves, tree = jax.tree.flatten(state.params)
  noise = [0.05 * procedural.normal(str(i), x.shape) for i, x in enumerate(leaves)]
  params = tree.unflatten([x + n for x, n in zip(leaves, noise, strict=True)])
  return jax.device_get(state.replace(params=params))


def step(config):
  """(losses, how the parameters move) of an update from the same state on the same batch."""
  shape = (BATCH, SIZE, SIZE, CHANNELS)
  latent, noise = (procedural.normal(name, shape) for name in ("latent", "noise"))
  t_B, label_B = np.linspace(0.1, 0.9, BATCH, dtype=np.float32), np.arange(BATCH)
  before = start(config)
  run = jax.jit(functools.partial(training.update, config))
  after, metrics = run(before, latent, noise, t_B, label_B)
  moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after.params, before.params)
  return np.array([metrics["mse"], metrics["cosine"], metrics["grad_norm"]]), moved


def test_a_float32_step_is_the_cpus():
  with jax.default_matmul_precision("highest"):
    losses, moved = step(configuration(dtype="float32"))
    with jax.default_device(jax.devices("cpu")[0]):
      wanted, moved_there = step(configuration(dtype="float32"))
  np.testing.assert_allclose(losses, wanted, rtol=1e-4)
  assert distance(moved, moved_there) < 0.05  # Adam's first step is near to gradients' signs


@pytest.mark.parametrize("attention", ["xla", "cudnn"])
@pytest.mark.parametrize("scan_unroll", [1, 2])  # 2: in a row, the default on GPUs
def test_a_bfloat16_step_stays_near_float32(attention, scan_unroll):
  losses, _ = step(
    configuration(**{"model.attention": attention, "model.scan_unroll": scan_unroll})
  )
  wanted, _ = step(configuration(dtype="float32"))
  np.testing.assert_allclose(losses, wanted, rtol=0.03)


def test_bfloat16_samples_stay_near_float32():
  config = configuration()
  params = start(config).params
  index, label = np.arange(BATCH), np.arange(BATCH)

  def samples(dtype):
    settings = FrozenConfigDict(config.sample.to_dict() | {"dtype": dtype})
    run = functools.partial(sampling.sample_latents, config, seed=0, sample=settings)
    return jax.jit(run)(params, index, label)

  assert distance(samples("bfloat16"), samples("float32")) < 0.05
