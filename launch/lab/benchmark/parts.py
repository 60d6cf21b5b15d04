r"""Measures the tokenizer's training step, what its parts cost, and encoding and decoding.

  python -m launch.lab.benchmark parts --config=configs/vavae_f16d32.py --batch_size=32 \
    --config.dtype=bfloat16 --config.teacher.dtype=bfloat16 --config.perceptual.dtype=bfloat16 \
    --output=benchmark.json

With the GAN on, on random pictures; LPIPS and the teachers DINOv2 and MAE have random weights, so
that no file is needed. Beside our step, in turns with it, the same losses in the reference's order
of backward passes: two partial ones for each adaptive weight, one for the sum, one for the
discriminator, which judges anew. "reference" keeps one forward pass for all of them, as PyTorch
does; "recomputed" has one for each, as a translation by jax.grad would. What a part costs is what
the step saves without it. TFLOP is what the compiled program computes. On
CPUs set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which spares page faults.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
from launch.engine import configuration, console, loop
from launch.engine.circumstances import circumstances
from launch.lab.benchmark.measuring import timed
from vavae_jax import losses, training, update
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json
from vavae_jax.common.optimizer import make_optimizer
from vavae_jax.data import images
from vavae_jax.frozen import fresh
from vavae_jax.stages import Phase

# Flags that are defined here are those of the command that asks for them.
flags.disclaim_key_flags()
FLAGS = flags.FLAGS
GAN = Phase(0, gan=True)


class Work(NamedTuple):
  """Something to time: `run()` does it once, with `flops` floating-point operations."""

  run: Callable[[], Any]
  flops: float


# Name of a row -> what is changed of the configuration, and the phase.
WITHOUT: dict[str, tuple[dict[str, Any], Phase]] = {
  "teacher": ({"teacher.name": ""}, GAN),
  "perceptual network": ({"loss.perceptual_weight": 0.0}, GAN),
  "GAN": ({}, Phase(0, gan=False)),
}


class _Passes(NamedTuple):
  """One forward pass of everything, with the ways back through its parts."""

  nll: jax.Array
  vf: jax.Array
  gan: jax.Array
  recon: jax.Array
  pull_nll: Callable[..., Any]
  pull_vf: Callable[..., Any]
  pull_gan: Callable[..., Any]
  pull_decoder: Callable[..., Any]
  pull_encoder: Callable[..., Any]


def reference_order(
  config: FrozenConfigDict,
  phase: Phase,
  state: update.State,
  networks: Any,
  batch: Any,
  noise: jax.Array,
  *,
  recompute: bool = False,
) -> tuple[update.State, Any]:
  """`update.update` with the reference's backward passes, one after the other.

  What the passes start from looks different to the compiler, so that it merges none of them: it
  would turn this order into ours. With `recompute` the parameters look different too.
  """
  passed = itertools.count(1)

  def unmerged(x: Any) -> Any:
    always = state.step >= -next(passed)  # which only we know
    return jax.tree.map(lambda x: jnp.where(always, x, 0.0), x)

  image = images.to_float(batch["image"])
  column = {name: config.stages[name][phase.stage] for name in ("cos_margin", "distmat_margin")}
  features = networks["teacher"](image)
  there = networks["perceptual"].features(image)
  graph = functional.graph_of(update.build_autoencoder(config))
  judge_graph = functional.graph_of(update.build_discriminator(config))

  def judge(params: Any, picture: jax.Array) -> tuple[jax.Array, Any]:
    network = nnx.merge(judge_graph, params, state.discriminator_statistics)
    return network(picture, train=True), nnx.to_pure_dict(nnx.state(network, nnx.BatchStat))

  def encode(params: Any) -> tuple[jax.Array, jax.Array]:
    posterior = nnx.merge(graph, params).encode(image)
    return posterior.sample(noise), jnp.mean(posterior.kl())

  def nll_of(recon: jax.Array) -> jax.Array:
    distance = networks["perceptual"].distance(there, networks["perceptual"].features(recon))
    distance *= config.loss.perceptual_weight
    return losses.reconstruction(image, recon, distance) * image[0].size

  def vf_of(projection: Any, z: jax.Array) -> jax.Array:
    pair = update.project(projection, z, features, config.teacher.reverse_proj)
    near = losses.marginal_cosine(*pair, column["cos_margin"])
    alike = losses.marginal_distance_matrix(*pair, column["distmat_margin"])
    return config.loss.cos_weight * near + config.loss.distmat_weight * alike

  def forward(params: Any) -> _Passes:
    (z, _), pull_encoder = jax.vjp(encode, params["autoencoder"])
    recon, pull_decoder = jax.vjp(
      lambda params, z: nnx.merge(graph, params).decode(z), params["autoencoder"], z
    )
    nll, pull_nll = jax.vjp(nll_of, recon)
    vf, pull_vf = jax.vjp(vf_of, params["projection"], z)
    gan, pull_gan = jax.vjp(lambda r: losses.generator(judge(state.discriminator, r)[0]), recon)
    return _Passes(nll, vf, gan, recon, pull_nll, pull_vf, pull_gan, pull_decoder, pull_encoder)

  once = forward(state.params)

  def passes() -> _Passes:
    return forward(unmerged(state.params)) if recompute else once

  def one(loss: jax.Array) -> jax.Array:
    return unmerged(jnp.ones_like(loss))

  def last(grads: Any, side: str) -> jax.Array:
    return grads[side]["conv_out"]["kernel"]

  zero = jnp.zeros(())
  p = passes()
  nll_at_decoder = last(p.pull_decoder(*p.pull_nll(one(p.nll)))[0], "decoder")
  p = passes()
  gan_at_decoder = last(p.pull_decoder(*p.pull_gan(one(p.gan)))[0], "decoder")
  p = passes()
  nll_at_z = p.pull_decoder(*p.pull_nll(one(p.nll)))[1]
  nll_at_encoder = last(p.pull_encoder((nll_at_z, zero))[0], "encoder")
  p = passes()
  vf_at_encoder = last(p.pull_encoder((p.pull_vf(one(p.vf))[1], zero))[0], "encoder")
  gan_weight = config.loss.disc_weight * losses.adaptive_weight(
    nll_at_decoder, gan_at_decoder, losses.MAX_GAN_WEIGHT
  )
  vf_weight = config.stages.vf_weight[phase.stage] * losses.adaptive_weight(
    nll_at_encoder, vf_at_encoder, losses.MAX_ALIGNMENT_WEIGHT
  )

  p = passes()
  by_recon = p.pull_nll(one(p.nll))[0] + gan_weight * p.pull_gan(one(p.gan))[0]
  by_decoder, z_cotangent = p.pull_decoder(by_recon)
  by_projection, by_z = p.pull_vf(vf_weight * one(p.vf))
  (by_encoder,) = p.pull_encoder((z_cotangent + by_z, zero + config.loss.kl_weight))
  autoencoder = jax.tree.map(jnp.add, by_decoder, by_encoder)
  grads = {"autoencoder": autoencoder, "projection": by_projection}
  recon = unmerged(passes().recon)

  def judged(params: Any) -> tuple[jax.Array, Any]:
    real, statistics = judge(params, image)
    return losses.discriminator(real, judge(params, recon)[0], config.loss.disc_loss), statistics

  judge_grads, statistics = jax.grad(judged, has_aux=True)(state.discriminator)
  optimizer = make_optimizer(config.optimizer)
  step, moments = optimizer.update(grads, state.optimizer, state.params)
  judge_step, judge_moments = optimizer.update(
    judge_grads, state.discriminator_optimizer, state.discriminator
  )
  new = dataclasses.replace(
    state,
    step=state.step + 1,
    params=optax.apply_updates(state.params, step),
    optimizer=moments,
    discriminator=optax.apply_updates(state.discriminator, judge_step),
    discriminator_statistics=statistics,
    discriminator_optimizer=judge_moments,
  )
  return new, {"disc_weight": gan_weight, "vf_weight": vf_weight}


def stepper(
  config: FrozenConfigDict,
  phase: Phase,
  networks: dict[str, Any],
  step: Callable[..., Any],
) -> Work:
  """One training step, each on the state that the last one left."""
  split = {name: nnx.split(network) for name, network in networks.items()}
  weights = {name: state for name, (_, state) in split.items()}
  size = config.data.image_size
  draw = np.random.default_rng(0)
  batch = {"image": draw.integers(0, 256, (config.batch_size, size, size, 3), np.uint8)}
  noise = draw.standard_normal((config.batch_size, *training.latent_shape(config)), np.float32)

  @functools.partial(jax.jit, donate_argnums=0)
  def take(state: update.State, weights: Any, batch: Any, noise: jax.Array) -> Any:
    merged = {name: nnx.merge(graph, weights[name]) for name, (graph, _) in split.items()}
    return step(config, phase, state, merged, batch, noise)

  states = [loop.jit_init(functools.partial(training.init_state, config))(jax.random.key(0))]
  compiled = take.lower(states[0], weights, batch, noise).compile()

  def run() -> Any:
    state, metrics = compiled(states.pop(), weights, batch, noise)
    states.append(state)
    return state, metrics

  return Work(run, _flops(compiled))


def benchmark(config: ConfigDict, steps: int) -> dict[str, Any]:
  """All rows; see the module's docstring."""
  config = config.copy_and_resolve_references()
  # One stage, all of whose losses are on.
  config.stages.update(
    {name: config.stages[name][-1:] for name in config.stages if name != "begins"}
  )
  frozen = configuration.resolve(config, configs.base.tokenizer())
  published = configs.base.tokenizer().loss
  free = ("perceptual_weight", "cos_weight", "distmat_weight", "disc_weight", "kl_weight")
  changed = [x for x in published if x not in free and frozen.loss[x] != published[x]]
  parts = ("perceptual_weight", "cos_weight", "distmat_weight", "disc_weight")
  if changed or not frozen.teacher.name or not all(frozen.loss[name] for name in parts):
    raise InputError(
      "The comparison is of the published losses: it needs a teacher, of config.loss "
      f"{', '.join(parts)} above 0, and the rest of config.loss as in configs/base.py"
      + (f", unlike {', '.join(changed)}." if changed else ".")
    )
  networks = fresh(frozen, nnx.Rngs(0))
  orders: dict[str, Callable[..., Any]] = {
    "ours": update.update,
    "reference": reference_order,
    "recomputed": functools.partial(reference_order, recompute=True),
  }
  makers: dict[str, Callable[[], Work]] = {
    name: functools.partial(stepper, frozen, GAN, networks, order) for name, order in orders.items()
  }
  for name, (changes, phase) in WITHOUT.items():
    reduced = ConfigDict(frozen.to_dict())
    reduced.update_from_flattened_dict(changes)
    reduced = FrozenConfigDict(reduced)
    kept = {"teacher": reduced.teacher.name, "perceptual": reduced.loss.perceptual_weight}
    needed = {key: network for key, network in networks.items() if kept[key]}
    makers[f"without {name}"] = functools.partial(stepper, reduced, phase, needed, update.update)
  makers |= {name: functools.partial(_direction, frozen, name) for name in ("encode", "decode")}
  work: dict[str, Work] = {}
  for name, make in makers.items():
    began = time.perf_counter()
    work[name] = make()
    timed(work[name].run)  # the first is slower
    console.say(f"compiled {name} in {time.perf_counter() - began:.0f} s")
  seconds: dict[str, list[float]] = {name: [] for name in work}
  for _ in range(steps):
    for name, each in work.items():
      seconds[name].append(timed(each.run))
  median = {name: float(np.median(values)) for name, values in seconds.items()}
  return {
    **circumstances(),
    "batch_size": frozen.batch_size,
    "seconds": median,
    "fastest": {name: min(values) for name, values in seconds.items()},
    "tflops": {name: each.flops / 1e12 for name, each in work.items()},
    "times_reference": median["reference"] / median["ours"],
    "times_recomputed": median["recomputed"] / median["ours"],
    "shares": {name: 1 - median[f"without {name}"] / median["ours"] for name in WITHOUT},
    "config": config.to_dict(),
  }


def _direction(config: FrozenConfigDict, name: str) -> Work:
  """Encoding or decoding."""
  build = update.build_autoencoder(config)
  graph = functional.graph_of(build)
  weights = loop.jit_init(functools.partial(functional.init, build))(jax.random.key(0))
  side = config.data.image_size
  shape = (side, side, 3) if name == "encode" else training.latent_shape(config)
  x = jnp.zeros((config.batch_size, *shape))

  def run(weights: Any, x: jax.Array) -> jax.Array:
    model = nnx.merge(graph, weights)
    return model.encode(x).mean if name == "encode" else model.decode(x)

  compiled = jax.jit(run).lower(weights, x).compile()
  return Work(functools.partial(compiled, weights, x), _flops(compiled))


def _flops(compiled: jax.stages.Compiled) -> float:
  """What the compiler counts; 0 where it does not."""
  return (compiled.cost_analysis() or {}).get("flops", 0.0)


def define_flags() -> None:
  """Defines the command's flags."""
  configuration.define_flag("A tokenizer training, such as configs/vavae_f16d32.py.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_integer("batch_size", 0, "Pictures; the configuration's if 0.", lower_bound=0)
  flags.DEFINE_integer("steps", 5, "How many of each are timed.", lower_bound=1)
  flags.DEFINE_string("output", "", "A JSON file for the results.")


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  if FLAGS.batch_size:
    FLAGS.config.batch_size = FLAGS.batch_size
  result = benchmark(FLAGS.config, FLAGS.steps)
  batch, ours = result["batch_size"], result["seconds"]["ours"]
  console.table(
    f"{result['device']}, batch {batch}; the reference's order takes "
    f"{result['times_reference']:.2f} times as long, recomputed {result['times_recomputed']:.2f}",
    ("what", "seconds, median", "fastest", "images/s", "of our step", "TFLOP"),
    [
      (
        name,
        f"{x:.3g}",
        f"{result['fastest'][name]:.3g}",
        f"{batch / x:.3g}",
        f"{x / ours:.0%}",
        f"{result['tflops'][name]:.3g}",
      )
      for name, x in result["seconds"].items()
    ],
  )
  if FLAGS.output:
    write_json(Path(FLAGS.output), result)
    console.say(f"written to {FLAGS.output}")
