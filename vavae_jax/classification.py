"""The classifier's task: a network to judge by, trained on pictures and their classes."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import FrozenConfigDict

from vavae_jax.common import functional, mesh, optimizer
from vavae_jax.common.batches import in_shares
from vavae_jax.common.errors import InputError
from vavae_jax.common.optimizer import State, averaged, learning_rate
from vavae_jax.common.sharding import whole
from vavae_jax.data import images, selection, sources
from vavae_jax.metrics.classifier import Classifier

EVALUATION_BATCH = 500
# Further held-out pictures change the accuracy by less than its own uncertainty.
MOST_EVALUATED = 10_000


def build(config: FrozenConfigDict) -> functional.Build:
  """The network of a configuration, for `functional`."""
  return lambda rngs: Classifier(**config.model, dtype=config.dtype, rngs=rngs)


def check(config: FrozenConfigDict) -> None:
  """Checks what can be checked before anything compiles; InputError if something does not fit."""
  functional.outline(build(config), "config.model")
  learning_rate(config.optimizer)
  size, patch = config.data.image_size, config.model.patch_size
  if size % patch:
    raise InputError(f"config.data.image_size is {size}, no multiple of patch_size={patch}.")
  if config.data.pad >= size:
    raise InputError(f"config.data.pad is {config.data.pad}; it must be below image_size={size}.")
  source, _ = selection.training_pictures(config)
  if len(source.class_names) != config.model.num_classes:
    raise InputError(
      f"{config.data.source} has {len(source.class_names)} classes, but "
      f"config.model.num_classes is {config.model.num_classes}."
    )
  selection.check_pictures(config)


def init_state(config: FrozenConfigDict, key: jax.Array) -> State:
  """A fresh network and optimizer."""
  params = functional.init(build(config), key)
  return optimizer.start(config.optimizer, params)


def load_frozen(config: FrozenConfigDict) -> Any:
  """Nothing."""
  del config
  return {}


def phase(config: FrozenConfigDict, step: int) -> None:
  """All steps are alike."""
  del config, step


def shifted(key: jax.Array, image_BHWC: jax.Array, pad: int) -> jax.Array:
  """A random crop of each picture with `pad` reflected pixels around it, of the picture's size."""
  if not pad:
    return image_BHWC
  padded = jnp.pad(image_BHWC, ((0, 0), (pad, pad), (pad, pad), (0, 0)), "reflect")
  places_B2 = jax.random.randint(key, (len(image_BHWC), 2), 0, 2 * pad + 1)

  def crop(picture: jax.Array, place: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice(picture, (place[0], place[1], 0), image_BHWC.shape[1:])

  return jax.vmap(crop)(padded, places_B2)


def train_step(
  config: FrozenConfigDict, phase: None, state: State, frozen: Any, batch: Any, key: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
  """One update by the cross-entropy of the classes."""
  del phase, frozen
  graph = functional.graph_of(build(config))
  targets = optax.smooth_labels(
    jax.nn.one_hot(batch["label"], config.model.num_classes), config.loss.label_smoothing
  )

  image_BHWC = shifted(key, batch["image"], config.data.pad)

  def loss_fn(params: Any) -> tuple[jax.Array, jax.Array]:
    _, logits_BC = nnx.merge(graph, params)(images.to_float(image_BHWC))
    loss = optax.softmax_cross_entropy(logits_BC, targets).mean()
    return loss, jnp.mean(logits_BC.argmax(-1) == batch["label"])

  (loss, accuracy), gradients = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
  metrics = {"loss": loss, "accuracy": accuracy, "grad_norm": optax.tree.norm(gradients)}
  return optimizer.step(config.optimizer, state, gradients), metrics


data_source, train_data = selection.data_source, selection.training_batches


def evaluators(config: FrozenConfigDict) -> dict[str, Any]:
  """The accuracy on held-out pictures."""
  graph = functional.graph_of(build(config))

  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)

  @jax.jit
  def correct(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    _, logits_BC = nnx.merge(graph, params)(images.to_float(batch["image"]))
    return whole(logits_BC.argmax(-1) == batch["label"])

  @functools.cache
  def held_out() -> tuple[sources.Source, np.ndarray]:
    source, _ = selection.training_pictures(config)
    rest = selection.share(config.data, held_out=True)  # sorted, perhaps by class
    return source, rest[:: math.ceil(len(rest) / MOST_EVALUATED)]

  @functools.cache  # they stay in memory
  def loaded(*rows: int) -> dict[str, np.ndarray]:
    source, chosen = held_out()
    some = chosen[list(rows)]
    labels = np.array([source.picture(int(i))[1] for i in some], np.int32)
    return {"image": images.load_crops(source, some, config.data.image_size), "label": labels}

  def evaluate(state: State) -> dict[str, Any]:
    run = functools.partial(correct, averaged(config.optimizer, state))
    count = len(held_out()[1])
    size = -(-min(EVALUATION_BATCH, count) // devices.size)
    shares = in_shares(run, lambda rows: loaded(*rows.tolist()), count, size, devices)
    return {"accuracy": sum(int(x.sum()) for _, x in shares) / count, "pictures": count}

  return {"held_out": (config.evaluate_every_steps, evaluate)}


def figures(config: FrozenConfigDict) -> list[str]:
  """The names of all numbers that `evaluators` give."""
  del config
  return ["held_out/accuracy", "held_out/pictures"]
