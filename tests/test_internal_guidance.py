"""The early head: without it nothing changes; its loss, guidance and weights; a whole training."""

from __future__ import annotations

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from configs import quickstart
from launch import restore
from launch.engine.writers import read_metrics
from launch.sample import make_sampler
from launch.train import train
from lightningdit_jax import Pipeline, checks, convert, sampling, training, warm_start
from lightningdit_jax.internal_guidance import extrapolated
from lightningdit_jax.model import LightningDiT
from tests import cases
from tests.reference import procedural
from vavae_jax.common import functional, mesh
from vavae_jax.common.errors import InputError

TINY = {"in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10}


def params(seed=0, **changes):
  return jax.jit(lambda key: functional.init(functools.partial(build, changes), key))(
    jax.random.key(seed)
  )


def build(changes, rngs):
  return LightningDiT(**(TINY | changes), rngs=rngs)


def awake(**changes) -> LightningDiT:
  return cases.random_weights(functional.abstract(functools.partial(build, changes)))


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
  x = jnp.asarray(procedural.normal("x", (3, 4, 6, TINY["in_channels"])))
  return x, jnp.array([0.1, 0.5, 0.9]), jnp.array([0, 5, 10])


def test_the_other_weights_begin_as_without_it():
  plain, headed = params(), params(early_head=2)
  early = headed.pop("early_layer")
  jax.tree.map(np.testing.assert_array_equal, headed, plain)
  # Unlike the last head, which is zero.
  kernel = early["linear"]["kernel"]
  assert jnp.abs(kernel).max() == pytest.approx((6 / (32 + 3)) ** 0.5, rel=0.1)


@pytest.mark.parametrize("early_head", [1, 2])
def test_the_early_head_is_the_last_one_of_a_model_that_ends_there(early_head):
  """And the last one is what it is without, to the bit."""
  model = awake(early_head=early_head)
  early, last = model.both(*inputs())
  np.testing.assert_array_equal(last, awake()(*inputs()))
  short = awake(depth=early_head)
  state = nnx.to_pure_dict(nnx.state(model))
  state["final_layer"] = state.pop("early_layer")
  state["blocks"] = jax.tree.map(lambda w: w[:early_head], state["blocks"])
  ended = nnx.merge(nnx.graphdef(short), state)
  cases.assert_near(early, ended(*inputs()), 1e-6)


def test_the_step_traces_what_it_traced_where_there_is_no_head():
  """Whatever the keys of the option are."""

  def traced(**changes):
    config = quickstart.diffusion(tiny=True)
    config.update_from_flattened_dict(changes)
    frozen = FrozenConfigDict(config)
    params = jax.eval_shape(functools.partial(training.init_state, frozen), jax.random.key(0))
    latent = jnp.zeros((4, 4, 4, 48))
    batch = (latent, latent, jnp.zeros(4), jnp.zeros(4, jnp.int32))
    return str(jax.make_jaxpr(functools.partial(training.losses, frozen))(params.params, *batch))

  plain = traced()
  assert traced(**{"transport.early_weight": 3.0, "sample.internal_until": 0.3}) == plain
  assert " cond[" not in plain
  assert " cond[" in traced(**{"model.early_head": 1})


def test_the_backward_pass_keeps_as_many_token_streams_with_the_head_as_without():
  """One each block; the head reads again what it needs, and the weights are not copied in parts."""
  kept = {}
  for early_head in (0, 1):
    graph, weights = nnx.split(awake(early_head=early_head, use_checkpoint=True))

    def loss(weights, graph=graph, early_head=early_head):
      model = nnx.merge(graph, weights)
      outputs = model.both(*inputs()) if early_head else [model(*inputs())]
      return sum(jnp.sum(x**2) for x in outputs)

    equations = jax.make_jaxpr(jax.grad(loss))(weights).eqns
    forward, *_ = (e for e in equations if e.primitive.name == "scan")
    kept[early_head] = [v.aval.shape for v in forward.outvars if v.aval.shape[-1:] == (32,)]
    assert len([e for e in equations if e.primitive.name == "scan"]) == 2  # and the backward pass
  assert kept[0] == kept[1][-len(kept[0]) :] == [(3, 24, 32), (3, 3, 24, 32)]


def test_the_loss_has_a_weighted_part_of_the_early_head():
  config = quickstart.diffusion(tiny=True)
  config.model.early_head, config.transport.early_weight = 1, 0.25
  config.accumulate_steps = 1
  frozen = FrozenConfigDict(config)
  state = jax.jit(functools.partial(training.init_state, frozen))(jax.random.key(0))
  latent, noise = (procedural.normal(name, (8, 4, 4, 48)) for name in ("latent", "noise"))
  t_B, label_B = jnp.linspace(0.1, 0.9, 8), jnp.arange(8)
  build = training.build_model(frozen)
  x = t_B[:, None, None, None] * latent + (1 - t_B[:, None, None, None]) * noise
  early, _ = nnx.merge(functional.graph_of(build), state.params).both(x, t_B, label_B)
  new, metrics = jax.jit(functools.partial(training.update, frozen))(
    state, latent, noise, t_B, label_B
  )
  by_hand = np.mean((np.asarray(early) - (latent - noise)) ** 2)
  assert metrics["early_mse"] == pytest.approx(by_hand, rel=1e-5)
  total = metrics["mse"] + metrics["cosine"] + 0.25 * metrics["early_mse"]
  assert metrics["loss"] == pytest.approx(float(total), rel=1e-6)
  # The last head is zero at first, so that what is before it moves by the early one.
  for name in ("x_embedder", "early_layer"):
    assert all(jnp.abs(x).max() > 0 for x in jax.tree.leaves(new.optimizer[0].mu[name])), name


class Two:
  """Stands for a model whose last head says its label, and the early one half of it."""

  def __init__(self):
    self.asked = []

  def both(self, x, t, label):
    self.asked.append(len(x))
    last = jnp.broadcast_to(label[:, None, None, None].astype(jnp.float32), x.shape)
    return last / 2, last


def test_guidance_by_hand():
  """early + w (last - early) of each label, then classifier-free guidance between the two."""
  x, label, model = jnp.zeros((2, 1, 1, 4)), jnp.array([4, 6]), Two()
  guide = extrapolated(model, 3.0, 0.5)
  value = guide(x, jnp.array([0.5, 0.6]), label)
  np.testing.assert_allclose(value[:, 0, 0, 0], [2 + 3 * 2, 6])
  both = sampling.guided(guide, label, 10, cfg_scale=2.0, cfg_interval_start=0.3, cfg_channels=3)
  # 8 of the label 4, 20 of the null label 10; the last channel and early times lack the latter.
  np.testing.assert_allclose(both(x, jnp.float32(0.4))[0, 0, 0], [-4, -4, -4, 8])
  np.testing.assert_allclose(both(x, jnp.float32(0.2))[0, 0, 0], [8] * 4)
  np.testing.assert_allclose(both(x, jnp.float32(0.7))[0, 0, 0], [-2, -2, -2, 4])
  assert extrapolated(model, 1.0, 0.5) is model


def test_weights_go_to_the_authors_names_and_back():
  model = awake(early_head=2)
  there = convert.to_torch(model)
  names = {name for name in there if name.startswith("final_layer_xr.")}
  assert names == {name.replace("final_layer.", "final_layer_xr.") for name in there} & names
  assert len(names) == 5
  back = convert.from_torch(there, **(TINY | {"early_head": 2}))
  jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))
  with pytest.raises(InputError, match=r"unknown: final_layer_xr\.adaLN"):
    convert.from_torch(there, **TINY)


@pytest.mark.parametrize("share", [0.01, 0.997])
def test_a_file_does_not_say_which_block_but_how_small_its_positions_are(share):
  """The authors' optimizer decays them by a millionth or two a step."""
  tensors = convert.to_torch(awake(depth=10, early_head=8, position_scale=share))
  found = convert.arguments_of(tensors)
  assert found["early_head"] == 8
  assert found["position_scale"] == pytest.approx(share, rel=1e-5)
  model = convert.from_torch(tensors, **found)
  cases.assert_near(model(*inputs()), awake(depth=10, position_scale=share)(*inputs()), 1e-6)
  assert np.abs(model(*inputs()) - awake(depth=10)(*inputs())).max() > (1 - share) / 100
  few = convert.to_torch(awake(early_head=2))
  with pytest.raises(InputError, match=r"3 blocks.*early_head.*init_from"):
    convert.arguments_of(few)
  assert convert.arguments_of(convert.to_torch(awake()))["early_head"] == 0


@pytest.mark.parametrize("there", [0, 2])
def test_initial_weights_may_lack_the_head_or_have_one_too_many(there):
  given, fresh = params(1, early_head=there), params(early_head=2 - there)
  taken, notes = warm_start.adapt(fresh, given)
  assert len(notes) == 1
  assert ("starts afresh" in notes[0]) == (there == 0)
  if there == 0:
    early = taken.pop("early_layer")
    jax.tree.map(np.testing.assert_array_equal, early, fresh["early_layer"])
  given.pop("early_layer", None)
  jax.tree.map(np.testing.assert_array_equal, taken, given)


@pytest.mark.parametrize("early_head", [0, 1])
def test_a_pytorch_file_is_a_beginning_with_or_without_the_head(early_head):
  given = convert.to_torch(awake(early_head=2))
  options = {"class_dropout_prob": 0.1} | TINY | {"early_head": early_head}
  found = warm_start.from_state_dict(given, options)
  taken, notes = warm_start.adapt(params(early_head=early_head), found)
  assert ("early_layer" in taken) == bool(early_head)
  assert len(notes) == (not early_head)


def test_guidance_without_the_head_and_a_head_behind_the_last_block_are_refused():
  config = quickstart.diffusion(tiny=True)
  config.sample.internal_scale = 1.4
  with pytest.raises(InputError, match=r"internal_scale is 1\.4, but the model has no early head"):
    checks.check_sampling(FrozenConfigDict(config.sample), FrozenConfigDict(config))
  config.update_from_flattened_dict({"model.early_head": 1, "sample.routed": 0.5})
  with pytest.raises(InputError, match="internal_scale is for samples with all tokens"):
    checks.check_sampling(FrozenConfigDict(config.sample), FrozenConfigDict(config))
  with pytest.raises(InputError, match="early_head=3 must be below depth=3"):
    awake(early_head=3)


def test_it_trains_resumes_travels_and_samples(pipeline, tokenizer, tmp_path):
  config = quickstart.diffusion(tiny=True)
  config.latents.path = str(pipeline / "latents")
  config.latents.valid_path, config.latents.valid_samples = config.latents.path, 16
  config.model.early_head, config.num_steps, config.evaluate_every_steps = 1, 4, 4
  config.keep_checkpoints = 3
  config.sample.update(internal_scale=1.5, internal_until=0.8, cfg_scale=1.5)
  whole = train(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  resumed = train(config, tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)

  diffusion = restore.load(tmp_path / "run", "diffusion")
  told = {name for line in read_metrics(tmp_path / "run") for name in line}
  assert told >= {"early_mse", *training.figures(diffusion.config)}
  restore.for_use(diffusion, tokenizer).save(tmp_path / "model")
  pipe = Pipeline.load(tmp_path / "model")
  index, label = np.arange(3), np.array([1, 4, 4])
  space = restore.space_of(diffusion)
  drawn = {}
  for scale in (1.5, 1.0):
    settings = pipe.settings(internal_scale=scale)
    run = make_sampler(diffusion.config, space, tokenizer, settings, 0, mesh.make_mesh())
    drawn[scale] = run(diffusion.params, index, label).astype(int)
    pictures = pipe.sample(label.tolist(), internal_scale=scale, progress=False)
    assert np.abs(np.stack(pictures).astype(int) - drawn[scale]).max() <= 1
  assert np.abs(drawn[1.5] - drawn[1.0]).max() > 1
