"""Programs whose speed on TPUs others have published, to hold the estimates against.

Each is a stack of Llama's blocks with the sizes, batch, sequence and recomputation of a published
run, its loss a sum of squares, and AdamW over parameters that are sharded over all chips. Left out
on both sides, in time and in FLOPs, are the embedding, the logits and the core of attention, which
is a kernel there: 6 to 10 % of the FLOPs. In its place queries, keys and values are read and a
result of the same size is written. The published rates count the whole square of attention, of
which half is computed, and so are up to a twentieth too high.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch.lab.plan import hlo, operations, slices, times
from vavae_jax.common import mesh
from vavae_jax.common.sharding import BATCH_AXES, pin_batch


class Stack(NamedTuple):
  """The sizes of a stack of blocks."""

  layers: int
  width: int
  queries: int  # numbers a token of all heads
  keys: int
  inner: int


@dataclasses.dataclass(frozen=True)
class Published:
  """One run, and the rate at which it computed."""

  key: str
  name: str
  topology: str
  address: str
  tflops: float  # TFLOP/s of a device, as published
  stack: Stack
  batch: int  # sequences a device
  length: int
  kept: tuple[str, ...] = ()  # for the backward pass, beside the input of each block

  @property
  def flops(self) -> float:
    """Of a device and step, by the products of the parameters."""
    stack = self.stack
    attention = 2 * stack.width * (stack.queries + stack.keys)
    parameters = stack.layers * (attention + 3 * stack.width * stack.inner)
    return 6.0 * parameters * self.batch * self.length


_MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main"
_RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/blob/main/training"
_LLAMA_70B = Stack(80, 8192, 8192, 1024, 28672)
_ALL = (
  Published(
    key="16b_v5e",
    name="MaxText 16B on v5e-256",
    topology="v5e:16x16",
    address=f"{_MAXTEXT}/MaxText/configs/v5e/README.md",
    tflops=120.0,
    stack=Stack(32, 4096, 16384, 16384, 28672),
    batch=6,
    length=2048,
  ),
  Published(
    key="70b_v6e",
    name="Llama 2 70B on v6e-256",
    topology="v6e:16x16",
    address=f"{_RECIPES}/trillium/Llama2-70B-MaxText/README.md",
    tflops=402.3,
    stack=_LLAMA_70B,
    batch=2,
    length=4096,
    kept=("query", "key", "value"),
  ),
  Published(
    key="70b_v5p",
    name="Llama 2 70B on v5p-512",
    topology="v5p:8x8x4",
    address=f"{_MAXTEXT}/docs/reference/models/tiering.md",
    tflops=300.2,  # 65.4 % of 459
    stack=_LLAMA_70B,
    batch=4,
    length=4096,
    kept=("query", "key", "value", "out", "down"),
  ),
)
RUNS = {run.key: run for run in _ALL}


@dataclasses.dataclass(frozen=True)
class Held:
  """A published rate beside those that the compiled program is estimated at; TFLOP/s."""

  name: str
  topology: str
  address: str
  published: float
  estimated: float
  roofline: float

  @property
  def factor(self) -> float:
    """How many times as long as the real run the estimate is."""
    return self.published / self.estimated


def hold(run: Published) -> Held:
  """Compiles a published run and estimates its rate."""
  devices = slices.make_mesh(run.topology, 1, -1)
  with jax.set_mesh(devices):
    compiled = _traced(run, devices).lower().compile()
  text = hlo.parse(compiled.as_text())
  chip = slices.chip_of(run.topology, devices)
  seconds = times.times(operations.of(text), hlo.collectives(text), chip, run.flops)
  # The links work beside the products in the published runs.
  rates = [run.flops / 1e12 / value for value in (seconds.compiler, seconds.roofline)]
  return Held(run.name, run.topology, run.address, run.tflops, *rates)


def _traced(run: Published, devices: Mesh) -> Any:
  shapes = {
    "query": (run.stack.width, run.stack.queries),
    "key": (run.stack.width, run.stack.keys),
    "value": (run.stack.width, run.stack.keys),
    "out": (run.stack.queries, run.stack.width),
    "gate": (run.stack.width, run.stack.inner),
    "up": (run.stack.width, run.stack.inner),
    "down": (run.stack.inner, run.stack.width),
    "norm1": (run.stack.width,),
    "norm2": (run.stack.width,),
  }
  params = {n: jax.ShapeDtypeStruct((run.stack.layers, *x), jnp.float32) for n, x in shapes.items()}
  state = (params, jax.eval_shape(optax.adamw(1e-4).init, params))
  shardings = mesh.parameter_shardings(state, devices)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
  )
  x_BND = jax.ShapeDtypeStruct(
    (run.batch * devices.size, run.length, run.stack.width),
    jnp.bfloat16,
    sharding=NamedSharding(devices, PartitionSpec(BATCH_AXES)),
  )
  step = functools.partial(_step, run)
  return jax.jit(step, donate_argnums=0, out_shardings=shardings).trace(state, x_BND)


def _step(run: Published, state: Any, x_BND: jax.Array) -> Any:
  params, moments = state
  policy = jax.checkpoint_policies.save_only_these_names(*run.kept)

  @functools.partial(jax.checkpoint, policy=policy)
  def block(y_BND: jax.Array, weights: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    return _block(run, y_BND, weights), None

  def loss(params: Any) -> jax.Array:
    y_BND, _ = jax.lax.scan(block, x_BND, params)
    return jnp.mean(jnp.square(y_BND.astype(jnp.float32)))

  updates, moments = optax.adamw(1e-4).update(jax.grad(loss)(params), moments, params)
  return optax.apply_updates(params, updates), moments


def _block(run: Published, x_BND: jax.Array, weights: dict[str, jax.Array]) -> jax.Array:
  # Gathered in the dtype of the products.
  w = {
    n: jax.lax.with_sharding_constraint(a.astype(jnp.bfloat16), PartitionSpec())
    for n, a in weights.items()
  }

  def product(name: str, y_BND: jax.Array) -> jax.Array:
    return checkpoint_name(y_BND @ w[name], name)

  x_BND = pin_batch(x_BND)
  y_BND = _norm(x_BND, w["norm1"])
  q_BND, k_BND, v_BND = (product(name, y_BND) for name in ("query", "key", "value"))
  groups = run.stack.queries // run.stack.keys
  k_BND, v_BND = (jnp.tile(_rotate(a), (1, 1, groups)) for a in (k_BND, v_BND))
  x_BND += product("out", _rotate(q_BND) * k_BND + v_BND)
  y_BND = _norm(x_BND, w["norm2"])
  return x_BND + product("down", jax.nn.silu(product("gate", y_BND)) * product("up", y_BND))


def _norm(x_BND: jax.Array, scale: jax.Array) -> jax.Array:
  wide_BND = x_BND.astype(jnp.float32)
  scaled_BND = wide_BND * jax.lax.rsqrt(jnp.mean(wide_BND**2, axis=-1, keepdims=True) + 1e-6)
  return scaled_BND.astype(x_BND.dtype) * scale


def _rotate(x_BND: jax.Array, head: int = 128) -> jax.Array:
  """Rotary positions, halves of a head as pairs."""
  x_BNKE = x_BND.reshape(*x_BND.shape[:2], -1, head)
  frequency_E = 1e4 ** (-jnp.arange(0, head, 2) / head)
  angle_NE = jnp.arange(x_BND.shape[1])[:, None] * frequency_E
  cos, sin = (f(angle_NE)[:, None].astype(x_BND.dtype) for f in (jnp.cos, jnp.sin))
  a_BNKE, b_BNKE = jnp.split(x_BNKE, 2, axis=-1)
  turned = jnp.concatenate((a_BNKE * cos - b_BNKE * sin, b_BNKE * cos + a_BNKE * sin), axis=-1)
  return turned.reshape(x_BND.shape)
