"""A task's training step as the loop runs it: jitted, with its FLOPs, compiled once a phase."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from launch.engine import console, flops, hardware
from vavae_jax.common import functional
from vavae_jax.common.sharding import platform

Metrics = dict[str, Any]
TrainStep = Callable[..., tuple[Any, Metrics]]


class Step:
  """`state, metrics = step(phase, state, frozen, batch, key)`, which takes the state's memory; each
  phase is prepared first.
  """

  def __init__(self, train_step: TrainStep, config: FrozenConfigDict, shardings: Any):
    """`train_step` is the task's, `config` whole; `shardings` are the state's."""
    # Model FLOPs of one step, for the phases that were run; see `without_recomputation`.
    self.flops: dict[Hashable, float] = {}
    self._train_step, self._config, self._shardings = train_step, config, shardings
    self._jitted = jit_step(self._traced, config, shardings)
    self._traces = 0
    self.norms = jax.jit(_norms)  # for the log, so not part of every step

  def _traced(self, *arguments: Any) -> tuple[Any, Metrics]:
    self._traces += 1
    return self._train_step(*arguments)

  def prepare(self, phase: Hashable, *arguments: Any) -> None:
    """Traces and compiles the step of a phase, which the first call then finds; takes nothing."""
    traced = counted = self._jitted.trace(phase, *arguments)
    plain = without_recomputation(self._config)
    if plain != self._config:
      counted = jit_step(self._train_step, plain, self._shardings).trace(phase, *arguments)
    self.flops[phase] = flops.count(counted.jaxpr)
    traced.lower().compile()

  def __call__(self, phase: Hashable, *arguments: Any) -> tuple[Any, Metrics]:
    result = self._jitted(phase, *arguments)
    if self._traces > len(self.flops):
      self._traces = len(self.flops)
      console.say(
        "warning: the training step was traced and compiled again, which is slow: the batch has "
        f"another shape or dtype than before ({jax.tree.map(jnp.shape, arguments[2])})"
      )
    return result


def without_recomputation(config: FrozenConfigDict) -> FrozenConfigDict:
  """The same training where the backward pass computes no block again.

  Its traced step has the model's FLOPs, which utilisation is usually computed from.
  """
  model = config.get("model", {})
  # On TPUs a diffusion model may do it unasked.
  if not model.get("use_checkpoint") and (platform() != "tpu" or "remat_policy" not in model):
    return config
  plain = ConfigDict(config.to_dict())
  plain.model.use_checkpoint = False
  if "remat_policy" in model:
    plain.model.remat_policy = "costly"
  return FrozenConfigDict(plain)


def jit_init(init: Callable[[jax.Array], Any], shardings: Any = None) -> Callable[..., Any]:
  """`init` (key -> state) compiled to run once; to make it fast takes a CPU's compiler too long."""
  lazy = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  return jax.jit(init, out_shardings=shardings, compiler_options=lazy)


def jit_step(train_step: TrainStep, config: FrozenConfigDict, shardings: Any) -> Any:
  """The step jitted, with the arguments of `Step` and the state's memory donated."""
  return jax.jit(
    functools.partial(_guarded, train_step, config),
    static_argnums=0,
    donate_argnums=1,
    out_shardings=(shardings, None),
    compiler_options=hardware.compiler_options(shardings, config.get("task")),
  )


def _guarded(
  train_step: TrainStep, config: FrozenConfigDict, phase: Hashable, state: Any, *more: Any
) -> tuple[Any, Metrics]:
  """The task's step, whose metric "finite" says whether all metrics and the new state are; with
  "skip", one where they are not leaves all but the count.

  All of both: finite losses can have gradients that are not, and those have such updates.
  """
  new, metrics = train_step(config, phase, state, *more)
  finite = functional.all_finite(new, metrics)
  if config.non_finite == "skip":
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    new = dataclasses.replace(kept, step=new.step)
  return new, {**metrics, "finite": finite}


def _norms(state: Any) -> Metrics:
  trees = {"param": state.params, **{f"ema_{name}": tree for name, tree in state.ema.items()}}
  return {f"{name}_norm": optax.tree.norm(tree) for name, tree in trees.items()}
