"""LightningDiT against the reference cases, and the properties that training relies on."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lightningdit_jax import convert, positions
from lightningdit_jax.dense import REMAT_POLICIES
from lightningdit_jax.model import LightningDiT
from lightningdit_jax.options import PRESETS, preset
from lightningdit_jax.positions import position_embedding, rope_tables, rotate
from tests import cases
from tests.reference import procedural
from vavae_jax.common import functional

TINY = {"in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def build(rngs: nnx.Rngs, **kwargs) -> LightningDiT:
  return LightningDiT(**(TINY | kwargs), rngs=rngs)


def awake(**kwargs) -> LightningDiT:
  return cases.random_weights(functional.abstract(lambda rngs: build(rngs, **kwargs)))


def inputs() -> tuple[jax.Array, jax.Array, jax.Array]:
  x = jnp.asarray(procedural.normal("x", (3, 4, 6, TINY["in_channels"])))
  return x, jnp.array([0.1, 0.5, 0.9]), jnp.array([0, 5, 10])


@pytest.mark.parametrize("name", ["dit_default", "dit_variant", "dit_qknorm_rms"])
def test_forward_matches_reference(name):
  spec, weights, expected = cases.load(name)
  model = convert.from_torch(weights, **spec["config"])
  x = cases.nhwc(procedural.normal("x", expected["forward"].shape))
  t, label = procedural.uniform("t", (4,)), jnp.asarray(spec["inputs"]["y"])
  velocity = jax.jit(model)(jnp.asarray(x), jnp.asarray(t), label)
  cases.assert_near(velocity, cases.nhwc(expected["forward"]), 1e-5)


@pytest.mark.parametrize(
  ("name", "use_checkpoint"),
  [("dit_default", True), ("dit_variant", False)],
)
def test_gradients_match_reference(name, use_checkpoint):
  spec, weights, expected = cases.load(name)
  model = convert.from_torch(weights, **spec["config"], use_checkpoint=use_checkpoint)
  graph, params = nnx.split(model)
  shape = expected["forward"].shape
  data, noise = (jnp.asarray(cases.nhwc(procedural.normal(key, shape))) for key in ("x1_0", "x0_0"))
  t = jnp.asarray(procedural.uniform("t_0", (4,)))
  label = jnp.arange(4) * 3 % (spec["config"]["num_classes"] + 1)

  def loss(params):
    x_t = t[:, None, None, None] * data + (1 - t[:, None, None, None]) * noise
    predicted, target = nnx.merge(graph, params)(x_t, t, label), data - noise
    mse = jnp.mean((predicted - target) ** 2)
    norms = jnp.linalg.norm(predicted, axis=-1) * jnp.linalg.norm(target, axis=-1)
    return mse + jnp.mean(1 - jnp.sum(predicted * target, -1) / norms)

  value, gradient = jax.jit(jax.value_and_grad(loss))(params)
  assert value == pytest.approx(expected["losses"][0].sum(), rel=1e-5)
  # The stored gradient is the one after clipping to a global norm of 1.
  norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
  actual = convert.to_torch(nnx.merge(graph, gradient))
  for key in weights:
    # Softmax ignores the key norm's bias where there is no RoPE: its gradient is rounding noise.
    cases.assert_near(actual[key] / norm, expected[f"grad/{key}"], 1e-4, floor=1e-8)


def test_initialisation_is_that_of_the_reference():
  """Among it that the velocity is zero."""
  wide = functools.partial(build, hidden_size=128, patch_size=2)

  @jax.jit
  def initialise(key):
    params = functional.init(wide, key)
    return params, nnx.merge(functional.graph_of(wide), params)(*inputs())

  params, velocity = initialise(jax.random.key(0))
  np.testing.assert_array_equal(velocity, 0)
  qkv_LDM = params["blocks"]["attn"]["qkv"]["kernel"]
  assert jnp.abs(qkv_LDM).max() == pytest.approx((6 / (128 + 3 * 128)) ** 0.5, rel=1e-2)
  assert not jnp.allclose(qkv_LDM[0], qkv_LDM[1])
  patch = params["x_embedder"]["kernel"]
  assert jnp.abs(patch).max() == pytest.approx((6 / (4 * 3 + 128)) ** 0.5, rel=1e-2)
  assert params["t_embedder"]["fc1"]["kernel"].std() == pytest.approx(0.02, rel=0.05)
  assert params["y_embedder"]["embedding"].std() == pytest.approx(0.02, rel=0.1)
  assert not params["blocks"]["adaLN_modulation"]["kernel"].any()


def test_labels_outside_the_table_give_nan():
  velocity = jax.jit(awake())(inputs()[0], inputs()[1], jnp.array([-1, 10, 11]))
  assert [bool(jnp.isnan(v).any()) for v in velocity] == [True, False, True]


def test_a_sample_depends_on_its_own_inputs_only():
  model, (x, t, label) = awake(), inputs()
  gradient = jax.grad(lambda x, t: model(x, t, label)[1].sum(), argnums=(0, 1))
  for grad in jax.jit(gradient)(x, t):
    assert jnp.abs(grad[1]).max() > 0
    np.testing.assert_array_equal(grad[jnp.array([0, 2])], 0)


def test_patches_return_to_where_they_came_from():
  """While the gates are closed no token sees another, so a patch depends on itself alone."""
  model = awake(patch_size=2)
  model.blocks.adaLN_modulation = jax.tree.map(jnp.zeros_like, model.blocks.adaLN_modulation)
  x, t, label = inputs()
  gradient = jax.grad(lambda x: model(x, t, label)[1, 2:4, 2:4].sum())
  touched = np.abs(jax.jit(gradient)(x)[1]).sum(axis=-1) > 0
  expected = np.zeros((4, 6), bool)
  expected[2:4, 2:4] = True
  np.testing.assert_array_equal(touched, expected)


def test_positions_of_an_oblong_grid():
  """Token (row 2, column 3) of a 3 x 5 grid, channel by channel."""
  token = 2 * 5 + 3
  slow = 10000**-0.5
  expected = [f(p * w) for p in (3, 2) for f in (np.sin, np.cos) for w in (1, slow)]
  np.testing.assert_allclose(position_embedding(3, 5, 8)[token], expected, rtol=1e-6)
  angles = np.repeat([2, 2 * slow, 3, 3 * slow], 2)
  for table, expected in zip(rope_tables(3, 5, 8), (np.cos(angles), np.sin(angles)), strict=True):
    np.testing.assert_allclose(table[token], expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tpus_rotate_to_the_same_bits(monkeypatch, dtype):
  """By a product with a permutation instead of rolls."""
  rope = rope_tables(4, 6, 12)
  x = jax.random.normal(jax.random.key(0), (2, 3, 24, 12), jnp.dtype(dtype))
  expected, pull = jax.vjp(lambda x: rotate(x, rope), x)
  monkeypatch.setattr(positions, "platform", lambda: "tpu")
  assert "dot_general" in str(jax.make_jaxpr(lambda x: rotate(x, rope))(x))
  rotated, pull_tpu = jax.vjp(lambda x: rotate(x, rope), x)
  np.testing.assert_array_equal(rotated, expected)
  np.testing.assert_array_equal(pull_tpu(expected)[0], pull(expected)[0])


@pytest.mark.parametrize(
  "change",
  [
    *({"use_checkpoint": True, "remat_policy": name} for name in REMAT_POLICIES),
    {"scan_unroll": 2},
    {"scan_unroll": 2, "use_checkpoint": True},
  ],
)
def test_recomputing_and_unrolling_change_no_gradient(change):
  def gradients(**kwargs):
    graph, weights = nnx.split(awake(**kwargs))
    return jax.jit(jax.grad(lambda w: jnp.sum(nnx.merge(graph, w)(*inputs()) ** 2)))(weights)

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    gradients(**change),
    gradients(),
  )


def test_policies_keep_what_they_say():
  """Matrix products in the backward pass: all of them, no weights' again, none again."""
  products = {}
  for name in REMAT_POLICIES:
    graph, weights = nnx.split(awake(use_checkpoint=True, remat_policy=name))
    loss = jax.grad(lambda w, graph=graph: jnp.sum(nnx.merge(graph, w)(*inputs())))
    text = str(jax.make_jaxpr(loss)(weights))
    products[name] = (text.count("= dense"), text.count("= dot_general"))
  (full, full_dots), (dense, dense_dots), (dots, least_dots) = (
    products[name] for name in ("full", "dense", "dots")
  )
  assert full > dense == dots
  assert full_dots == dense_dots > least_dots
  assert products["costly"] == products["dots"]
  assert products["attended"] == products["full"]  # but a kernel of the attention's runs once


def test_the_attentions_result_is_kept_once_and_alone():
  """Of a block's arrays; where all costly results are kept, its name does not keep it twice."""
  kept = {}
  for name in ("attended", "costly"):
    graph, weights = nnx.split(awake(use_checkpoint=True, remat_policy=name))
    loss = jax.grad(lambda w, graph=graph: jnp.sum(nnx.merge(graph, w)(*inputs())))
    jaxpr = jax.make_jaxpr(loss)(weights)
    forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    kept[name] = [v.aval.shape for v in forward.outvars if v.aval.ndim == 4]
  stream = (TINY["depth"], len(inputs()[0]), 24, TINY["hidden_size"])
  assert kept["attended"] == [stream] * 2  # the blocks' inputs, and the attention's results
  assert kept["costly"].count(stream) == 3  # besides the input, what the two sublayers give


@pytest.mark.parametrize("reduce_dtype", ["compute", "float32"])
def test_no_copy_of_the_weights_is_kept_for_the_backward_pass(reduce_dtype):
  """A scan stacks what its backward pass needs, cast weights too, unless a policy forbids it."""
  depth, width = TINY["depth"], TINY["hidden_size"]
  graph, weights = nnx.split(awake(dtype=jnp.bfloat16, reduce_dtype=reduce_dtype))
  loss = jax.grad(lambda w: jnp.sum(nnx.merge(graph, w)(*inputs())))
  forward = next(e for e in jax.make_jaxpr(loss)(weights).eqns if e.primitive.name == "scan")
  shapes = {variable.aval.shape for variable in forward.outvars}
  assert (depth, len(inputs()[0]), 24, width) in shapes
  assert (depth, width, width) not in shapes


def test_gradients_that_are_added_up_in_float32_are_not_rounded_before():
  """And the velocity stays the same to the bit."""

  def of(reduce_dtype):
    graph, weights = nnx.split(awake(dtype=jnp.bfloat16, reduce_dtype=reduce_dtype))

    def loss(weights):
      velocity = nnx.merge(graph, weights)(*inputs())
      return jnp.sum(velocity**2), velocity

    with jax.disable_jit():  # XLA for CPUs leaves roundings out
      return jax.grad(loss, has_aux=True)(weights)

  (plain, velocity), (unrounded, same) = of("compute"), of("float32")
  np.testing.assert_array_equal(same, velocity)
  for name in ("blocks", "t_embedder", "final_layer"):
    for a, b in zip(jax.tree.leaves(plain[name]), jax.tree.leaves(unrounded[name]), strict=True):
      assert a.dtype == b.dtype == jnp.float32
      cases.assert_near(b, a, 0.02)
      if a.ndim > 1 + (name == "blocks"):
        assert (a == a.astype(jnp.bfloat16)).all()
        assert (b != b.astype(jnp.bfloat16)).mean() > 0.9


def test_bfloat16_stays_near_float32():
  """And the residual stream, which the scan over blocks carries, is float32 all the same."""
  model = awake(dtype=jnp.bfloat16)
  rounded = jax.jit(model)(*inputs())
  assert rounded.dtype == jnp.float32
  cases.assert_near(rounded, jax.jit(awake())(*inputs()), 0.02)
  equations = jax.make_jaxpr(model)(*inputs()).eqns
  (stream,) = next(e.outvars for e in equations if e.primitive.name == "scan")
  assert stream.aval.dtype == jnp.float32


def test_sampling_on_tpus_deviates_as_their_default_precision_does(monkeypatch):
  """Factors rounded to bfloat16 and queries and keys twice, against factors rounded once."""
  size = {"hidden_size": 128}
  exact = jax.jit(awake(**size))(*inputs())

  def deviation(model):
    return float(jnp.linalg.norm(jax.jit(model)(*inputs()) - exact) / jnp.linalg.norm(exact))

  def rounded(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32) if x.dtype == jnp.float32 else x

  in_bfloat16 = deviation(awake(**size, dtype=jnp.bfloat16))
  for primitive in (jax.lax.dot_general_p, jax.lax.conv_general_dilated_p):

    def bind(a, b, bind=primitive.bind, **params):
      is_exact = "HIGHEST" in str(params["precision"])
      return bind(a, b, **params) if is_exact else bind(rounded(a), rounded(b), **params)

    monkeypatch.setattr(primitive, "bind", bind)
  by_default = deviation(awake(**size))
  wide = {"dtype": jnp.bfloat16, "results": jnp.float32}
  ours = deviation(awake(**size, **wide, attention="pallas"))
  assert 1e-4 < by_default < in_bfloat16
  assert ours < 1.1 * by_default


def test_published_sizes():
  """The paper's 675M for XL/1; every preset builds."""
  counts = {}
  for name, size in PRESETS.items():
    model = functional.abstract(lambda rngs, size=size: LightningDiT(**size, rngs=rngs))
    counts[name] = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model)))
  assert len(counts) == 10
  assert round(counts["LightningDiT-XL/1"] / 1e6) == 675


@pytest.mark.parametrize(
  ("kwargs", "message"),
  [
    ({"num_heads": 3}, "multiple of num_heads=3"),
    ({"hidden_size": 36}, "head size hidden_size/num_heads=18"),
    ({"hidden_size": 34, "use_rope": False}, "hidden_size=34 must be a multiple of 4"),
    ({"patch_size": 3}, "multiple of patch_size=3"),
    ({"remat_policy": "some"}, "remat_policy is 'some'; choose one of auto, full, attended, dense"),
    ({"attention": "flash"}, "attention is 'flash'; choose one of auto, xla, cudnn"),
  ],
)
def test_sizes_that_do_not_divide_are_refused(kwargs, message):
  with pytest.raises(ValueError, match=message):
    LightningDiT(**(TINY | kwargs), rngs=nnx.Rngs(0))


def test_an_unknown_preset_gets_a_list():
  with pytest.raises(ValueError, match=r"'LightningDiT-S/1'; choose one of LightningDiT-B/1,"):
    preset("LightningDiT-S/1")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda x, t, label: (x[..., :2], t, label), r"\[B,h,w,3\]"),
    (lambda x, t, label: (x[:, :3], t, label), "3 x 6 cells"),
    (lambda x, t, label: (x, t[0], label), r"shape \(3,\)"),
    (lambda x, t, label: (x, t, label[:1]), r"shape \(3,\)"),
  ],
)
def test_inputs_that_do_not_fit_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    awake(patch_size=2)(*change(*inputs()))


def test_fresh_weights_are_those_of_flaxs_own_streams():
  def build(rngs):
    return LightningDiT(**TINY, rngs=rngs)

  @jax.jit
  def both(key):
    return functional.init(build, key), nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key))))

  jax.tree.map(np.testing.assert_array_equal, *both(jax.random.key(5)))
