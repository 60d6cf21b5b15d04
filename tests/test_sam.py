"""SAM's image encoder agrees with transformers, under every publisher's names."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import cases
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.teachers.sam import FAMILY as SAM
from vavae_jax.weights.state_dicts import read_state_dict

TOLERANCE = 1e-5
SIZES = {
  "hidden_size": 32,
  "depth": 3,
  "num_heads": 4,
  "mlp_size": 64,
  "global_blocks": (1,),
  "grid_size": 6,
  "window_size": 4,
  "feature_size": 16,
}
SPEC, WEIGHTS, EXPECTED = cases.load("sam_tiny")


def picture(height: int, width: int) -> np.ndarray:
  name = f"image_{height}x{width}"
  return cases.nhwc(np.tanh(procedural.normal(name, (2, 3, height, width))))


def facebook() -> dict[str, np.ndarray]:
  """By segment-anything's names, with parts of the rest of the model."""
  rest = {
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": np.zeros((2, 8)),
    "mask_decoder.iou_token.weight": np.zeros((1, 16)),
  }
  named = {}
  for name, array in WEIGHTS.items():
    for theirs, others in (
      ("vision_encoder", "image_encoder"),
      ("patch_embed.projection", "patch_embed.proj"),
      ("neck.conv1", "neck.0"),
      ("neck.layer_norm1", "neck.1"),
      ("neck.conv2", "neck.2"),
      ("neck.layer_norm2", "neck.3"),
      ("layers.", "blocks."),
      ("layer_norm", "norm"),
    ):
      name = name.replace(theirs, others)
    named[name] = array
  return named | rest


def timm() -> dict[str, np.ndarray]:
  prefix = "image_encoder."
  return {
    name.removeprefix(prefix).replace("lin1", "fc1").replace("lin2", "fc2"): array
    for name, array in facebook().items()
    if name.startswith(prefix)
  }


@pytest.mark.parametrize("weights", [WEIGHTS, facebook(), timm()], ids=["hf", "facebook", "timm"])
def test_features_match_reference_under_every_name(weights):
  teacher = SAM.from_torch(weights, **SIZES)
  found = jax.jit(teacher.__call__)(picture(96, 96))
  assert (teacher.stride, teacher.feature_size) == (16, 16)
  cases.assert_near(found, cases.nhwc(EXPECTED["features_96x96"]), TOLERANCE)


def test_positions_are_resampled_for_other_sizes():
  found = jax.jit(SAM.from_torch(WEIGHTS, **SIZES).__call__)(picture(80, 112))
  cases.assert_near(found, cases.nhwc(EXPECTED["features_80x112"]), TOLERANCE)


def test_a_window_sees_itself_only():
  """Without global blocks and across the neck's one cell, a window's features are its own."""
  weights = {
    name.replace("layers.2.", "layers.1."): array
    for name, array in WEIGHTS.items()
    if "layers.1." not in name
  }
  teacher = SAM.from_torch(weights, **(SIZES | {"depth": 2, "global_blocks": ()}))
  image = jnp.asarray(picture(96, 96))
  gradient = jax.grad(lambda image: teacher(image)[0, 1, 2].sum())
  touched = np.abs(jax.jit(gradient)(image)).sum(-1) > 0
  assert touched[0, :64, :64].all()
  assert not touched[0, 64:].any()
  assert not touched[0, :, 64:].any()


def test_bfloat16_stays_near_float32():
  half = jax.jit(SAM.from_torch(WEIGHTS, dtype=jnp.bfloat16, **SIZES).__call__)(picture(96, 96))
  assert half.dtype == jnp.bfloat16
  cases.assert_near(half.astype(jnp.float32), cases.nhwc(EXPECTED["features_96x96"]), 3e-2)


def test_normalisation_is_imagenets():
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  by_hand = (((picture(32, 48) + 1) / 2 - mean) / std).astype(np.float32)
  found = jax.jit(SAM.from_torch(WEIGHTS, normalize=True, **SIZES).__call__)(picture(32, 48))
  expected = jax.jit(SAM.from_torch(WEIGHTS, **SIZES).__call__)(by_hand)
  cases.assert_near(found, expected, TOLERANCE)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"image_encoder.blocks.3.norm1.bias": np.zeros(32)}, r"unknown: blocks\.3\.norm1\.bias"),
    ({"image_encoder.neck.1.bias": None}, r"missing: neck\.1\.bias"),
    (
      {"image_encoder.blocks.1.attn.rel_pos_h": np.zeros((7, 8))},
      r"blocks\.1\.attn\.rel_pos_h \(7, 8\) instead of \(11, 8\)",
    ),
  ],
)
def test_other_weights_are_refused(change, message):
  altered = {name: v for name, v in (facebook() | change).items() if v is not None}
  with pytest.raises(InputError, match=message):
    SAM.from_torch(altered, **SIZES)


def test_images_that_do_not_divide_are_refused():
  with pytest.raises(InputError, match="96 x 90 pixels"):
    SAM.from_torch(WEIGHTS, **SIZES)(jnp.zeros((1, 96, 90, 3)))


def test_weights_can_be_arguments():
  """As in training, where constants would be compiled in."""
  teacher = SAM.from_torch(WEIGHTS, **SIZES)
  graph, weights = nnx.graphdef(teacher), nnx.to_pure_dict(nnx.state(teacher))
  found = jax.jit(lambda w, image: nnx.merge(graph, w)(image))(weights, picture(96, 96))
  cases.assert_near(found, cases.nhwc(EXPECTED["features_96x96"]), TOLERANCE)


@pytest.mark.torch
def test_agrees_with_transformers(tmp_path):
  import torch

  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.SamVisionConfig(
    hidden_size=24,
    num_attention_heads=3,
    num_hidden_layers=4,
    mlp_dim=48,
    image_size=80,
    patch_size=16,
    window_size=2,
    global_attn_indexes=[1, 3],
    output_channels=8,
  )
  module = transformers.SamVisionModel(config).eval()
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  module.save_pretrained(tmp_path)
  teacher = SAM.from_torch(
    read_state_dict(tmp_path / "model.safetensors"),
    hidden_size=24,
    depth=4,
    num_heads=3,
    mlp_size=48,
    global_blocks=(1, 3),
    grid_size=5,
    window_size=2,
    feature_size=8,
  )
  image = procedural.uniform("image", (2, 3, 80, 80), -1, 1)
  with torch.no_grad():
    expected = module(torch.tensor(image)).last_hidden_state
  found = jax.jit(teacher.__call__)(cases.nhwc(image))
  cases.assert_near(found, cases.nhwc(expected.numpy()), TOLERANCE)
