"""The tokenizer's step: its shared backward passes equal the gradients of the weighted sum."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict

from configs import quickstart
from tests import cases
from vavae_jax import functional, images, losses, training

STRIDE, FEATURES = 16, 5
KEY = jax.random.key(7)


class TinyTeacher(nnx.Module):
  """Two strided convolutions with the interface of a teacher: EfficientNet compiles for long."""

  stride, feature_size = STRIDE, FEATURES

  def __init__(self, rngs: nnx.Rngs):
    self.fine = nnx.Conv(3, 4, (4, 4), strides=4, rngs=rngs)
    self.coarse = nnx.Conv(4, FEATURES, (4, 4), strides=4, rngs=rngs)

  def endpoints(self, image):
    fine = self.fine(image)
    return dict.fromkeys(training.PERCEPTUAL_STAGES, fine) | {"stride16": self.coarse(fine)}

  def __call__(self, image):
    return self.endpoints(image)["stride16"]


@pytest.fixture(scope="module")
def setting():
  """A configuration, its teacher and state, and one step of each phase, gradients handed out."""
  config = quickstart.tokenizer(tiny=True)
  config.model.update(embed_dim=6, z_channels=6, ch=8, ch_mult=(1, 2), norm_groups=4, patch_size=8)
  config.discriminator.update(ndf=4, n_layers=2)
  config.loss.update(kl_weight=1e-2, perceptual_weight=0.3, vf_weight=0.7, disc_weight=0.4)
  config.loss.update(cos_margin=0.1, distmat_margin=0.05)
  config.optimizer.warmup_steps = 0
  config = FrozenConfigDict(config)
  patch = pytest.MonkeyPatch()
  teacher = TinyTeacher(nnx.Rngs(3))
  patch.setattr(training, "_teacher", lambda name, weights: teacher)
  # The update hands out the gradients instead of the parameters.
  patch.setattr(training, "_update_autoencoder", lambda config, state, grads: (state, grads))
  state = jax.jit(functools.partial(training.init_state, config))(jax.random.key(1))
  frozen = training.load_frozen(config)
  image = np.random.default_rng(0).integers(0, 256, (3, 32, 48, 3), np.uint8)
  steps = {}
  for phase in ("reconstruction", "adversarial"):
    step = jax.jit(functools.partial(training.train_step, config, phase))
    (new, grads), _ = step(state, frozen, {"image": image}, KEY)
    steps[phase] = new, grads
  yield config, teacher, state, image, steps
  patch.undo()


def plain_gradients(config, teacher, state, image, adversarial):
  """jax.grad of the sum of all losses, the weights from jax.grad at the two last layers."""
  graph = functional.graph_of(training.build_autoencoder(config))
  image = images.to_float(jnp.asarray(image))

  def parts(params):
    model = nnx.merge(graph, params["autoencoder"])
    posterior = model.encode(image)
    z = posterior.sample(jax.random.normal(KEY, posterior.mean.shape))
    recon = model.decode(z)
    fine = [teacher.endpoints(x)[training.PERCEPTUAL_STAGES[0]] for x in (image, recon)]
    distance = losses.feature_distance(fine[:1], fine[1:])
    nll = losses.reconstruction(image, recon, config.loss.perceptual_weight * distance)
    projected, features = z @ params["projection"], teacher(image)
    vf = losses.marginal_cosine(projected, features, config.loss.cos_margin)
    vf += losses.marginal_distance_matrix(projected, features, config.loss.distmat_margin)
    judge = nnx.merge(
      functional.graph_of(training._build_discriminator(config)),
      state.discriminator,
      state.discriminator_statistics,
    )
    gan = losses.generator_hinge(judge(recon, train=True))
    return {"nll": nll, "kl": jnp.mean(posterior.kl()), "vf": vf, "gan": gan}

  def at(name, side):
    grads = jax.grad(lambda p: parts(p)[name])(state.params)
    return jnp.linalg.norm(grads["autoencoder"][side]["conv_out"]["kernel"])

  weights = {"nll": 1.0, "kl": config.loss.kl_weight}
  weights["vf"] = config.loss.vf_weight * at("nll", "encoder") / (at("vf", "encoder") + 1e-4)
  if adversarial:
    gan = at("nll", "decoder") / (at("gan", "decoder") + 1e-4)
    weights["gan"] = config.loss.disc_weight * gan

  def total(params):
    values = parts(params)
    return sum(weight * values[name] for name, weight in weights.items())

  return jax.grad(total)(state.params)


@pytest.mark.parametrize("phase", ["reconstruction", "adversarial"])
def test_gradients_are_those_of_the_weighted_sum(setting, phase):
  config, teacher, state, image, steps = setting
  _, ours = steps[phase]
  oracle = jax.jit(lambda: plain_gradients(config, teacher, state, image, phase == "adversarial"))()
  # Keys' biases have no gradient but rounding, in units of the whole: softmax sees no constant.
  floor = 1e-6 * max(float(jnp.abs(x).max()) for x in jax.tree.leaves(oracle))
  jax.tree.map(lambda a, b: cases.assert_near(a, b, 2e-4, floor), ours, oracle)


def test_discriminator_waits_for_its_phase(setting):
  _, _, state, _, steps = setting
  for phase, same in (("reconstruction", True), ("adversarial", False)):
    new, _ = steps[phase]
    for field in ("discriminator", "discriminator_statistics", "discriminator_optimizer"):
      pairs = zip(
        jax.tree.leaves(getattr(new, field)), jax.tree.leaves(getattr(state, field)), strict=True
      )
      assert all(np.array_equal(a, b) for a, b in pairs) == same, (phase, field)


def test_phase_counts_batches_from_disc_start(setting):
  config = setting[0]
  start = config.loss.disc_start
  assert training.phase(config, start) == "reconstruction"
  assert training.phase(config, start + 1) == "adversarial"


def test_training_without_a_teacher_has_no_projection():
  config = quickstart.tokenizer(tiny=True)
  config.teacher.name = ""
  state = jax.eval_shape(
    functools.partial(training.init_state, FrozenConfigDict(config)), jax.random.key(0)
  )
  assert set(state.params) == {"autoencoder"}
