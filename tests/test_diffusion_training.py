"""The diffusion task's step: the reference's own first steps, and what it draws at random."""

from __future__ import annotations

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from configs import base, quickstart
from lightningdit_jax import checks, convert, sampling, training, validation
from lightningdit_jax.model import build_model
from lightningdit_jax.store import fetching
from tests import cases
from tests.reference import procedural
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import make_optimizer, start_emas
from vavae_jax.common.sharding import BATCH_AXES


@pytest.mark.parametrize("name", ["dit_default", "dit_variant"])
def test_three_steps_are_those_of_the_reference(name):
  """AdamW behind clipping, and the EMA behind AdamW."""
  spec, weights, expected = cases.load(name)
  config = base.diffusion()
  config.dtype = "float32"
  config.model.update(spec["config"])
  config.optimizer.update(learning_rate=1e-3, b2=0.95, clip_norm=1.0, ema_decays=(0.9, 0.5))
  graph, params = nnx.split(convert.from_torch(weights, **spec["config"]))
  state = start(FrozenConfigDict(config), nnx.to_pure_dict(params))
  step = jax.jit(functools.partial(training.update, FrozenConfigDict(config)))
  shape, num_labels = expected["forward"].shape, spec["config"]["num_classes"] + 1
  for i in range(3):
    latent, noise = (cases.nhwc(procedural.normal(f"{end}_{i}", shape)) for end in ("x1", "x0"))
    label_B = (3 * np.arange(len(latent)) + i) % num_labels
    state, metrics = step(state, latent, noise, procedural.uniform(f"t_{i}", shape[:1]), label_B)
    losses = [metrics["mse"], metrics["cosine"]]
    np.testing.assert_allclose(losses, expected["losses"][i], rtol=1e-5)
  assert state.step == 3
  for kind, tree in (("param", state.params), ("ema", state.ema["0.9"])):
    actual = convert.to_torch(nnx.merge(graph, tree))
    for key in weights:
      # Without RoPE softmax ignores the key norm's bias: Adam magnifies what rounding leaves of a
      # gradient, to a part of its learning rate of 1e-3.
      ignored = key.endswith("k_norm.bias")
      cases.assert_near(actual[key], expected[f"{kind}/{key}"], 1e-3 if ignored else 1e-4)
    model = nnx.merge(graph, tree)
    x = jnp.asarray(cases.nhwc(procedural.normal("x", shape)))
    after = jax.jit(model)(x, procedural.uniform("t", shape[:1]), jnp.asarray(spec["inputs"]["y"]))
    name_after = {"param": "forward_after", "ema": "forward_ema_after"}[kind]
    cases.assert_near(after, cases.nhwc(expected[name_after]), 1e-4)


def start(config: FrozenConfigDict, params: Any) -> training.State:
  """A training's first state around given parameters."""
  return training.State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=start_emas(params, config.optimizer.ema_decays),
    optimizer=make_optimizer(config.optimizer).init(params),
  )


def tiny(**changes: float) -> FrozenConfigDict:
  """The tiny quickstart's configuration, with some keys of its parts, "a.b", changed."""
  config = quickstart.diffusion(tiny=True)
  config.update_from_flattened_dict(changes)
  return FrozenConfigDict(config)


def drawn(config: FrozenConfigDict, count: int, key: int = 0) -> tuple[np.ndarray, ...]:
  """What one training step draws: noise at one place, times, labels."""
  batch = {"latent": jnp.zeros((count, 4, 4, 48)), "label": jnp.full(count, 3)}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training, "update", lambda config, state, latent, *drawn: drawn[:3])
    draw = functools.partial(training.train_step, config, training.phase(config, 1), None, {})
    noise, t_B, label_B = jax.jit(draw)(batch, jax.random.key(key))
  return np.asarray(noise[:, 0, 0, 0]), np.asarray(t_B), np.asarray(label_B)


def test_labels_are_dropped_at_the_given_rate():
  config = tiny()
  *_, label_B = drawn(config, 4000)
  dropped_B = label_B == config.model.num_classes
  assert (label_B[~dropped_B] == 3).all()
  # Four standard deviations of 4,000 draws with probability 0.1.
  assert dropped_B.mean() == pytest.approx(config.model.class_dropout_prob, abs=0.019)
  *_, label_B = drawn(tiny(**{"model.class_dropout_prob": 0.0}), 100)
  assert (label_B == 3).all()


def test_draws_follow_the_key_and_not_each_other():
  first, again, other = (drawn(tiny(), 4000, key) for key in (1, 1, 2))
  for a, b, c in zip(first, again, other, strict=True):
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
  # Four standard deviations of a correlation over 4,000 draws.
  assert np.abs(np.corrcoef(first) - np.eye(3)).max() < 4 / 4000**0.5


def test_loss_falls_on_one_batch():
  """With the direction loss off, so that all of it is the mean squared error; traced once."""
  config = tiny(
    **{
      "optimizer.learning_rate": 3e-3,
      "optimizer.decay_steps": 0,
      "transport.use_cosine_loss": False,
    }
  )
  state = jax.jit(functools.partial(training.init_state, config))(jax.random.key(0))
  latent, noise = (procedural.normal(name, (8, 4, 4, 48)) for name in ("latent", "noise"))
  chex.clear_trace_counter()
  step = jax.jit(chex.assert_max_traces(lambda *args: training.update(config, *args), n=1))
  losses = []
  for _ in range(30):
    state, metrics = step(state, latent, noise, jnp.linspace(0.1, 0.9, 8), jnp.arange(8))
    assert metrics["loss"] == metrics["mse"]
    losses.append(float(metrics["loss"]))
  assert losses[0] == pytest.approx(np.mean((latent - noise) ** 2), rel=1e-5)  # it predicts zero
  assert losses[-1] < 0.6 * losses[0]


def batch_of(count: int) -> dict[str, Any]:
  latent = procedural.normal("latent", (count, 4, 4, 48))
  return {"latent": latent, "label": np.arange(count) % 9}


def fresh(config: FrozenConfigDict) -> training.State:
  return jax.jit(functools.partial(training.init_state, config))(jax.random.key(0))


def step_of(config: FrozenConfigDict, state: training.State, step: int = 1) -> Any:
  phase = training.phase(config, step)
  train_step = jax.jit(functools.partial(training.train_step, config, phase))
  return train_step(state, {}, batch_of(config.batch_size), jax.random.key(step))


@pytest.mark.parametrize("changes", [{}, {"route.share": 0.5, "route.first": 0, "route.last": 0}])
def test_a_batch_in_parts_makes_the_same_update(changes):
  whole, parts = (tiny(accumulate_steps=count, **changes) for count in (1, 4))
  begin = fresh(whole)
  expected, once = step_of(whole, begin)
  state, told = step_of(parts, begin)
  for name in once:
    assert told[name] == pytest.approx(float(once[name]), rel=1e-5), name
  # Adam's first step is the rate whichever the gradient: compare what it averages.
  for ours, theirs in zip(
    jax.tree.leaves(state.optimizer), jax.tree.leaves(expected.optimizer), strict=True
  ):
    cases.assert_near(ours, theirs, 1e-4, floor=1e-8)


@pytest.mark.parametrize(
  ("path", "prediction"),
  [("Linear", "noise"), ("GVP", "score"), ("VP", "noise"), ("VP", "velocity")],
)
def test_singular_paths_and_predictions_train_and_sample_with_the_default_eps(path, prediction):
  """Where the reference has no eps and fails."""
  changes = {
    "transport.path_type": path,
    "transport.prediction": prediction,
    "transport.use_cosine_loss": prediction == "velocity",
    "transport.loss_weight": "" if prediction == "velocity" else "likelihood",
  }
  config = tiny(**changes)
  checks.check_transport(config.transport)
  state, metrics = step_of(config, fresh(config))
  assert all(np.isfinite(value) for value in metrics.values())
  sample = jax.jit(functools.partial(sampling.sample_latents, config, seed=0, sample=config.sample))
  assert np.isfinite(sample(state.params, jnp.arange(2), jnp.array([0, 8]))).all()


def test_logit_normal_times_and_routes_end_where_the_recipe_says():
  config = tiny(**{"transport.lognorm_until": 5, "route.share": 0.5, "route.until": 6})
  assert [training.phase(config, step) for step in (1, 5, 6, 7)] == [
    "logit-normal, routed",
    "logit-normal, routed",
    "uniform, routed",
    "uniform",
  ]
  assert training.phase(tiny(), 1) == "logit-normal"


def test_validation_losses_are_those_at_fixed_times_of_fixed_noise(pipeline):
  config = tiny(
    **{
      "latents.path": str(pipeline / "latents"),
      "latents.valid_path": str(pipeline / "latents"),
      "latents.valid_samples": 11,
    }
  )
  training.check(config)
  state = fresh(config)
  evaluate = training.evaluators(config)["validation"][1]
  told = evaluate(state)
  assert told == evaluate(state)
  assert {f"validation/{name}" for name in told} == {*training.figures(config)}
  times = [key for key in told if key.startswith("mse_t")]
  assert len(times) == validation.NUM_TIMES
  assert told["mse"] == pytest.approx(np.mean([told[key] for key in times]))
  # A fresh model predicts zero: what is left is the target itself, at every time.
  store = fetching.open_store(config.latents.path, config.latents.cache)
  some = np.linspace(0, len(store) - 1, 11).astype(int).tolist()  # of all classes
  latent = np.stack([(store[i]["latent"] - store.mean) / store.std for i in some])
  noise = sampling.noise_of(validation.SEED, jnp.arange(11), latent.shape[1:])
  assert told["mse"] == pytest.approx(float(np.mean((latent - noise) ** 2)), rel=1e-5)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"transport.loss_weight": "velocity"}, "loss of a velocity has no weight"),
    ({"transport.prediction": "noise"}, "use_cosine_loss is the direction loss of a velocity"),
    ({"transport.partial_train": (0.5, 0.2)}, "partial_train is"),
    ({"transport.use_lognorm": False, "transport.lognorm_until": 3}, "lognorm_until is 3"),
    ({"sample.method": "rk9"}, "method is 'rk9'; choose one of"),
    ({"sample.mode": "PDE"}, "mode is 'PDE'; choose one of"),
    ({"sample.mode": "SDE", "sample.method": "rk4"}, "method of the SDE is 'rk4'"),
    ({"sample.last_step": "Last"}, "last_step is 'Last'"),
    ({"sample.timestep_shift": -1.0}, "timestep_shift is -1.0"),
    ({"sample.num_steps": 1}, "num_steps is 1"),
    ({"sample.rtol": 0.0}, "rtol is 0.0"),
    ({"sample.cfg_interval_start": -0.1}, r"cfg_interval_start is -0\.1"),
    ({"sample.mode": "SDE", "sample.diffusion_norm": -1.0}, "diffusion_norm is -1"),
    ({"transport.path_type": "VP", "transport.sample_eps": 0.0}, "sample_eps is 0"),
    ({"sample.dtype": "float16"}, "dtype is 'float16'"),
    ({"accumulate_steps": 3}, "accumulate_steps is 3"),
    ({"route.share": 0.5, "route.first": 5}, "first=5 and last=-4 are no stretch of the 2 blocks"),
    ({"sample.routed": 0.5, "route.first": 3}, "first=3 and last=-4 are no stretch"),
    (
      {"sample.guide_routed": 0.5, "route.first": 0, "route.last": 0, "sample.method": "dopri5"},
      "method is 'dopri5', which takes tokens drawn anew .* on a grid: euler, heun,",
    ),
    ({"sample.guide_routed": 0.5, "sample.cfg_scale": 1.0}, r"routed is 0\.5.*cfg_scale is 1"),
    ({"sample.guide_routed": 0.5, "sample.cfg_interval_start": 1.0}, r"cfg_interval_start 1\.0"),
    ({"model.attention": "cudnn"}, "attention is 'cudnn', which needs an NVIDIA GPU"),
    ({"model.attention": "pallas"}, "attention is 'pallas', which needs a TPU"),
  ],
)
def test_settings_that_cannot_work_are_refused_by_name(changes, message):
  with pytest.raises(InputError, match=message):
    checks.check_model(tiny(**changes))


def test_guidance_that_is_switched_off_takes_the_models_own_along():
  own = tiny(**{"sample.guide_routed": 0.5}).sample
  assert checks.changed(own, num_steps=3).guide_routed == 0.5
  assert checks.changed(own, cfg_scale=1.0).guide_routed == 0
  assert checks.changed(own, cfg_scale=1.0, guide_routed=0.3).guide_routed == 0.3


def test_a_guide_that_cannot_be_routed_is_named():
  config = tiny(**{"route.first": 0, "route.last": 0, "sample.guide_routed": 0.5})
  with pytest.raises(InputError, match=r"The guide's config\.route\.first=2 and last=-4"):
    checks.check_sampling(config.sample, config, guide=tiny())


@pytest.mark.parametrize(
  ("platform", "unroll", "named", "attention", "kept"),
  [
    ("cpu", 1, "cudnn", "xla", "costly"),
    ("cpu", 1, "pallas", "xla", "costly"),
    ("tpu", 1, "cudnn", "xla", "attended"),
    ("tpu", 1, "auto", "pallas", "attended"),
    ("gpu", 12, "cudnn", "cudnn", "costly"),
    ("gpu", 12, "pallas", "xla", "costly"),
  ],
)
def test_the_model_follows_the_platform_of_the_mesh(platform, unroll, named, attention, kept):
  """Also of devices that are not here, for which `launch.lab.plan` traces it."""
  config = base.diffusion("LightningDiT-B/1")
  config.model.attention = named
  device = jax.sharding.AbstractDevice("kind", 1, platform)
  mesh = jax.sharding.AbstractMesh((1, 1), BATCH_AXES, abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    model = functional.outline(build_model(FrozenConfigDict(config)), "config.model")
    assert (model.options.scan_unroll, model.blocks.attn.implementation) == (unroll, attention)
    assert model.options.kept == kept
    config.model.update(scan_unroll=3, remat_policy="costly")
    model = functional.outline(build_model(FrozenConfigDict(config)), "config.model")
    assert (model.options.scan_unroll, model.options.kept) == (3, "costly")


def test_sampling_in_float32_on_tpus_rounds_factors_itself_unless_told_otherwise():
  config = base.diffusion("LightningDiT-B/1")
  config.dtype = "float32"
  config = FrozenConfigDict(config)

  def precision(platform, *dtype):
    device = jax.sharding.AbstractDevice("kind", 1, platform)
    mesh = jax.sharding.AbstractMesh((1, 1), BATCH_AXES, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
      model = functional.outline(build_model(config, *dtype), "config.model")
    layer = model.blocks.mlp.w3
    return str(layer.dtype), layer.preferred_element_type, model.blocks.attn.implementation

  assert precision("tpu", "float32") == ("bfloat16", jnp.float32, "pallas")
  as_given = ("float32", None, "xla")
  assert precision("tpu") == precision("cpu", "float32") == precision("gpu", "float32") == as_given
  with jax.default_matmul_precision("highest"):
    assert precision("tpu", "float32") == as_given
