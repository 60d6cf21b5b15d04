"""Decoupled MeanFlow: the authors' own numbers, MeanFlow's formula, a map in closed form."""

from __future__ import annotations

import functools
import shutil
from types import SimpleNamespace

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
from launch.studio import content
from launch.train import train
from lightningdit_jax import (
  Pipeline,
  checks,
  convert,
  flow_map,
  sampling,
  training,
  transport,
  warm_start,
)
from lightningdit_jax.model import LightningDiT
from tests import cases
from tests.reference import procedural
from vavae_jax.common import functional, mesh
from vavae_jax.common.errors import InputError
from vavae_jax.common.sharding import BATCH_AXES

PLAIN = {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False}
TINY = {"in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 2, "num_classes": 10}


def settings(**changes) -> FrozenConfigDict:
  config = quickstart.diffusion(tiny=True)
  config.model.dmf_depth, config.transport.use_cosine_loss = 1, False
  config.update_from_flattened_dict(changes)
  return FrozenConfigDict(config)


def params(seed=0, **changes):
  build = functools.partial(
    lambda changes, rngs: LightningDiT(**TINY, **changes, rngs=rngs), changes
  )
  return jax.jit(lambda key: functional.init(build, key))(jax.random.key(seed))


def awake(**changes) -> LightningDiT:
  return cases.random_weights(
    functional.abstract(lambda rngs: LightningDiT(**(TINY | changes), rngs=rngs))
  )


def inputs(channels=3) -> tuple[jax.Array, jax.Array, jax.Array]:
  x = jnp.asarray(procedural.normal("x", (3, 4, 6, channels)))
  return x, jnp.array([0.1, 0.5, 0.9]), jnp.array([0, 5, 10])


@pytest.fixture(scope="module")
def authors():
  """(what kyungmnlee/dmf computed, its weights, arguments of the same model here)."""
  spec, weights, expected = cases.load("dmf")
  return expected, weights, {**spec["config"], **PLAIN, "dmf_depth": spec["dmf_depth"]}


class Reversed:
  """A model whose times run from data to noise, as the authors' do."""

  def __init__(self, model):
    self.model = model

  def __call__(self, x, t, label, end_B=None):
    return -self.model(x, 1 - t, label, end_B=None if end_B is None else 1 - end_B)

  def log_variance(self, t, end):
    return self.model.log_variance(1 - t, 1 - end)


def test_predictions_and_samples_are_the_authors(authors):
  expected, weights, options = authors
  model = convert.from_torch(weights, **options)
  x, label = (
    jnp.asarray(cases.nhwc(procedural.normal("x", (6, 4, 4, 4)))),
    jnp.array([1, 8, 5, 999, 0, 7]),
  )
  t, end = (procedural.uniform(name, (6,)) for name in ("t", "r"))
  predict = jax.jit(lambda x, t, end: model(x, t, label, end_B=end))
  cases.assert_near(predict(x, t, end), cases.nhwc(expected["predicted"]), 1e-5)
  cases.assert_near(model.log_variance(t, end), expected["log_variance"], 1e-5)
  for steps in (1, 3):

    def velocity(x, t, end):
      return flow_map.towards(Reversed(model), end)(x, jnp.full(6, t), label)

    done = jax.jit(
      functools.partial(
        sampling.sample_ode, velocity, num_steps=steps + 1, method="map", timestep_shift=0.0
      )
    )(x)
    cases.assert_near(done, cases.nhwc(expected[f"sample_{steps}"]), 1e-5)


@pytest.mark.parametrize("how", [{}, {"use_checkpoint": True, "scan_unroll": 3}])
def test_losses_and_gradients_are_the_authors(authors, how):
  expected, weights, options = authors
  graph, given = nnx.split(convert.from_torch(weights, **options, **how))
  config = settings(**{"model.num_classes": options["num_classes"]})
  latent = jnp.asarray(cases.nhwc(procedural.normal("x", (6, 4, 4, 4))))
  noise = {name: cases.nhwc(expected[f"noise_{name}"]) for name in ("fm", "mf")}
  t_fm, t_mf, r_mf = (1 - expected[name] for name in ("t_fm", "t_mf", "r_mf"))
  steps = flow_map.Steps(noise["mf"], t_mf, r_mf)

  @functools.partial(jax.jit)
  def gradients(given):
    def loss(given):
      learning, fixed = (
        Reversed(nnx.merge(graph, x)) for x in (given, jax.lax.stop_gradient(given))
      )
      models = flow_map.Networks(learning, fixed, fixed)
      found = flow_map.losses(config, models, latent, noise["fm"], t_fm, expected["label"], steps)
      return jnp.mean(found["cauchy"]), found

    return jax.grad(loss, has_aux=True)(given)

  grads, found = gradients(given)
  size = latent[0].size
  cases.assert_near(found["mse"] * size, expected["fm_loss"], 1e-5)
  cases.assert_near(found["map_mse"] * size, expected["mf_loss"], 1e-5)
  cases.assert_near(found["cauchy"], expected["loss"], 1e-5)
  ours = convert.to_torch(nnx.merge(graph, grads))
  watched = [name for name in expected if name.startswith("grad/")]
  for name in watched:
    cases.assert_near(ours[name.removeprefix("grad/")], expected[name], 1e-4)
  assert len(watched) == 6


def test_a_steps_error_is_that_of_meanflow():
  """The formula of Gsunshine/meanflow, whose t is 1 - t here, with omega=1 and kappa=0.6."""
  config = settings(**{"transport.map_guidance_start": 0.0, "model.num_classes": 10})
  graph, given = nnx.split(awake(dmf_depth=1))
  model = nnx.merge(graph, given)
  x, _, label = inputs()
  noise, label = procedural.normal("noise", x.shape), label.at[2].set(9)
  begin, end = jnp.array([0.1, 0.4, 0.2]), jnp.array([0.3, 0.9, 1.0])
  models = flow_map.Networks(model, model, model)
  flow = (x, noise, begin, label)
  ours = flow_map.losses(config, models, *flow, flow_map.Steps(noise, begin, end))["map_mse"]

  def u_fn(z, t, r, y=label):
    return -model(z, 1 - t, y, end_B=1 - r)

  def of_image(t):
    return t[:, None, None, None]

  t, r, omega, kappa = 1 - begin, 1 - end, 1.0, 0.6
  z = (1 - of_image(t)) * x + of_image(t) * noise
  v_null, v_cond = u_fn(z, t, t, jnp.full(3, 10)), u_fn(z, t, t)
  v = omega * (noise - x) + (1 - omega - kappa) * v_null + kappa * v_cond
  u, du_dt = jax.jvp(u_fn, (z, t, r), (v, jnp.ones(3), jnp.zeros(3)))
  target = v - of_image(t - r) * du_dt
  cases.assert_near(ours, jnp.mean((u - target) ** 2, axis=(1, 2, 3)), 1e-5)


MEAN, DEVIATION = 0.7, 0.3


def exact(x, t, label, end_B=None):
  """The mean velocity of the flow to normal data, which moves each quantile."""
  del label
  t, end = (time[:, None, None, None] for time in (t, t if end_B is None else end_B))

  def deviation(t):
    return jnp.sqrt((1 - t) ** 2 + (t * DEVIATION) ** 2)

  rate = (t * DEVIATION**2 - (1 - t)) / deviation(t) ** 2
  now = MEAN + (x - t * MEAN) * rate
  at_end = end * MEAN + deviation(end) / deviation(t) * (x - t * MEAN)
  apart = jnp.where(end == t, 1.0, end - t)
  return jnp.where(end == t, now, (at_end - x) / apart)


class Exact:
  """A model that knows it, and expects errors of 1."""

  __call__ = staticmethod(exact)
  log_variance = staticmethod(lambda t, end: jnp.zeros_like(t))


def test_a_map_in_closed_form_has_no_error():
  """Where the velocity of each pair is that of the flow; and one that ends elsewhere has one."""
  x, _, label = inputs()
  t, end = jnp.array([0.1, 0.4, 0.8]), jnp.array([0.9, 0.5, 1.0])
  v, t_B111 = exact(x, t, label), t[:, None, None, None]
  latent, noise = x + (1 - t_B111) * v, x - t_B111 * v  # that pass x with this velocity
  losses = functools.partial(
    flow_map.losses, settings(**{"transport.map_guidance": 0.0}), flow_map.Networks(*[Exact()] * 3)
  )
  found = losses(latent, noise, t, label, flow_map.Steps(noise, t, end))
  assert max(found["mse"].max(), found["map_mse"].max()) < 1e-10
  np.testing.assert_allclose(found["cauchy"], np.log(flow_map.CAUCHY), rtol=1e-4)
  other = flow_map.Steps(noise + 1, t, end)
  assert losses(latent, noise, t, label, other)["map_mse"].max() > 1e-2


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_any_number_of_its_steps_gives_the_data(steps):
  noise, _, label = inputs()

  def velocity(x, t, end):
    return flow_map.towards(Exact(), end)(x, jnp.full(3, t), label)

  given = {"num_steps": steps + 1, "method": "map", "timestep_shift": 0.3}
  done = sampling.sample_ode(velocity, noise, **given)
  cases.assert_near(done, MEAN + DEVIATION * noise, 1e-6)


def test_it_begins_as_the_flow():
  """The same weights and one more layer, which is zero; steps of no length are the flow's."""
  headed = params(dmf_depth=2)
  assert not np.any(headed.pop("logvar")["kernel"])
  jax.tree.map(np.testing.assert_array_equal, headed, params())
  model, flow = awake(dmf_depth=2), awake()
  x, t, label = inputs()
  np.testing.assert_array_equal(model(x, t, label), flow(x, t, label))
  cases.assert_near(model(x, t, label, end_B=t), flow(x, t, label), 1e-6)
  config = settings(**{"transport.map_guidance": 0.0})
  noise = procedural.normal("noise", x.shape)
  found = flow_map.losses(
    config, flow_map.Networks(*[model] * 3), x, noise, t, label, flow_map.Steps(noise, t, t)
  )
  predicted = flow(transport.interpolate(x, noise, t), t, label)
  plain = transport.losses(predicted, x, noise, t)["mse"]
  cases.assert_near(found["mse"], plain, 1e-6)
  cases.assert_near(found["map_mse"], plain, 1e-5)


def test_the_first_blocks_see_the_beginning_and_the_others_the_end():
  """A block whose weights are zero changes nothing, whatever it sees."""
  graph, weights = nnx.split(awake(dmf_depth=2))
  x, t, label = inputs()

  def predict(silent, t, end):
    given = nnx.to_pure_dict(weights)
    given["blocks"] = jax.tree.map(lambda w: w.at[np.array(silent)].set(0), given["blocks"])
    return nnx.merge(graph, given)(x, t, label, end_B=end)

  early, late = [0, 1], [2]
  np.testing.assert_array_equal(predict(early, t, t), predict(early, t / 2, t))
  assert jnp.abs(predict(late, t, t) - predict(late, t / 2, t)).max() > 1e-3
  assert jnp.abs(predict(late, t, t) - predict(late, t, 1.0 - 0 * t)).max() > 1e-3  # the last layer


def test_forward_mode_has_attention_of_its_own():
  config = settings(**{"dtype": "bfloat16", "model.attention": "pallas"})
  device = jax.sharding.AbstractDevice("kind", 1, "tpu")
  there = jax.sharding.AbstractMesh((1, 1), BATCH_AXES, abstract_device=device)
  with jax.sharding.use_abstract_mesh(there):
    state = jax.eval_shape(functools.partial(training.init_state, config), jax.random.key(0))
    models = flow_map.networks(config, state.params)
  used = [model.blocks.attn.implementation for model in models]
  assert used == ["pallas", "pallas", "xla"]


def test_steps_are_drawn_with_the_earlier_time_first():
  config = settings()
  steps = flow_map.drawn(config, jax.random.key(0), (4000, 1, 1, 2))
  assert (steps.t_B <= steps.end_B).all()
  assert steps.noise_BhwZ.shape == (4000, 1, 1, 2)
  # Sorted, two independent times have the distribution of both.
  both = np.sort(np.concatenate([steps.t_B, steps.end_B]))
  logits = np.log(both / (1 - both))
  assert logits.mean() == pytest.approx((1.2 - 0.4) / 2, abs=0.05)
  assert logits.var() == pytest.approx(1 + 0.8**2, rel=0.06)


def test_weights_go_to_the_authors_names_and_back():
  model = awake(dmf_depth=2)
  there = convert.to_torch(model)
  assert there["logvar_linear.weight"].shape == (1, 256)
  back = convert.from_torch(there, **TINY, dmf_depth=2)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(back), nnx.state(model))
  with pytest.raises(
    InputError, match=r"logvar_linear\.weight, of a model with dmf_depth.*init_from"
  ):
    convert.arguments_of(there)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_flow_is_a_beginning_and_a_map_is_one_of_a_flow(depth):
  options = {"class_dropout_prob": 0.1} | TINY | {"dmf_depth": depth}
  found = warm_start.from_state_dict(convert.to_torch(awake(dmf_depth=1 - depth)), options)
  taken, notes = warm_start.adapt(params(dmf_depth=depth), found)
  assert len(notes) == 1
  assert ("starts afresh" in notes[0]) == ("logvar" in taken) == bool(depth)


@pytest.mark.parametrize(
  ("changes", "problem"),
  [
    ({"transport.use_cosine_loss": True}, "dmf_depth trains the velocity"),
    ({"transport.path_type": "GVP"}, "dmf_depth trains the velocity"),
    ({"route.share": 0.5}, "dmf_depth trains the velocity"),
    ({"model.class_dropout_prob": 0.0}, "dmf_depth trains the velocity"),
    ({"model.early_head": 1}, "a flow map has no early head"),
    ({"model.dmf_depth": 2}, "dmf_depth=2 must be below depth=2"),
    ({"model.dmf_depth": 0, "sample.method": "map"}, "is 'map', for flow maps"),
    ({"sample.method": "map", "sample.routed": 0.5}, "all their tokens"),
    ({"sample.method": "map", "sample.mode": "SDE"}, "choose one of euler, heun"),
  ],
)
def test_what_a_flow_map_cannot_have_is_refused(changes, problem):
  checks.check_model(settings())
  with pytest.raises(InputError, match=problem):
    checks.check_model(settings(**({"sample.cfg_scale": 1.0} | changes)))


@pytest.mark.parametrize(("depth", "solver"), [(0, "euler"), (1, "map")])
def test_the_studio_offers_steps_of_maps_alone(depth, solver):
  pipe = SimpleNamespace(config=settings(**{"model.dmf_depth": depth}))
  pipe.settings = lambda: SimpleNamespace(method="map")
  assert content.solver_of(pipe) == solver


def test_a_flow_cannot_guide_a_map_by_steps():
  config, flow = settings(**{"sample.method": "map"}), settings(**{"model.dmf_depth": 0})
  checks.check_sampling(config.sample, config, config)
  with pytest.raises(InputError, match=r"and a guide"):
    checks.check_sampling(config.sample, config, flow)
  x, t, label = inputs()
  with pytest.raises(InputError, match="for a model with dmf_depth"):
    awake()(x, t, label, end_B=t)


def test_it_trains_resumes_travels_and_samples(pipeline, tokenizer, tmp_path):
  config = quickstart.diffusion(tiny=True)
  config.latents.path = str(pipeline / "latents")
  config.latents.valid_path, config.latents.valid_samples = config.latents.path, 16
  config.init_from = str(pipeline / "diffusion")
  config.model.dmf_depth, config.transport.use_cosine_loss = 1, False
  config.num_steps = config.evaluate_every_steps = 4
  config.optimizer.learning_rate = 0.05
  config.keep_checkpoints = 3
  config.sample.update(method="map", num_steps=3, timestep_shift=0.0, cfg_scale=1.0)
  whole = train(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
  resumed = train(config, tmp_path / "run")
  jax.tree.map(np.testing.assert_array_equal, resumed, whole)
  assert np.abs(whole.params["logvar"]["kernel"]).max() > 0

  diffusion = restore.load(tmp_path / "run", "diffusion")
  told = {name for line in read_metrics(tmp_path / "run") for name in line}
  assert told >= {"cauchy", "map_mse", *training.figures(diffusion.config)}
  restore.for_use(diffusion, tokenizer).save(tmp_path / "model")
  pipe = Pipeline.load(tmp_path / "model")
  index, label = np.arange(3), np.array([1, 4, 4])
  space, drawn = restore.space_of(diffusion), {}
  for steps, scale in ((1, 1.0), (2, 1.5)):
    chosen = pipe.settings(steps=steps + 1, guidance=scale)
    run = make_sampler(diffusion.config, space, tokenizer, chosen, 0, mesh.make_mesh())
    drawn[steps] = run(diffusion.params, index, label).astype(int)
    pictures = pipe.sample(label.tolist(), steps=steps + 1, guidance=scale, progress=False)
    assert np.abs(np.stack(pictures).astype(int) - drawn[steps]).max() <= 1
  assert np.abs(drawn[1] - drawn[2]).max() > 1
