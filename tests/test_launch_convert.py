"""launch.convert: every file of formats/, both ways; what is refused leaves nothing behind."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import pickle
import re
import shutil
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from ml_collections import FrozenConfigDict
from safetensors.numpy import load_file, save_file

from configs import quickstart
from launch import restore
from launch.convert import convert, inspect
from launch.train import train
from launch.weights import recognition as weights
from launch.weights import released
from lightningdit_jax.model import build_model
from lightningdit_jax.store.latents import LatentStore
from tests import cases
from tests.reference import procedural
from tests.survive import flip_a_bit, largest_file
from vavae_jax import warm_start
from vavae_jax.autoencoder import PRESETS, Autoencoder
from vavae_jax.common import addresses, functional
from vavae_jax.common.errors import InputError
from vavae_jax.convert import autoencoder_arguments, autoencoder_names
from vavae_jax.teachers import recognise
from vavae_jax.weights import torch_weights
from vavae_jax.weights.state_dicts import read_content, read_state_dict
from vavae_jax.weights.torch_pickles import OddTensor, StandIn
from vavae_jax.weights.torch_writer import write_torch_file

FORMATS = cases.FOLDER / "formats"
LIGHTNINGDIT = {
  "lightningdit_bare_state_dict": "",
  "lightningdit_ema_module_prefix": "ema",
  "lightningdit_train_checkpoint": "ema",
}
INPUTS = {"latent": (2, 8, 4, 4), "image": (1, 3, 16, 16), "z": (1, 8, 4, 4)}
# Constants whose last bit a processor's cosine decides.
TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def stored(name: str, part: str) -> dict:
  content = read_content(FORMATS / f"{name}.pt")
  tensors = content[part] if part else content
  return {key.removeprefix("module."): value for key, value in tensors.items()}


def given(name: str) -> jnp.ndarray:
  return jnp.asarray(cases.nhwc(procedural.normal(name, INPUTS[name])))


def assert_same(a: dict, b: dict) -> None:
  assert a.keys() == b.keys()
  for name, value in a.items():
    assert value.dtype == b[name].dtype
    if name in TABLES:
      np.testing.assert_allclose(b[name], value, rtol=0, atol=2**-24)
    else:
      np.testing.assert_array_equal(b[name], value, err_msg=name, strict=True)


@pytest.mark.parametrize(
  ("name", "part"),
  [
    *((name, part) for name, part in LIGHTNINGDIT.items()),
    ("lightningdit_train_checkpoint", "model"),
  ],
)
def test_a_converted_lightningdit_is_the_references_and_goes_back(name, part, tmp_path):
  convert(str(FORMATS / f"{name}.pt"), tmp_path / "run", part=part)
  model = restore.load(tmp_path / "run", "diffusion")
  config = FrozenConfigDict(model.config.to_dict() | {"dtype": "float32"})
  graph = functional.graph_of(build_model(config))
  velocity = nnx.merge(graph, model.params)(
    given("latent"), jnp.array([0.25, 0.75]), jnp.array([1, 5])
  )
  with np.load(FORMATS / "outputs.npz") as outputs:
    cases.assert_near(velocity, cases.nhwc(outputs[f"{name}/{part}"]), 1e-5)
  for end in ("pt", "safetensors"):
    convert(str(tmp_path / "run"), tmp_path / f"back.{end}")
    assert_same(stored(name, part), read_state_dict(tmp_path / f"back.{end}"))


def test_a_converted_tokenizer_is_the_references_and_goes_back(tmp_path):
  done = convert(str(FORMATS / "vavae_lightning.ckpt"), tmp_path / "run")
  assert done.weights.aside == {
    "epoch": 1,
    "global_step": 1,
    "loss.logvar": 1,
    "loss.perceptual_loss": 7,
    "linear_proj": 1,
    "foundation_model": 2,
  }
  trained = restore.load(tmp_path / "run", "tokenizer")
  model = restore.autoencoder(trained.config, trained.params)
  posterior = model.encode(given("image"))
  with np.load(FORMATS / "outputs.npz") as outputs:
    mean = outputs["encoder"][:, :8]
    cases.assert_near(posterior.mean, cases.nhwc(mean), 1e-5)
    cases.assert_near(model.decode(given("z")), cases.nhwc(outputs["decoder"]), 1e-5)
  convert(str(tmp_path / "run"), tmp_path / "back.ckpt")
  state_dict = read_state_dict(FORMATS / "vavae_lightning.ckpt")
  own = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
  assert_same(
    {name: x for name, x in state_dict.items() if name.startswith(own)},
    read_state_dict(tmp_path / "back.ckpt"),
  )


def test_the_published_statistics_are_a_store_to_sample_with_and_go_back(tmp_path):
  convert(str(FORMATS / "latents" / "latents_stats.pt"), tmp_path / "store")
  store, whole = LatentStore(tmp_path / "store"), LatentStore(FORMATS / "latents")
  assert len(store) == 0
  np.testing.assert_array_equal(store.mean, whole.mean)
  np.testing.assert_array_equal(store.std, whole.std)
  back = tmp_path / "latents_stats.pt"
  convert(str(tmp_path / "store" / "latents_stats.safetensors"), back)
  assert_same(read_state_dict(FORMATS / "latents" / "latents_stats.pt"), read_state_dict(back))
  config = quickstart.diffusion(tiny=True)
  config.latents.path = str(tmp_path / "store")
  with pytest.raises(InputError, match="the statistics of latents and no latents"):
    train(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("name", "message"),
  [("hostile_pickle.pt", r"asks for posix\.system"), ("truncated.pt", "is truncated")],
)
def test_bad_files_leave_nothing(name, message, tmp_path):
  for dest in ("run", "file.safetensors"):
    with pytest.raises(InputError, match=message):
      convert(str(FORMATS / name), tmp_path / dest)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"final_layer.linear.bias": None}, "missing: final_layer.linear.bias"),
    ({"more.weight": np.zeros(3, np.float32)}, "unknown: more.weight"),
    ({"t_embedder.mlp.2.bias": np.zeros(3, np.float32)}, "of another shape: t_embedder.mlp.2.bias"),
    ({"t_embedder.mlp.2.bias": np.full(32, np.nan, np.float32)}, "not finite: t_embedder.mlp.2"),
  ],
)
def test_what_does_not_fit_is_listed_and_nothing_written(change, message, tmp_path):
  tensors = {**stored("lightningdit_bare_state_dict", ""), **change}
  source = tmp_path / "source.safetensors"
  save_file({name: x for name, x in tensors.items() if x is not None}, source)
  for dest in ("run", "file.pt"):
    with pytest.raises(InputError, match=re.escape(message)):
      convert(str(source), tmp_path / dest)
  assert list(tmp_path.iterdir()) == [source]


def test_what_is_there_is_not_written_over(tmp_path):
  (tmp_path / "there.pt").write_text("mine")
  with pytest.raises(InputError, match="already exists"):
    convert(str(FORMATS / "lightningdit_bare_state_dict.pt"), tmp_path / "there.pt")
  assert (tmp_path / "there.pt").read_text() == "mine"


def test_a_converted_workdir_is_no_training_that_could_go_on(tmp_path, pipeline):
  convert(str(FORMATS / "lightningdit_bare_state_dict.pt"), tmp_path / "run")
  config = quickstart.diffusion(tiny=True)
  config.latents.path = str(pipeline / "latents")
  (tmp_path / "run" / "config.json").unlink()
  with pytest.raises(InputError, match=r"--config\.init_from="):
    train(config, tmp_path / "run")


def test_weights_with_what_only_this_project_has_are_not_exported(pipeline, tmp_path):
  with pytest.raises(InputError, match=r"config\.model\.patch_size=16; the reference has only 1"):
    convert(str(pipeline / "tokenizer"), tmp_path / "file.pt")


def test_any_average_of_a_training_here_is_exported(pipeline, tmp_path):
  for decay, name in ((0.0, "raw.pt"), (0.5, "ema.pt")):
    convert(str(pipeline / "diffusion"), tmp_path / name, ema=decay)
    again = weights.recognise(read_content(tmp_path / name))
    expected = restore.load(pipeline / "diffusion", "diffusion", ema=decay).params
    state = nnx.to_pure_dict(nnx.state(again.module))
    np.testing.assert_array_equal(
      state["final_layer"]["linear"]["kernel"], expected["final_layer"]["linear"]["kernel"]
    )
  raw, ema = (read_state_dict(tmp_path / name) for name in ("raw.pt", "ema.pt"))
  assert not np.array_equal(raw["final_layer.linear.weight"], ema["final_layer.linear.weight"])


def to_diffusers(state_dict: dict, levels: int) -> dict:
  """Latent diffusion's names -> diffusers', attention as matrices."""
  renamed = {}
  for name, value in state_dict.items():
    new = re.sub(r"^encoder\.down\.", "encoder.down_blocks.", name)
    new = re.sub(
      r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", new
    )
    new = re.sub(r"mid\.block_(\d)", lambda m: f"mid_block.resnets.{int(m[1]) - 1}", new)
    new = re.sub(r"\.(down|up)sample\.", r".\1samplers.0.", new).replace(".block.", ".resnets.")
    new = new.replace("nin_shortcut", "conv_shortcut").replace("norm_out", "conv_norm_out")
    if "attn" in new:
      new = new.replace("mid.attn_1", "mid_block.attentions.0").replace(".attn.", ".attentions.")
      new = re.sub(r"\.([qkv])\.", r".to_\1.", new.replace(".norm.", ".group_norm."))
      new = new.replace("proj_out", "to_out.0")
      value = value[:, :, 0, 0] if value.ndim == 4 else value
    renamed[new] = value
  return renamed


def test_an_sd_vae_of_diffusers_is_read(tmp_path):
  tensors = {
    name: x
    for name, x in read_state_dict(FORMATS / "vavae_lightning.ckpt").items()
    if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))
  }
  save_file(to_diffusers(tensors, levels=3), tmp_path / "vae.safetensors")
  done = convert(str(tmp_path / "vae.safetensors"), tmp_path / "back.safetensors")
  assert done.weights.what == "tokenizer f4d8"
  assert_same(tensors, load_file(tmp_path / "back.safetensors"))


def test_a_va_vae_of_diffusers_is_theirs(tmp_path):
  _, tensors, expected = cases.load("diffusers_vae")
  save_file(tensors, tmp_path / "vae.safetensors")
  convert(str(tmp_path / "vae.safetensors"), tmp_path / "run")
  trained = restore.load(tmp_path / "run", "tokenizer")
  model = restore.autoencoder(trained.config, trained.params)
  posterior = model.encode(jnp.asarray(cases.nhwc(procedural.uniform("image", (1, 3, 8, 8), -1))))
  cases.assert_near(posterior.mean, cases.nhwc(expected["mean"]), 1e-5)
  cases.assert_near(posterior.logvar, cases.nhwc(expected["logvar"]), 1e-5)
  image = model.decode(jnp.asarray(cases.nhwc(procedural.normal("z", (1, 6, 4, 4)))))
  cases.assert_near(image, cases.nhwc(expected["image"]), 2e-5)


def test_e2e_vavae_as_diffusers_builds_it_has_the_architecture_of_va_vae():
  shapes = json.loads((cases.FOLDER / "diffusers_vae.json").read_text())["full_shapes"]
  tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  arguments = autoencoder_arguments(tensors)
  model = functional.abstract(lambda rngs: Autoencoder(**arguments, rngs=rngs))
  known = functional.abstract(lambda rngs: Autoencoder(**PRESETS["f16d32"], rngs=rngs))
  assert jax.tree.map(np.shape, nnx.state(model)) == jax.tree.map(np.shape, nnx.state(known))
  assert set(torch_weights.names_of(model)) == autoencoder_names(tensors).keys()
  sizes = jax.tree.leaves(jax.tree.map(lambda x: x.size, nnx.to_pure_dict(nnx.state(model))))
  assert sum(x.size for x in tensors.values()) == sum(sizes)


@pytest.mark.parametrize("prefix", ["", "vae.", "module.first_stage_model."])
def test_a_training_begins_with_an_sd_vae_of_diffusers(prefix, tmp_path):
  tensors = weights.recognise(read_content(FORMATS / "vavae_lightning.ckpt"))
  theirs = {f"{prefix}{x}": v for x, v in to_diffusers(tensors.tensors, levels=3).items()}
  save_file(theirs, tmp_path / "vae.safetensors")
  given = read_state_dict(tmp_path / "vae.safetensors", warm_start.MARKS)
  taken = warm_start.from_state_dict(given, tensors.arguments)["autoencoder"]
  expected = nnx.to_pure_dict(nnx.state(tensors.module))
  jax.tree.map(np.testing.assert_array_equal, taken, expected)


@pytest.mark.parametrize("preset", [*PRESETS, "mar_like"])
def test_every_preset_by_the_names_of_diffusers_has_its_own(preset):
  sizes = PRESETS.get(preset, {"attn_resolutions": (128, 16), "num_res_blocks": 3})
  model = functional.abstract(lambda rngs: Autoencoder(**sizes, rngs=rngs))
  names = {
    name: np.zeros((2,) if "norm" in name or name.endswith("bias") else (2, 2, 1, 1))
    for name in torch_weights.names_of(model)
  }
  levels = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("decoder.up."))
  there = to_diffusers(names, levels)
  assert not any(".attn" in name for name in there)
  back = autoencoder_names(there)
  assert {name: x.shape for name, x in back.items()} == {n: x.shape for n, x in names.items()}
  old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
  older = {re.sub("|".join(old), lambda m: old[m[0]], name): x for name, x in there.items()}
  assert autoencoder_names(older).keys() == names.keys()


@pytest.mark.parametrize(
  "names", [("latents_bias", "latents_scale"), ("latents_mean", "latents_std")]
)
def test_statistics_by_the_names_of_others(names, tmp_path):
  mean, std = np.float32([[1], [2]])[None, :, None], np.float32([[4], [0.5]])[None, :, None]
  second = 1 / std if names[1] == "latents_scale" else std
  write_torch_file(tmp_path / "latents_stats.pt", {names[0]: mean, names[1]: second})
  convert(str(tmp_path / "latents_stats.pt"), tmp_path / "store")
  for folder in (tmp_path, tmp_path / "store"):
    store = LatentStore(folder)
    np.testing.assert_array_equal([store.mean, store.std], [[1, 2], [4, 0.5]])


def test_statistics_in_a_configuration_of_diffusers(tmp_path):
  config = {"_class_name": "AutoencoderKL", "block_out_channels": [4, 8], "shift_factor": None}
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config | {"latents_mean": [1, 2], "latents_std": [4, 0.5]}))
  convert(str(path), tmp_path / "store")
  store = LatentStore(tmp_path / "store")
  np.testing.assert_array_equal([store.mean, store.std], [[1, 2], [4, 0.5]])
  path.write_text(json.dumps(config | {"latents_mean": ["x"], "latents_std": [4]}))
  with pytest.raises(InputError, match="latents_mean is no list of numbers"):
    convert(str(path), tmp_path / "other")
  path.write_text(json.dumps(config | {"latents_mean": None, "latents_std": None}))
  with pytest.raises(InputError, match="No model is known by these tensors: no tensor"):
    convert(str(path), tmp_path / "other")


PREFIXES = (
  "module.",
  "_orig_mod.",
  "module._orig_mod.",
  "_orig_mod.module._fsdp_wrapped_module.",
  "model.",
  "vae.",
  "first_stage_model.module.",
  "model.diffusion_model._orig_mod.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", ["lightningdit_bare_state_dict.pt", "vavae_lightning.ckpt"])
def test_weights_are_found_by_what_fits_under_any_prefix(name, prefix):
  plain = weights.recognise(read_content(FORMATS / name))
  tensors = {
    f"{prefix}{key}".replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): x
    for key, x in plain.tensors.items()
  }
  for wrapper in ("", "params_ema", "model_state_dict", "ema_state_dict"):
    content = {wrapper: tensors, "other": {"x": np.zeros(2)}} if wrapper else tensors
    found = weights.recognise(content)
    assert (found.what, found.arguments) == (plain.what, plain.arguments)
    assert_same(plain.tensors, found.tensors)


def test_several_models_in_a_file_are_listed_and_chosen_by_name(tmp_path):
  dit = stored("lightningdit_bare_state_dict", "")
  vae = read_state_dict(FORMATS / "vavae_lightning.ckpt", ("encoder.conv_in.weight",))
  write_torch_file(tmp_path / "both.pt", {"dit": dit, "vae": vae})
  with pytest.raises(InputError, match=r"several models' weights: dit, vae\."):
    convert(str(tmp_path / "both.pt"), tmp_path / "dit.pt")
  convert(str(tmp_path / "both.pt"), tmp_path / "dit.pt", part="dit")
  assert_same(dit, read_state_dict(tmp_path / "dit.pt"))
  with pytest.raises(InputError, match="no part 'x' with a known model; it has dit, vae"):
    convert(str(tmp_path / "both.pt"), tmp_path / "x.pt", part="x")


@pytest.mark.parametrize(
  ("content", "part"),
  [
    ({"model": 1.0, "ema": 2.0, "opt": {"state": {0: {"exp_avg": np.zeros(3)}}}}, "ema"),
    ({"ema_model.": 2.0, "online_model.": 1.0}, "ema_model."),
    ({"student": 1.0, "teacher": 2.0}, ""),
    ({"ema_1": 1.0, "ema_2": 2.0}, ""),
    ({"a": {"b": {"c": 2.0}}}, "a/b/c"),
  ],
)
def test_the_average_is_taken_and_what_is_left_of_several_is_an_error(content, part):
  tensors = stored("lightningdit_bare_state_dict", "")

  def filled(content):
    """Tensors, with the factor in one of them, where a number stands."""
    made = {}
    for key, value in content.items():
      if isinstance(value, float):
        own = tensors | {"final_layer.linear.bias": np.full(8, value, np.float32)}
        made |= {f"{key}{name}": x for name, x in own.items()} if key[-1] == "." else {key: own}
      else:
        made[key] = filled(value) if isinstance(value, dict) else value
    return made

  if not part:
    with pytest.raises(InputError, match="several models' weights"):
      weights.recognise(filled(content))
    return
  found = weights.recognise(filled(content))
  assert found.part == part
  assert found.tensors["final_layer.linear.bias"][0] == 2.0


def test_a_file_of_many_dictionaries_takes_a_moment():
  with pytest.raises(InputError, match="No model is known"):
    weights.recognise({f"k{i}": {"a": np.zeros(1)} for i in range(20_000)})


def test_what_is_no_tensor_among_the_weights_is_left_out_and_named():
  tensors = stored("lightningdit_bare_state_dict", "")
  found = weights.recognise({**tensors, "args": StandIn("argparse.Namespace"), "epoch": 3})
  assert_same(tensors, found.tensors)
  assert found.aside == {"args: argparse.Namespace": 1, "epoch": 1}
  with pytest.raises(InputError, match=r"missing: final_layer\.linear\.bias"):
    weights.recognise({**tensors, "final_layer.linear.bias": StandIn("numpy.ndarray")})


@pytest.mark.parametrize("name", ["dinov2_vits14", "dinov2_vits14_reg", "mae_vits16"])
def test_teachers_are_recognised_and_go_there_and_back(name, tmp_path):
  _, tensors, _ = cases.load(name)
  write_torch_file(tmp_path / "model.pth", {"model": tensors})
  done = convert(str(tmp_path / "model.pth"), tmp_path / "model.safetensors")
  assert done.weights.what == f"teacher {name}"
  convert(str(tmp_path / "model.safetensors"), tmp_path / "back.pth")
  assert_same(tensors, read_state_dict(tmp_path / "back.pth"))


@pytest.mark.parametrize(
  ("name", "shapes"),
  [
    ("clip_vitb16", {"visual.conv1.weight": (768, 3, 16, 16), "visual.ln_pre.bias": (768,)}),
    ("clip_vitl14", {"patch_embed.proj.weight": (1024, 3, 14, 14), "norm_pre.bias": (1024,)}),
    (
      "sam_vitb16",
      {
        "image_encoder.patch_embed.proj.weight": (768, 3, 16, 16),
        "image_encoder.blocks.0.attn.rel_pos_h": (27, 64),
      },
    ),
    (
      "sam_vitl16",
      {
        "vision_encoder.patch_embed.projection.weight": (1024, 3, 16, 16),
        "vision_encoder.layers.0.attn.rel_pos_h": (27, 64),
      },
    ),
    ("", {"visual.conv1.weight": (640, 3, 16, 16), "visual.ln_pre.bias": (640,)}),
  ],
)
def test_large_teachers_are_known_by_names_and_shapes(name, shapes):
  tensors = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
  assert recognise(tensors) == name


def test_fids_inception_goes_there_and_back(tmp_path):
  """Its counters are integers, which the network does not need and the file keeps."""
  _, tensors, _ = cases.load("inception_fid")
  write_torch_file(tmp_path / "pt_inception.pth", tensors)
  done = convert(str(tmp_path / "pt_inception.pth"), tmp_path / "inception.safetensors")
  assert done.weights.what == "FID's Inception"
  convert(str(tmp_path / "inception.safetensors"), tmp_path / "back.pth")
  assert_same(tensors, read_state_dict(tmp_path / "back.pth"))


def test_lpips_comes_from_two_files(tmp_path):
  _, tensors, _ = cases.load("lpips")
  heads = {name: x for name, x in tensors.items() if name.startswith("lin")}
  rest = {name: x for name, x in tensors.items() if name not in heads}
  write_torch_file(tmp_path / "vgg.pth", rest)
  write_torch_file(tmp_path / "heads.pth", heads)
  with pytest.raises(InputError, match=r"missing: lin0\.model\.1\.weight.* as --heads"):
    convert(str(tmp_path / "vgg.pth"), tmp_path / "lpips.safetensors")
  done = convert(
    str(tmp_path / "vgg.pth"), tmp_path / "lpips.safetensors", heads=str(tmp_path / "heads.pth")
  )
  assert done.weights.what == "LPIPS"
  assert_same(tensors, load_file(tmp_path / "lpips.safetensors"))


def test_npz_is_read_and_one_that_swells_is_refused(tmp_path):
  tensors = stored("lightningdit_bare_state_dict", "")
  np.savez(tmp_path / "weights.npz", **tensors)
  convert(str(tmp_path / "weights.npz"), tmp_path / "back.pt")
  assert_same(tensors, read_state_dict(tmp_path / "back.pt"))
  np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros(10**7, np.float32))
  with pytest.raises(InputError, match="would unpack to 38 MiB"):
    read_content(tmp_path / "bomb.npz")
  np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
  with pytest.raises(InputError, match="damaged or not an npz file"):
    read_content(tmp_path / "objects.npz")


def test_names_that_lead_out_of_the_folder_write_nothing(tmp_path):
  """A zip's member names are keys, never paths."""
  data = io.BytesIO()
  np.save(data, np.zeros(2, np.float32))
  with zipfile.ZipFile(tmp_path / "evil.npz", "w") as archive:
    archive.writestr("../../outside.npy", data.getvalue())
  with pytest.raises(InputError, match="No model is known"):
    convert(str(tmp_path / "evil.npz"), tmp_path / "run")
  assert [path.name for path in tmp_path.iterdir()] == ["evil.npz"]


def test_unknown_sources_are_told(monkeypatch):
  with pytest.raises(InputError, match="one of vavae-f16d32-dinov2"):
    released.find("vavae-f16d32")
  with pytest.raises(InputError, match="not of the form"):
    released.find("hf:hustvl/file.pt")

  def offline(repository, file):
    raise addresses.LocalEntryNotFoundError(f"no {file}. Check.")

  monkeypatch.setattr(addresses.huggingface_hub, "hf_hub_download", offline)
  with pytest.raises(
    InputError, match=r"fetch latents_stats\.pt of hustvl/vavae-\S+ on the Hugging"
  ):
    released.find("latents-stats")


def test_inspection_lists_tensors_and_values(capsys):
  inspect(str(FORMATS / "lightningdit_train_checkpoint.pt"))
  told = capsys.readouterr().out
  for words in ("model.blocks.0.attn.qkv.weight", "96x32", "dict of 1", "27 tensors"):
    assert words in told


@pytest.mark.parametrize(
  ("dest", "options", "message"),
  [
    ("x.pt", {"ema": 0.0}, "--ema=0.0 does not apply"),
    ("x.pt", {"latents": "data"}, "--latents=data does not apply"),
    ("x.pt", {"heads": str(FORMATS / "torch_zip.pt")}, r"\(--heads\) are for VGG16"),
    ("x.npz", {}, "are read, not written"),
    ("x.pt", {"to": "safetensors"}, "contradict each other"),
    ("run", {"latents": "no/such"}, "no/such holds no latent shards"),
    ("run", {"tokenizer": "no/such"}, "no/such is no folder here, and could not be fetched"),
    ("run", {"part": "ema"}, "no part 'ema' with a known model; it has the file itself"),
  ],
)
def test_what_a_person_asks_for_is_never_passed_over(dest, options, message, tmp_path):
  with pytest.raises(InputError, match=message):
    convert(str(FORMATS / "lightningdit_bare_state_dict.pt"), tmp_path / dest, **options)
  assert not list(tmp_path.iterdir())


def test_latents_of_another_model_are_told_at_the_conversion(tmp_path):
  stored = {"mean": np.zeros((1, 3, 1, 1)), "std": np.ones((1, 3, 1, 1))}
  write_torch_file(tmp_path / "latents_stats.pt", stored)
  source = str(FORMATS / "lightningdit_bare_state_dict.pt")
  with pytest.raises(InputError, match=r"has 3 channels, .* takes 8"):
    convert(source, tmp_path / "run", latents=str(tmp_path))


def test_a_released_file_has_its_configuration_by_any_name():
  file = "lightningdit-xl-imagenet256-800ep.pt"
  for source in (
    "lightningdit-xl-800ep",
    f"data/{file}",
    f"hf:hustvl/lightningdit-xl-imagenet256-800ep/{file}",
  ):
    assert released.config_of(source) == "configs.lightningdit_xl_800ep"
  assert released.config_of("data/mine.pt") == ""
  # Diffusers' name of every model's weights.
  assert released.config_of("data/diffusion_pytorch_model.safetensors") == ""


def test_a_published_variant_has_the_recipe_of_its_training(tmp_path):
  write_torch_file(
    tmp_path / "vavae-imagenet256-f16d64-mae-50ep.ckpt",
    read_content(FORMATS / "vavae_lightning.ckpt")["state_dict"],
  )
  convert(str(tmp_path / "vavae-imagenet256-f16d64-mae-50ep.ckpt"), tmp_path / "run")
  config = restore.load(tmp_path / "run", "tokenizer").config
  assert (config.stages.epochs, config.model.embed_dim) == ((50.0,), 8)


@pytest.mark.parametrize("name", released.RELEASED)
def test_every_released_recipe_is_one(name):
  module, _, argument = released.RELEASED[name].config.partition(":")
  if module:
    config = importlib.import_module(module).get_config(*filter(None, [argument]))
    embed_dim = config.model.get("embed_dim", 0)
    assert not embed_dim or f"f16d{embed_dim}" in name


def test_a_folder_that_is_no_workdir_is_told(tmp_path):
  (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
  with pytest.raises(InputError, match="not a workdir of this project; give a file"):
    convert(str(tmp_path), tmp_path / "file.pt")


def test_a_second_file_may_not_replace_tensors(tmp_path):
  _, tensors, _ = cases.load("lpips")
  write_torch_file(tmp_path / "both.pth", tensors)
  heads = {name: x for name, x in tensors.items() if name.startswith("lin")}
  write_torch_file(tmp_path / "heads.pth", heads)
  with pytest.raises(InputError, match=r"Both files have lin0\.model\.1\.weight"):
    convert(
      str(tmp_path / "both.pth"), tmp_path / "x.safetensors", heads=str(tmp_path / "heads.pth")
    )


def test_an_average_is_taken_before_the_weights():
  tensors = stored("lightningdit_bare_state_dict", "")
  for name in ("ema", "model_ema"):
    found = weights.recognise({"model": tensors, name: dict(tensors), "epoch": 3})
    assert found.part == name
    assert found.aside == {"model": 27, "epoch": 1}


def test_numbers_that_are_no_weights_are_listed():
  tensors = stored("lightningdit_bare_state_dict", "")
  for dtype in (np.int8, np.complex64, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
    changed = tensors | {"final_layer.linear.bias": np.zeros(8, dtype)}
    with pytest.raises(InputError, match=r"numbers of 16 bits or more: final_layer\.linear"):
      weights.recognise(changed)


def test_a_model_of_quantized_tensors_is_named_as_that():
  tensors = stored("lightningdit_bare_state_dict", "")
  with pytest.raises(InputError, match=r"these tensors: x_embedder\.proj\.weight \(torch\.QInt8"):
    weights.recognise(tensors | {"x_embedder.proj.weight": OddTensor("torch.QInt8Storage")})


def test_names_of_tensors_are_shown_as_they_are(tmp_path, capsys):
  write_torch_file(tmp_path / "x.pt", {"[/foo]\x1b[2J": np.zeros(2, np.float32)})
  inspect(str(tmp_path / "x.pt"))
  told = capsys.readouterr().out
  assert "[/foo]" in told
  assert "\x1b" not in told


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
  with pytest.raises(InputError, match="free some space"):
    convert(str(FORMATS / "lightningdit_bare_state_dict.pt"), tmp_path / "run")
  assert not list(tmp_path.iterdir())


def test_inspection_of_a_workdir_reads_its_checkpoints(pipeline, tmp_path, capsys):
  workdir = tmp_path / "diffusion"
  shutil.copytree(pipeline / "diffusion", workdir)
  inspect(str(workdir))
  assert capsys.readouterr().out.count("sound") == 2
  flip_a_bit(largest_file(workdir / "checkpoints" / "6" / "params"))
  with pytest.raises(InputError, match="1 of 2 checkpoints are damaged: 6"):
    inspect(str(workdir))
  assert capsys.readouterr().out.count("sound") == 1


def test_inspection_names_objects_and_ends(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr("launch.convert._MOST_ROWS", 2)
  program = pickle.dumps({"args": argparse.Namespace(lr=1), "a": 1, "b": 2}, 2)
  with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
    archive.writestr("x/data.pkl", program)
  inspect(str(tmp_path / "x.pt"))
  told = capsys.readouterr().out
  assert "argparse.Namespace" in told
  assert "the first 2 entries are listed" in told
