"""DINOv2 and MAE agree with timm and transformers, under every publisher's names."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests import cases
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.teachers import teacher_from_torch, vit
from vavae_jax.teachers.dinov2 import FAMILY as DINOV2
from vavae_jax.teachers.layers import resize
from vavae_jax.teachers.mae import FAMILY as MAE
from vavae_jax.weights.state_dicts import read_state_dict

# Twelve layers in float32 differ from PyTorch's by 1e-6.
TOLERANCE = 1e-5
SWIGLU = {
  "hidden_size": 32,
  "depth": 2,
  "num_heads": 4,
  "grid_size": 4,
  "patch_size": 14,
  "mlp_size": 88,
  "num_registers": 4,
  "use_swiglu": True,
  "use_layer_scale": True,
}
TINY = {"hidden_size": 32, "depth": 2, "num_heads": 4, "grid_size": 4, "patch_size": 16}


def picture(size: int) -> np.ndarray:
  return cases.nhwc(np.tanh(procedural.normal(f"image_{size}", (1, 3, size, size))))


def tiny_mae() -> dict[str, np.ndarray]:
  """A small encoder by facebook's names."""
  width = TINY["hidden_size"]
  shapes = {
    "cls_token": (1, 1, width),
    "pos_embed": (1, 17, width),
    "patch_embed.proj.weight": (width, 3, 16, 16),
    "patch_embed.proj.bias": (width,),
    "norm.weight": (width,),
    "norm.bias": (width,),
  }
  for i in range(TINY["depth"]):
    for name, outputs, inputs in (
      ("attn.qkv", 3 * width, width),
      ("attn.proj", width, width),
      ("mlp.fc1", 4 * width, width),
      ("mlp.fc2", width, 4 * width),
    ):
      shapes |= {
        f"blocks.{i}.{name}.weight": (outputs, inputs),
        f"blocks.{i}.{name}.bias": (outputs,),
      }
    for name in ("norm1", "norm2"):
      shapes |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
  return procedural.state_dict(shapes)


def mae(state_dict: dict[str, np.ndarray], **options) -> vit.ViT:
  return MAE.from_torch(state_dict, **TINY, **options)


def run(teacher: vit.ViT, image: np.ndarray, method: str = "tokens") -> jax.Array:
  """A method under jit, weights as arguments: as constants they would be compiled in."""
  graph, weights = nnx.split(teacher)
  return jax.jit(lambda w, image: getattr(nnx.merge(graph, w), method)(image))(weights, image)


def features(teacher: vit.ViT) -> jax.Array:
  return run(teacher, procedural.uniform("image", (2, 48, 80, 3), -1, 1), "__call__")


@pytest.fixture(scope="module")
def dinov2():
  return teacher_from_torch("dinov2_vits14", cases.load("dinov2_vits14")[1])


@pytest.mark.parametrize(
  ("name", "size"), [("dinov2_vits14", 56), ("dinov2_vits14_reg", 56), ("mae_vits16", 64)]
)
def test_tokens_match_reference(name, size):
  _, weights, expected = cases.load(name)
  teacher = teacher_from_torch(name, weights)
  cases.assert_near(run(teacher, picture(size)), expected[f"features_{size}"], TOLERANCE)


def test_features_of_256_pixels_match_reference(dinov2):
  expected = cases.load("dinov2_vits14")[2]
  small = resize(jnp.asarray(picture(256)), 224, 224)
  cases.assert_near(small[:, :8, :8], cases.nhwc(expected["resized_corner"]), 1e-6)
  found = run(dinov2, picture(256), "__call__")
  cases.assert_near(found[..., ::4], cases.nhwc(expected["grid_from_256"]), TOLERANCE)


def facebook_from_transformers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """DINOv2 by transformers' names -> by facebook's."""
  named = {}
  for name, array in tensors.items():
    if "query" in name:
      parts = [tensors[name.replace("query", part)] for part in ("query", "key", "value")]
      array = np.concatenate(parts)
    for pattern, replacement in (
      ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
      ("embeddings.position_embeddings", "pos_embed"),
      ("embeddings.", ""),
      ("encoder.layer.", "blocks."),
      ("attention.output.dense", "attn.proj"),
      ("attention.attention.query", "attn.qkv"),
      ("layer_scale1.lambda1", "ls1.gamma"),
      ("layer_scale2.lambda1", "ls2.gamma"),
      ("mlp.weights_in", "mlp.w12"),
      ("mlp.weights_out", "mlp.w3"),
      ("layernorm.", "norm."),
    ):
      name = name.replace(pattern, replacement)
    if not re.search("attention.(key|value)", name):
      named[name] = array
  return named


def timm_from_facebook(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """DINOv2 with registers by facebook's names -> by timm's."""
  named = {
    k.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): tensors[k] for k in tensors
  }
  del named["mask_token"]
  named["reg_token"] = named.pop("register_tokens")
  positions = named["pos_embed"]
  return named | {"cls_token": named["cls_token"] + positions[:, :1], "pos_embed": positions[:, 1:]}


@pytest.mark.parametrize("publisher", ["transformers", "facebook", "timm"])
def test_swiglu_and_registers_under_every_name(publisher):
  _, weights, expected = cases.load("dinov2_swiglu")
  if publisher != "transformers":
    weights = facebook_from_transformers(weights)
  if publisher == "timm":
    weights = timm_from_facebook(weights)
  teacher = DINOV2.from_torch(weights, **SWIGLU)
  cases.assert_near(run(teacher, picture_pair()), expected["tokens_56x56"], TOLERANCE)


def picture_pair() -> np.ndarray:
  return cases.nhwc(np.tanh(procedural.normal("image_56x56", (2, 3, 56, 56))))


def transformers_from_facebook(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """MAE by facebook's names -> by those of transformers, with a decoder."""
  named = {"decoder.mask_token": np.zeros((1, 1, 16)), "decoder.decoder_norm.bias": np.zeros(16)}
  for name, array in tensors.items():
    for pattern, replacement in (
      ("patch_embed.proj", "embeddings.patch_embeddings.projection"),
      ("cls_token", "embeddings.cls_token"),
      ("pos_embed", "embeddings.position_embeddings"),
      ("norm.", "layernorm."),
      ("blocks", "encoder.layer"),
      ("norm1", "layernorm_before"),
      ("norm2", "layernorm_after"),
      ("attn.proj", "attention.output.dense"),
      ("mlp.fc1", "intermediate.dense"),
      ("mlp.fc2", "output.dense"),
    ):
      name = name.replace(pattern, replacement)
    if "qkv" in name:
      for part, value in zip(("query", "key", "value"), np.split(array, 3), strict=True):
        named["vit." + name.replace("attn.qkv", f"attention.attention.{part}")] = value
    else:
      named[f"vit.{name}"] = array
  return named


@pytest.mark.parametrize(
  "rename",
  [
    transformers_from_facebook,
    lambda tensors: {"model": tensors},
    lambda tensors: {f"module.{name}": array for name, array in tensors.items()},
    lambda tensors: tensors | {"mask_token": np.zeros(3), "decoder_pred.bias": np.zeros(3)},
  ],
  ids=["transformers", "checkpoint", "data parallel", "with decoder"],
)
def test_names_and_wrappers_of_mae(rename):
  weights = tiny_mae()
  np.testing.assert_array_equal(features(mae(rename(weights))), features(mae(weights)))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"head.weight": np.zeros((5, 32))}, "unknown: head.weight"),
    ({"reg_token": np.zeros((1, 4, 32))}, "unknown: reg_token"),
    (
      {"norm.bias": None, "blocks.1.attn.proj.bias": None},
      "missing: blocks.1.attn.proj.bias, norm",
    ),
    ({"pos_embed": np.zeros((1, 16, 32))}, r"pos_embed \(1, 16, 32\) instead of \(1, 17, 32\)"),
    ({"blocks.0.mlp.fc1.weight": np.zeros((32, 128))}, r"fc1.weight \(32, 128\) instead of \(128"),
    ({"cls_token": np.full((1, 1, 32), np.inf)}, "not finite: cls_token"),
  ],
)
def test_other_weights_are_refused(change, message):
  altered = {name: v for name, v in (tiny_mae() | change).items() if v is not None}
  with pytest.raises(InputError, match=message):
    mae(altered)


def test_errors_bear_the_names_of_the_file():
  weights = transformers_from_facebook(tiny_mae())
  del weights["vit.encoder.layer.1.attention.attention.key.bias"]
  weights["vit.encoder.layer.0.intermediate.dense.bias"] = np.zeros(5)
  weights["vit.pooler.dense.bias"] = np.zeros(32)
  with pytest.raises(InputError) as error:
    mae(weights)
  for part in (
    r"unknown: .*encoder\.layer\.1\.attention\.attention\.query\.bias.*pooler\.dense\.bias",
    r"missing: encoder\.layer\.1\.attention\.attention\.query\+.*key\+.*value\.bias;",
    r"of another shape: encoder\.layer\.0\.intermediate\.dense\.bias \(5,\) instead of \(128,\)",
  ):
    assert re.search(part, str(error.value))


def test_parts_of_another_shape_do_not_make_up_a_whole():
  weights = transformers_from_facebook(tiny_mae())
  attention = "vit.encoder.layer.0.attention.attention"
  weights |= {f"{attention}.query.bias": np.zeros(16), f"{attention}.key.bias": np.zeros(48)}
  with pytest.raises(InputError, match=r"unknown: .*query\.bias.*missing: .*query\+.*value\.bias"):
    mae(weights)


def test_registers_of_another_publisher_are_not_mixed():
  """facebook's positions have a row for the class token, timm's have none."""
  weights = timm_from_facebook(facebook_from_transformers(cases.load("dinov2_swiglu")[1]))
  weights["pos_embed"] = np.zeros((1, 17, 32))
  with pytest.raises(InputError, match=r"pos_embed \(1, 17, 32\) instead of \(1, 16, 32\)"):
    DINOV2.from_torch(weights, **SWIGLU)


def test_features_are_the_patches_row_by_row():
  weights = cases.load("dinov2_swiglu")[1]
  teacher = DINOV2.from_torch(weights, **SWIGLU)
  image = procedural.uniform("image", (2, 48, 80, 3), -1, 1)
  tokens = run(teacher, resize(jnp.asarray(image), 42, 70))
  assert (teacher.stride, teacher.feature_size) == (16, 32)
  assert tokens.shape == (2, 1 + 4 + 3 * 5, 32)
  cases.assert_near(features(teacher)[:, 2, 1], tokens[:, 5 + 2 * 5 + 1], 1e-6)


def test_bfloat16_stays_near_float32():
  half, full = features(mae(tiny_mae(), dtype=jnp.bfloat16)), features(mae(tiny_mae()))
  assert (half.dtype, full.dtype) == (jnp.bfloat16, jnp.float32)
  cases.assert_near(half.astype(jnp.float32), full, 3e-2)
  assert jnp.abs(half - full).max() > 0


def test_normalisation_is_an_option():
  image = procedural.uniform("image", (1, 32, 48, 3), -1, 1)
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  by_hand = (((image + 1) / 2 - mean) / std).astype(np.float32)
  found = run(mae(tiny_mae(), normalize=True), image)
  cases.assert_near(found, run(mae(tiny_mae()), by_hand), 1e-5)


@pytest.mark.parametrize(
  ("shape", "message"),
  [
    ((1, 40, 32, 3), "40 x 32 pixels do not divide.*multiples of 16"),
    ((1, 32, 250, 3), "32 x 250 pixels"),
    ((1, 0, 32, 3), "0 x 32 pixels"),
    ((1, 3, 32, 32), r"\(1, 3, 32, 32\); \[B,H,W,3\]"),
    ((32, 32, 3), r"\(32, 32, 3\)"),
  ],
)
def test_images_that_do_not_divide_are_refused(shape, message):
  teacher = mae(tiny_mae())
  with pytest.raises(InputError, match=message):
    teacher(jnp.zeros(shape))


@pytest.mark.torch
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("swiglu", [False, True])
def test_dinov2_agrees_with_transformers(registers, swiglu, tmp_path):
  import torch

  transformers = pytest.importorskip("transformers")
  sizes = {
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "image_size": 56,
    "patch_size": 14,
    "use_swiglu_ffn": swiglu,
  }
  torch.manual_seed(registers + swiglu)
  if registers:
    config = transformers.Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
    module = transformers.Dinov2WithRegistersModel(config)
  else:
    module = transformers.Dinov2Model(transformers.Dinov2Config(**sizes))
  shake(module)
  module.eval().save_pretrained(tmp_path)
  teacher = DINOV2.from_torch(
    read_state_dict(tmp_path / "model.safetensors"),
    hidden_size=48,
    depth=3,
    num_heads=3,
    grid_size=4,
    patch_size=14,
    mlp_size=128 if swiglu else None,
    num_registers=registers,
    use_swiglu=swiglu,
    use_layer_scale=True,
  )
  image = picture_pair()
  with torch.no_grad():
    expected = module(torch.tensor(np.moveaxis(image, -1, 1))).last_hidden_state
  cases.assert_near(run(teacher, image), expected, TOLERANCE)


@pytest.mark.torch
def test_mae_agrees_with_transformers(tmp_path):
  import torch

  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.ViTMAEConfig(
    hidden_size=32,
    num_attention_heads=4,
    num_hidden_layers=2,
    intermediate_size=128,
    image_size=64,
    patch_size=16,
    layer_norm_eps=1e-6,  # facebook's own; the default of transformers is 1e-12
    mask_ratio=0.0,
    decoder_hidden_size=16,
    decoder_num_attention_heads=2,
    decoder_num_hidden_layers=1,
    decoder_intermediate_size=16,
  )
  module = transformers.ViTMAEForPreTraining(config)
  shake(module)
  module.eval().save_pretrained(tmp_path)
  teacher = mae(read_state_dict(tmp_path / "model.safetensors"))
  image = picture(64)
  with torch.no_grad():
    # Patches are sorted by the noise, and none is masked.
    noise = torch.arange(16.0)[None]
    expected = module.vit(torch.tensor(np.moveaxis(image, -1, 1)), noise=noise).last_hidden_state
  cases.assert_near(run(teacher, image), expected, TOLERANCE)


def shake(module) -> None:
  """Random values for all weights: zeros and ones of an initialisation would hide mistakes."""
  import torch

  with torch.no_grad():
    for parameter in module.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
