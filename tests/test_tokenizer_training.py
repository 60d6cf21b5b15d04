"""The tokenizer's task: shared backward passes are the weighted sum's gradients; stages; parts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from configs import quickstart
from launch import restore
from launch.engine.checkpoint import save_weights
from launch.engine.step import jit_init
from tests import cases
from vavae_jax import frozen, losses, stages, teachers, training, update, warm_start
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.convert import autoencoder_to_torch
from vavae_jax.data import images
from vavae_jax.stages import Phase
from vavae_jax.tokenizer import Tokenizer

FEATURES = 5
KEY = jax.random.key(7)
PHASES = {"reconstruction": Phase(0, False), "adversarial": Phase(0, True)}


class TinyNetwork(nnx.Module):
  """Two strided convolutions with the interfaces of a teacher and of a perceptual network."""

  stride, feature_size = 16, FEATURES

  def __init__(self, rngs: nnx.Rngs):
    self.fine = nnx.Conv(3, 4, (4, 4), strides=4, rngs=rngs)
    self.coarse = nnx.Conv(4, FEATURES, (4, 4), strides=4, rngs=rngs)

  def __call__(self, image):
    return self.coarse(self.fine(image))

  def features(self, image):
    return [self.fine(image)]

  def distance(self, a, b):
    return losses.feature_distance(a, b)


def configuration(**changes):
  config = quickstart.tokenizer(tiny=True)
  config.model.update(embed_dim=6, z_channels=6, ch=8, ch_mult=(1, 2), norm_groups=4, patch_size=8)
  config.discriminator.update(ndf=4, n_layers=2)
  config.loss.update(kl_weight=1e-2, perceptual_weight=0.3, disc_weight=0.4)
  config.stages.update(vf_weight=(0.7,), cos_margin=(0.1,), distmat_margin=(0.05,))
  config.optimizer.warmup_steps = 0
  config.update_from_flattened_dict(changes)
  return FrozenConfigDict(config)


@pytest.fixture(scope="module")
def network():
  """Stands for teacher and perceptual network: EfficientNet compiles for long."""
  with pytest.MonkeyPatch.context() as patch:
    tiny = TinyNetwork(nnx.Rngs(3))
    patch.setattr(frozen, "_networks", lambda config: {"teacher": tiny, "perceptual": tiny})
    patch.setattr(teachers, "feature_size", lambda name: FEATURES)
    yield tiny


@pytest.fixture(scope="module")
def setting(network):
  """A configuration, its state, and one step of each phase, gradients handed out."""
  config = configuration()
  image = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
  # The update hands out the gradients instead of the parameters.
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(update, "_update_autoencoder", lambda config, state, grads: (state, grads))
    patch.setattr(training, "latent_shape", lambda config: (2, 3, 6))
    state = jit_init(functools.partial(training.init_state, config))(jax.random.key(1))
    steps = {}
    for name, phase in PHASES.items():
      step = jax.jit(functools.partial(training.train_step, config, phase))
      (new, grads), metrics = step(state, training.load_frozen(config), {"image": image}, KEY)
      steps[name] = new, grads, metrics
  return config, state, image, steps


def plain_gradients(config, network, state, image, adversarial):
  """jax.grad of the sum of all losses, the weights from jax.grad at the two last layers."""
  graph = functional.graph_of(update.build_autoencoder(config))
  image = images.to_float(jnp.asarray(image))
  column = {name: config.stages[name][0] for name in stages.COLUMNS}

  def parts(params):
    model = nnx.merge(graph, params["autoencoder"])
    posterior = model.encode(image)
    z = posterior.sample(jax.random.normal(KEY, posterior.mean.shape))
    recon = model.decode(z)
    distance = network.distance(network.features(image), network.features(recon))
    nll = jnp.mean(jnp.abs(image - recon)) + config.loss.perceptual_weight * jnp.mean(distance)
    projected, features = z @ params["projection"]["kernel"], network(image)
    vf = losses.marginal_cosine(projected, features, column["cos_margin"])
    vf += losses.marginal_distance_matrix(projected, features, column["distmat_margin"])
    judge = nnx.merge(
      functional.graph_of(update.build_discriminator(config)),
      state.discriminator,
      state.discriminator_statistics,
    )
    gan = losses.generator(judge(recon, train=True))
    kl = jnp.mean(posterior.kl())
    return {"nll": nll * image[0].size, "kl": kl, "vf": vf, "gan": gan}

  def at(name, side):
    grads = jax.grad(lambda p: parts(p)[name])(state.params)
    return jnp.linalg.norm(grads["autoencoder"][side]["conv_out"]["kernel"])

  weights = {"nll": 1.0, "kl": config.loss.kl_weight}
  weights["vf"] = column["vf_weight"] * at("nll", "encoder") / (at("vf", "encoder") + 1e-4)
  if adversarial:
    gan = at("nll", "decoder") / (at("gan", "decoder") + 1e-4)
    weights["gan"] = config.loss.disc_weight * gan

  def total(params):
    values = parts(params)
    return sum(weight * values[name] for name, weight in weights.items())

  return jax.grad(total)(state.params)


@pytest.mark.parametrize("phase", PHASES)
def test_gradients_are_those_of_the_weighted_sum(setting, network, phase):
  config, state, image, steps = setting
  _, ours, _ = steps[phase]
  oracle = jax.jit(lambda: plain_gradients(config, network, state, image, phase == "adversarial"))()
  # Keys' biases have no gradient but rounding, in units of the whole: softmax sees no constant.
  floor = 1e-6 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(oracle))
  jax.tree.map(lambda a, b: cases.assert_near(a, b, 2e-4, floor), ours, oracle)


def test_discriminator_waits_for_its_phase(setting):
  _, state, _, steps = setting
  for phase, same in (("reconstruction", True), ("adversarial", False)):
    new, _, _ = steps[phase]
    for field in ("discriminator", "discriminator_statistics", "discriminator_optimizer"):
      pairs = zip(
        jax.tree.leaves(getattr(new, field)), jax.tree.leaves(getattr(state, field)), strict=True
      )
      assert all(np.array_equal(a, b) for a, b in pairs) == same, (phase, field)


def test_bfloat16_stays_near_float32(setting):
  _, state, image, steps = setting
  config = configuration(dtype="bfloat16")
  step = jax.jit(functools.partial(training.train_step, config, PHASES["reconstruction"]))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training, "latent_shape", lambda config: (2, 3, 6))
    new, rounded = step(state, training.load_frozen(config), {"image": image}, KEY)
  exact = steps["reconstruction"][2]
  for name in ("nll", "kl", "vf", "perceptual", "vf_weight"):
    assert float(rounded[name]) == pytest.approx(float(exact[name]), rel=2e-2), name
  assert {x.dtype for x in jax.tree.leaves(new.params)} == {jnp.dtype("float32")}


def test_decoder_alone_leaves_the_latents_as_they_are(setting):
  _, state, _, _ = setting
  config = configuration(
    train="decoder",
    init_from="somewhere",
    **{"optimizer.weight_decay": 0.1, "loss.perceptual_weight": 0.0, "data.image_size": 32},
  )
  outline = jax.eval_shape(functools.partial(training.init_state, config), KEY)
  assert set(outline.params) == {"autoencoder"}
  params = {"autoencoder": state.params["autoencoder"]}
  optimizer = training.make_optimizer(config.optimizer).init(params)
  state = dataclasses.replace(state, params=params, ema={}, optimizer=optimizer)
  step = jax.jit(functools.partial(training.train_step, config, Phase(0, False)))
  image = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
  new, metrics = step(state, training.load_frozen(config), {"image": image}, KEY)
  assert "vf" not in metrics
  for name, part in state.params["autoencoder"].items():
    moved = optax.tree.norm(optax.tree.sub(new.params["autoencoder"][name], part)) > 0
    assert moved == (name not in update.ENCODER), name


def test_features_in_the_batch_stand_for_the_teachers(network, monkeypatch):
  def outline(**batch):
    config = configuration()
    state = jax.eval_shape(functools.partial(training.init_state, config), KEY)
    step = functools.partial(training.train_step, config, Phase(0, False))
    image = np.zeros((2, 64, 64, 3), np.uint8)
    return jax.eval_shape(step, state, training.load_frozen(config), {"image": image, **batch}, KEY)

  def refuse(self, image):
    raise AssertionError("the teacher is run")

  monkeypatch.setattr(TinyNetwork, "__call__", refuse)
  with pytest.raises(AssertionError, match="the teacher is run"):
    outline()
  outline(features=np.zeros((2, 4, 4, FEATURES), np.float16))


def test_training_without_a_teacher_has_no_projection():
  config = configuration(**{"teacher.name": ""})
  state = jax.eval_shape(functools.partial(training.init_state, config), jax.random.key(0))
  assert set(state.params) == {"autoencoder"}


THREE = {
  "batch_size": 8,
  "num_steps": 0,
  "stages.epochs": (2.0, 1.0, 0.5),
  "stages.vf_weight": (0.5, 0.1, 0.1),
  "stages.cos_margin": (0.0, 0.0, 0.5),
  "stages.distmat_margin": (0.0, 0.0, 0.25),
  "stages.disc_start": (3, 0, 1),
}


def test_epochs_become_steps():
  config = stages.with_steps(configuration(**THREE), num_images=42)
  assert config.stages.begins == (0, 10, 16)  # 2 and 3 times 42 / 8, rounded
  assert config.num_steps == 18
  shorter = stages.with_steps(configuration(**(THREE | {"num_steps": 7})), num_images=42)
  assert shorter.num_steps == 7


def test_stages_have_their_pictures_whatever_batches_were():
  """Of 42 an epoch: 84, then 42, then 21."""
  sizes = [(0, 8), (6, 4), (8, 2), (8, 16)]  # 48 and 8 pictures, none, then 91
  config = stages.with_steps(configuration(**THREE | {"batch_size": 16}), 42, sizes)
  assert (config.stages.begins, config.num_steps) == ((0, 10, 12), 14)
  assert stages.with_steps(configuration(**THREE), 42, [(0, 8), (17, 4)]).num_steps == 20


def test_phases_cross_the_stages():
  config = stages.with_steps(configuration(**THREE), num_images=42)
  phases = [stages.phase_of(config, step) for step in range(1, 19)]
  # disc_start counts the batches of its stage.
  assert phases == [Phase(0, False)] * 3 + [Phase(0, True)] * 7 + [Phase(1, True)] * 6 + [
    Phase(2, False),
    Phase(2, True),
  ]


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"stages.vf_weight": (0.5,)}, "has 3 stages, but config.stages.vf_weight has 1 values"),
    ({"stages.epochs": (0.0, 0.0, 0.0)}, "num_steps is 0"),
  ],
)
def test_stages_that_make_no_sense_are_refused(changes, message):
  with pytest.raises(InputError, match=message):
    stages.with_steps(configuration(**(THREE | changes)), num_images=42)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"discriminator.n_layers": 4}, r"needs 48 pixels a side: config\.data\.image_size=32\. Give"),
    (
      {"discriminator.n_layers": 3, "equivariance.share": 0.5, "equivariance.scales": (0.5,)},
      r"image_size=32, shrunk by config\.equivariance\.scales to 16",
    ),
  ],
)
def test_a_discriminator_that_would_see_nothing_is_refused(changes, message):
  with pytest.raises(InputError, match=message):
    training.check(configuration(**{"data.image_size": 32} | changes))


def test_initial_weights_are_taken_over_and_another_teachers_projection_is_not():
  fresh = {"autoencoder": {"a": np.zeros(2)}, "projection": {"kernel": np.zeros((2, 3))}}
  given = {"autoencoder": {"a": np.ones(2)}, "projection": {"kernel": np.ones((2, 4))}}
  taken, notes = warm_start.adapt(fresh, given)
  assert taken["autoencoder"]["a"].all()
  assert not taken["projection"]["kernel"].any()
  assert notes == ["the projection to the teacher's features starts afresh"]
  with pytest.raises(InputError, match=r"another autoencoder: a \(\(2,\) here, \(3,\) there\)"):
    warm_start.adapt(fresh, {"autoencoder": {"a": np.ones(3)}})


def test_a_file_of_the_reference_is_a_beginning(setting):
  """With its projection, and what only its training had left aside."""
  config, state, _, _ = setting
  graph = functional.graph_of(update.build_autoencoder(config))
  given = dict(state.params)
  named = autoencoder_to_torch(nnx.merge(graph, given["autoencoder"]))
  named["linear_proj.weight"] = np.asarray(given["projection"]["kernel"]).T[:, :, None, None]
  named["loss.logvar"] = np.zeros(())
  named = {f"module.{name}": value for name, value in named.items()}
  taken, _ = warm_start.adapt(given, warm_start.from_state_dict(named, config.model))
  jax.tree.map(np.testing.assert_array_equal, taken, given)
  named["module.linear_proj.weight"] = np.zeros((5, 6, 3, 3))
  with pytest.raises(InputError, match=r"linear_proj\.weight \(5, 6, 3, 3\) is no finite 1x1"):
    warm_start.from_state_dict(named, config.model)


def test_what_somebodys_own_teacher_trained_is_used_where_nobody_knows_it(tmp_path):
  config = configuration(**{"teacher.name": "mine"})
  with pytest.MonkeyPatch.context() as patch:
    for table in ("FAMILIES", "NAMES", "CHOICES"):
      patch.setattr(teachers, table, list(getattr(teachers, table)))
    teachers.register("mine", lambda image: image[:, ::16, ::16], feature_size=3)
    shapes = jax.eval_shape(functools.partial(training.init_state, config), KEY).params
  params = jax.tree.map(lambda x: np.full(x.shape, 0.5, x.dtype), shapes)
  save_weights(tmp_path / "mine", params, config.to_dict())
  found = restore.load(tmp_path / "mine", "tokenizer", ema=0.0)
  assert jax.tree.map(np.shape, found.params) == jax.tree.map(np.shape, params)
  loaded = Tokenizer.load(tmp_path / "mine", ema=0.0)
  assert loaded.sha256 == found.sha256 == functional.fingerprint(params)
