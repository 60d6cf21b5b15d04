"""CLIP's image tower agrees with transformers, under every publisher's names."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests import cases
from tests.reference import procedural
from vavae_jax.common.errors import InputError
from vavae_jax.teachers.clip import FAMILY as CLIP
from vavae_jax.weights.state_dicts import read_state_dict

TOLERANCE = 1e-5
SIZES = {
  "hidden_size": 32,
  "depth": 3,
  "num_heads": 4,
  "mlp_size": 64,
  "grid_size": 4,
  "patch_size": 16,
}
SPEC, WEIGHTS, EXPECTED = cases.load("clip_tiny")


def picture() -> np.ndarray:
  return cases.nhwc(np.tanh(procedural.normal("image_64x64", (2, 3, 64, 64))))


def tower() -> dict[str, np.ndarray]:
  """The image tower alone, by transformers' names without prefix."""
  prefix = "vision_model."
  return {k.removeprefix(prefix): v for k, v in WEIGHTS.items() if k.startswith(prefix)}


def other_names(table: tuple[tuple[str, str], ...], prefix: str = "") -> dict[str, np.ndarray]:
  """The tower with queries, keys and values put together, and parts of its names replaced."""
  named = {}
  for name, array in tower().items():
    if "k_proj" in name or "v_proj" in name:
      continue
    if "q_proj" in name:
      array = np.concatenate([tower()[name.replace("q_proj", f"{x}_proj")] for x in "qkv"])
    for theirs, others in table:
      name = name.replace(theirs, others)
    named[prefix + name] = array
  return named


def openai() -> dict[str, np.ndarray]:
  table = (
    ("embeddings.patch_embedding", "conv1"),
    ("embeddings.class_embedding", "class_embedding"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers", "transformer.resblocks"),
    ("self_attn.q_proj.", "attn.in_proj_"),
    ("self_attn", "attn"),
    ("layer_norm", "ln_"),
    ("pre_layrnorm", "ln_pre"),
    ("post_layernorm", "ln_post"),
    ("fc1", "c_fc"),
    ("fc2", "c_proj"),
  )
  text = {
    "transformer.resblocks.0.attn.in_proj_weight": np.zeros((3, 1)),
    "token_embedding.weight": np.zeros((2, 1)),
    "positional_embedding": np.zeros((2, 1)),
    "ln_final.bias": np.zeros(1),
    "text_projection": np.zeros((1, 1)),
    "logit_scale": np.zeros(()),
    "visual.proj": np.zeros((32, 8)),
  }
  return other_names(table, "visual.") | text


def timm() -> dict[str, np.ndarray]:
  table = (
    ("embeddings.patch_embedding", "patch_embed.proj"),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding.weight", "pos_embed"),
    ("encoder.layers", "blocks"),
    ("self_attn.q_proj", "attn.qkv"),
    ("self_attn.out_proj", "attn.proj"),
    ("post_layernorm", "norm"),
    ("pre_layrnorm", "norm_pre"),
    ("layer_norm", "norm"),
  )
  named = other_names(table) | {"head.weight": np.zeros((8, 32)), "head.bias": np.zeros(8)}
  named["cls_token"] = named["cls_token"][None, None]
  named["pos_embed"] = named["pos_embed"][None]
  return named


@pytest.mark.parametrize(
  "weights",
  [
    WEIGHTS,
    tower(),
    WEIGHTS | {"vision_model.embeddings.position_ids": np.arange(17)[None]},
    openai(),
    timm(),
  ],
  ids=["transformers", "its image tower", "an older transformers", "openai", "timm"],
)
def test_tokens_match_reference_under_every_name(weights):
  teacher = CLIP.from_torch(weights, **SIZES)
  tokens = jax.jit(teacher.tokens)(picture())
  cases.assert_near(tokens, EXPECTED["tokens_64x64"], TOLERANCE)


def test_features_are_the_patches():
  teacher = CLIP.from_torch(WEIGHTS, **SIZES)
  features = jax.jit(teacher.__call__)(picture())
  assert (teacher.stride, teacher.feature_size) == (16, 32)
  cases.assert_near(features.reshape(2, 16, 32), EXPECTED["tokens_64x64"][:, 1:], TOLERANCE)


def test_normalisation_is_openais():
  mean = np.array([0.48145466, 0.4578275, 0.40821073])
  std = np.array([0.26862954, 0.26130258, 0.27577711])
  by_hand = (((picture() + 1) / 2 - mean) / std).astype(np.float32)
  found = jax.jit(CLIP.from_torch(WEIGHTS, normalize=True, **SIZES).tokens)(picture())
  expected = jax.jit(CLIP.from_torch(WEIGHTS, **SIZES).tokens)(by_hand)
  cases.assert_near(found, expected, TOLERANCE)


@pytest.mark.parametrize(
  ("weights", "message"),
  [
    (openai() | {"visual.attnpool.c_proj.bias": np.zeros(3)}, r"unknown: attnpool\.c_proj\.bias"),
    (openai() | {"visual.conv1.weight": np.zeros((32, 3, 8, 8))}, r"conv1\.weight \(32, 3, 8, 8\)"),
    (timm() | {"patch_embed.proj.bias": np.zeros(32)}, r"unknown: patch_embed\.proj\.bias"),
    (
      {k: v for k, v in openai().items() if "ln_pre" not in k},
      r"missing: ln_pre\.bias, ln_pre\.weight",
    ),
    (
      {k: v for k, v in WEIGHTS.items() if "vision_model" not in k},
      "missing: .*",
    ),
  ],
)
def test_other_weights_are_refused(weights, message):
  with pytest.raises(InputError, match=message):
    CLIP.from_torch(weights, **SIZES)


@pytest.mark.torch
def test_agrees_with_transformers(tmp_path):
  import torch

  transformers = pytest.importorskip("transformers")
  torch.manual_seed(0)
  config = transformers.CLIPVisionConfig(
    hidden_size=48,
    num_attention_heads=3,
    num_hidden_layers=2,
    intermediate_size=96,
    image_size=42,
    patch_size=14,
  )
  module = transformers.CLIPVisionModel(config).eval()
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.add_(0.1 * torch.randn_like(parameter))
  module.save_pretrained(tmp_path)
  teacher = CLIP.from_torch(
    read_state_dict(tmp_path / "model.safetensors"),
    hidden_size=48,
    depth=2,
    num_heads=3,
    mlp_size=96,
    grid_size=3,
    patch_size=14,
  )
  image = procedural.uniform("image", (2, 3, 42, 42), -1, 1)
  tower = getattr(module, "vision_model", module)  # version 5 has no module in between
  with torch.no_grad():
    expected = tower.post_layernorm(module(torch.tensor(image)).last_hidden_state)
  cases.assert_near(teacher.tokens(cases.nhwc(image)), expected, TOLERANCE)
