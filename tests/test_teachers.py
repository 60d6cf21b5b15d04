"""Teachers by name: their sizes, what they say where weights are missing, files of weights."""

from __future__ import annotations

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from tests import cases
from tests.reference import procedural
from vavae_jax import convert, teachers
from vavae_jax.common import functional
from vavae_jax.common.errors import InputError
from vavae_jax.teachers import NAMES, feature_size, fresh, load_teacher, teacher_from_torch
from vavae_jax.weights.state_dicts import read_state_dict
from vavae_jax.weights.torch_writer import write_torch_file

FORMATS = cases.FOLDER / "formats"
# Parameters of the published networks without heads, counted with timm.
PARAMETERS = {
  "dinov2_vits14": 22056192,
  "dinov2_vits14_reg": 22057344 + 384,  # timm has no row for the class token's position there
  "dinov2_vitb14": 86579712,
  "dinov2_vitb14_reg": 86582016 + 768,
  "dinov2_vitl14": 304367616,
  "dinov2_vitl14_reg": 304370688 + 1024,
  "dinov2_vitg14": 1136479232,
  "dinov2_vitg14_reg": 1136483840 + 1536,
  "mae_vits16": 21665664,
  "mae_vitb16": 85798656,
  "mae_vitl16": 303301632,
  "mae_vith14": 630764800,
  "clip_vitb16": 85799424,
  "clip_vitl14": 303179776,
  "sam_vitb16": 89670912,
  "sam_vitl16": 308278272,
}


def outline(name: str) -> nnx.Module:
  """The named network with shapes for weights."""
  return functional.abstract(lambda rngs: fresh(name, rngs))


def test_every_teacher_has_its_name():
  lites = {f"efficientnet_lite{i}" for i in ("0", "1", "2", "0_last")}
  assert {*NAMES} == {*PARAMETERS, *lites}
  assert convert.teacher_from_torch is teacher_from_torch


@pytest.mark.parametrize("name", PARAMETERS)
def test_sizes_are_those_published(name):
  leaves = jax.tree.leaves(nnx.state(outline(name)))
  assert sum(leaf.size for leaf in leaves) == PARAMETERS[name]


@pytest.mark.parametrize(
  ("name", "size"), [("dinov2_vitl14_reg", 1024), ("clip_vitl14", 1024), ("sam_vitb16", 256)]
)
def test_features_of_256_pixels(name, size):
  teacher = outline(name)
  features = nnx.eval_shape(lambda t, x: t(x), teacher, jnp.zeros((1, 256, 256, 3)))
  assert features.shape == (1, 16, 16, size)
  assert (teacher.stride, teacher.feature_size, feature_size(name)) == (16, size, size)


def test_unknown_teacher_lists_the_choices():
  with pytest.raises(InputError, match=r"no teacher 'dinov3'; choose one of: .*lite0.*mae_vith14"):
    load_teacher("dinov3")


@pytest.mark.parametrize(
  ("name", "sources"),
  [
    (
      "dinov2_vitl14",
      ["timm/vit_large_patch14_dinov2.lvd142m", "facebook/dinov2-large", "dinov2_vitl14_pretrain"],
    ),
    (
      "dinov2_vitg14_reg",
      ["vit_giant_patch14_reg4_dinov2", "dinov2-with-registers-giant", "vitg14_reg4_pretrain.pth"],
    ),
    ("mae_vith14", ["vit_huge_patch14_224.mae", "vit-mae-huge", "mae_pretrain_vit_huge.pth"]),
    ("mae_vits16", ["nobody publishes"]),
    (
      "clip_vitb16",
      ["vit_base_patch16_clip_224.openai", "hf:openai/clip-vit-base-patch16/model.safetensors"],
    ),
    ("sam_vitl16", ["samvit_large_patch16.sa1b", "facebook/sam-vit-large", "sam_vit_l_0b3195.pth"]),
  ],
)
@pytest.mark.parametrize("path", ["", "no/such/file.pth"])
def test_missing_weights_say_where_to_get_them(name, sources, path):
  with pytest.raises(InputError) as error:
    load_teacher(name, path)
  for part in (*sources, name, path, "config.teacher.weights="):
    assert part in str(error.value)


def test_weights_by_path(tmp_path):
  weights = cases.load("mae_vits16")[1]
  save_file(weights, tmp_path / "model.safetensors")
  teacher = load_teacher("mae_vits16", str(tmp_path / "model.safetensors"))
  np.testing.assert_array_equal(teacher.norm.bias[...], weights["norm.bias"])
  with pytest.raises(InputError, match=r"missing: blocks\.0\.ls1\.gamma"):
    load_teacher("dinov2_vits14", str(tmp_path / "model.safetensors"))


def test_efficientnet_normalises_in_any_case():
  image = procedural.uniform("image", (1, 32, 32, 3), -1, 1)
  plain, normalized = (load_teacher("efficientnet_lite0", normalize=n) for n in (False, True))
  np.testing.assert_array_equal(jax.jit(plain.__call__)(image), jax.jit(normalized.__call__)(image))


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "params", "ema_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "model.", "backbone.net."])
def test_checkpoints_are_opened(wrapper, prefix, tmp_path):
  weights = cases.load("mae_vits16")[1]
  content = {wrapper: {f"{prefix}{name}": x for name, x in weights.items()}, "step": {}}
  write_torch_file(tmp_path / "model.pt", content)
  teacher = load_teacher("mae_vits16", str(tmp_path / "model.pt"))
  np.testing.assert_array_equal(teacher.norm.bias[...], weights["norm.bias"])


@pytest.mark.parametrize(
  ("file", "message"),
  [
    (FORMATS / "truncated.pt", "truncated"),
    ("weights.onnx", r"weights\.onnx: a file of weights ends in one of \.pt, .*\.safetensors"),
    ("absent.safetensors", r"no file .*absent\.safetensors"),
  ],
)
def test_other_files_are_refused(file, message):
  with pytest.raises(InputError, match=message):
    read_state_dict(file)


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"not a file of tensors",
    struct.pack("<Q", 90) + json.dumps({"a": {"dtype": "F32", "shape": [4]}}).encode(),
  ],
)
def test_damaged_safetensors_are_refused(content, tmp_path):
  path = tmp_path / "model.safetensors"
  path.write_bytes(content)
  with pytest.raises(InputError, match=r"model\.safetensors is damaged"):
    read_state_dict(path)


def test_a_registered_function_is_a_teacher_of_its_own(monkeypatch):
  for table in ("FAMILIES", "NAMES", "CHOICES"):
    monkeypatch.setattr(teachers, table, list(getattr(teachers, table)))

  def colours(image):
    return image.reshape(len(image), image.shape[1] // 8, 8, image.shape[2] // 8, 8, 3).mean((2, 4))

  teachers.register("colours", colours, feature_size=3, stride=8)
  image = jnp.asarray(procedural.uniform("image", (2, 16, 24, 3)))
  mine = teachers.load_teacher("colours")
  np.testing.assert_allclose(mine(image), colours(image))
  assert (mine.stride, teachers.feature_size("colours"), teachers.CHOICES[-1]) == (8, 3, "colours")
  with pytest.raises(InputError, match="There is a teacher 'colours' already"):
    teachers.register("colours", colours, feature_size=3)
  with pytest.raises(InputError, match=r"\(2, 8, 6, 3\) .* have to be \(2, 4, 3, 5\)"):
    teachers.register("other", colours, feature_size=5)
