"""Initial weights: what is kept, what is initialised anew, what is refused; PyTorch's names."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict
from safetensors.numpy import save_file

from configs import base
from launch.convert import convert
from launch.evaluation.features import load_network
from launch.restore import initial_weights
from lightningdit_jax import training, warm_start
from lightningdit_jax.convert import from_torch
from lightningdit_jax.model import LightningDiT
from tests import cases
from vavae_jax.common import addresses, functional
from vavae_jax.common.errors import InputError
from vavae_jax.perceptual import load_lpips
from vavae_jax.teachers import load_teacher
from vavae_jax.weights.state_dicts import read_state_dict

TINY = {"in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}


def params(seed=0, **changes):
  build = functools.partial(_build, changes)
  return jax.jit(lambda key: functional.init(build, key))(jax.random.key(seed))


def _build(changes, rngs):
  return LightningDiT(**(TINY | changes), rngs=rngs)


def leaf(tree, *path):
  return functools.reduce(lambda node, name: node[name], path, tree)


def test_the_same_architecture_is_taken_over_whole():
  given = params(1)
  taken, notes = warm_start.adapt(params(0), given)
  assert notes == []
  jax.tree.map(np.testing.assert_array_equal, taken, given)


@pytest.mark.parametrize(("there", "here"), [(3, 5), (5, 3)])
def test_channels_that_both_have_are_kept_and_the_others_are_zero(there, here):
  """The reference's `weight[:, :16] = param[:, :16]`, for any number."""
  given, fresh = params(1, in_channels=there), params(0, in_channels=here)
  taken, notes = warm_start.adapt(fresh, given)
  old, new = given["x_embedder"]["kernel"], taken["x_embedder"]["kernel"]
  np.testing.assert_array_equal(new[:, :, :3], old[:, :, :3])
  assert not new[:, :, 3:].any()
  head = ("final_layer", "linear", "kernel")
  np.testing.assert_array_equal(leaf(taken, *head), leaf(fresh, *head))
  assert len(notes) == 3  # embedder, and the head's kernel and bias


def test_another_number_of_classes_starts_the_labels_afresh():
  given, fresh = params(1, num_classes=7), params(0)
  taken, notes = warm_start.adapt(fresh, given)
  np.testing.assert_array_equal(taken["y_embedder"]["embedding"], fresh["y_embedder"]["embedding"])
  np.testing.assert_array_equal(
    leaf(taken, "blocks", "attn", "qkv", "kernel"), leaf(given, "blocks", "attn", "qkv", "kernel")
  )
  (note,) = notes
  assert "y_embedder/embedding starts afresh: (8, 32) there, (6, 32) here" in note


def test_a_head_that_also_predicts_a_variance_is_another_architecture():
  with pytest.raises(InputError, match=r"final_layer/linear/bias \(\(3,\) here, \(6,\) there"):
    warm_start.adapt(params(0), params(1, learn_sigma=True))


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"depth": 3}, {"use_qknorm": True}])
def test_another_architecture_is_refused(change):
  with pytest.raises(InputError, match="another architecture: blocks/"):
    warm_start.adapt(params(0), params(1, **change))


def reference_config(path, **model):
  """A configuration for the training checkpoint of the reference's sample files, changed."""
  config = base.diffusion()
  config.model.update(cases.load("dit_default")[0]["config"] | model)
  config.update(dtype="float32", init_from=str(path))
  return FrozenConfigDict(config)


def test_a_file_of_the_reference_is_a_beginning(tmp_path):
  """Of PyTorch's names, with the prefix of data parallelism, for another number of classes."""
  spec, weights, _ = cases.load("dit_default")
  path = tmp_path / "weights.safetensors"
  save_file({f"module.{name}": value for name, value in weights.items()}, path)
  config = reference_config(path, num_classes=4)
  state = jax.jit(functools.partial(training.init_state, config))(jax.random.key(0))
  adopted = initial_weights(config)(state)
  expected = nnx.to_pure_dict(nnx.state(from_torch(weights, **spec["config"])))
  path_of_qkv = ("blocks", "attn", "qkv", "kernel")
  np.testing.assert_array_equal(leaf(adopted.params, *path_of_qkv), leaf(expected, *path_of_qkv))
  (average,) = adopted.ema.values()
  jax.tree.map(np.testing.assert_array_equal, average, adopted.params)
  assert adopted.params["y_embedder"]["embedding"].shape == (5, 48)


def test_a_converted_workdir_is_a_beginning(tmp_path):
  weights = convert(
    str(cases.FOLDER / "formats" / "lightningdit_train_checkpoint.pt"), tmp_path / "run"
  ).weights
  config = reference_config(tmp_path / "run", **weights.arguments)
  state = jax.jit(functools.partial(training.init_state, config))(jax.random.key(0))
  adopted = initial_weights(config)(state)
  expected = nnx.to_pure_dict(nnx.state(from_torch(weights.tensors, **weights.arguments)))
  jax.tree.map(np.testing.assert_array_equal, adopted.params, expected)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("nothing.pt", "does not exist"),
    ("weights.txt", r"ends in one of \.pt"),
    ("bad.safetensors", "is damaged"),
  ],
)
def test_what_is_no_beginning_is_named(tmp_path, name, message):
  if not name.startswith("nothing"):
    (tmp_path / name).write_bytes(b"no weights")
  with pytest.raises(InputError, match=message):
    initial_weights(reference_config(tmp_path / name))


def test_weights_of_something_else_are_refused(tmp_path):
  save_file({"conv.weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
  with pytest.raises(InputError, match=r"not a LightningDiT's.*conv\.weight"):
    initial_weights(reference_config(tmp_path / "other.safetensors"))


@pytest.mark.parametrize(
  "read",
  [
    lambda name: initial_weights(reference_config(name)),
    lambda name: convert(name, Path("nowhere")),
    lambda name: convert(str(cases.FOLDER / "formats/torch_zip.pt"), Path("nowhere"), heads=name),
    read_state_dict,
    lambda name: load_teacher("efficientnet_lite0", name),
    lambda name: load_network("adm", name),
    load_lpips,
  ],
)
def test_whatever_reads_weights_reads_those_of_the_hub(read, monkeypatch):
  asked = []

  def download(repository, file):
    asked.append((repository, file))
    raise OSError("no network")

  monkeypatch.setattr(addresses.huggingface_hub, "hf_hub_download", download)
  with pytest.raises(InputError, match=r"could not be fetched \(no network\).*give its path"):
    read("hf:OWNER/NAME/folder/file.pt")
  assert asked == [("OWNER/NAME", "folder/file.pt")]
