"""Where the PyTorch reference is, and the jobs that make it do the same work as ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from ml_collections import FrozenConfigDict

import configs.base
from lightningdit_jax.options import ONLY_OURS
from vavae_jax import teachers
from vavae_jax.common.errors import InputError

# Flags that are defined here are those of the command that asks for them.
flags.disclaim_key_flags()
NEEDS = "torch, timm, numpy, einops, torchdiffeq and pillow"
# Keys of our configuration that are arguments of the reference's.
_SAMPLE = (
  *("num_steps", "method", "atol", "rtol"),
  *("timestep_shift", "cfg_scale", "cfg_interval_start"),
)
_AUTOENCODER = ("z_channels", "resolution", "ch", "ch_mult", "num_res_blocks", "attn_resolutions")
_LOSS = ("kl_weight", "disc_weight", "adaptive_vf", "pp_style", "perceptual_weight")
_STAGE = ("vf_weight", "cos_margin", "distmat_margin")
# Our teachers -> the reference's name of their kind, and timm's of the network.
_TEACHERS = {
  "dinov2_vitl14": ("dinov2", "vit_large_patch14_dinov2"),
  "mae_vits16": ("mae", "vit_small_patch16_224"),  # of another size than the reference's
}


def model_arguments(model: FrozenConfigDict) -> dict[str, Any]:
  """The arguments of the reference's LightningDiT for our `config.model`; with an early head those
  of the class in CVL-UESTC/Internal-Guidance.
  """
  ours = {*ONLY_OURS, "early_head", "position_scale"}  # the file of weights has the positions
  early = {"encoder_depth": model["early_head"]} if model["early_head"] else {}
  return {name: value for name, value in model.items() if name not in ours} | early


class Checkouts(NamedTuple):
  """Where the reference is, and what runs it."""

  lightningdit: Path  # a checkout of hustvl/LightningDiT
  taming: str  # one of CompVis/taming-transformers, for the tokenizer's losses; "": none
  python: str  # an interpreter with `NEEDS`
  compiled: bool  # whether its blocks are compiled, as the reference is published, or run eagerly

  def check(self) -> None:
    """Raises InputError if `lightningdit` is no checkout of the reference."""
    _check_file("--reference", self.lightningdit, "models/lightningdit.py", "hustvl/LightningDiT")

  def check_taming(self) -> None:
    """Raises InputError if `taming` is no checkout of taming-transformers."""
    file = "taming/modules/losses/lpips.py"
    _check_file("--taming", Path(self.taming), file, "CompVis/taming-transformers")

  def check_python(self, *more: str) -> None:
    """Raises InputError if the interpreter lacks a module, those of `NEEDS` or `more`."""
    look = "import importlib.util as u; print(*(x for x in {} if not u.find_spec(x)))"
    modules = ("torch", "timm", "einops", "torchdiffeq", "PIL", *more)
    words = [self.python, "-c", look.format(modules)]
    try:
      done = subprocess.run(words, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
      raise InputError(
        f"--torch_python is {self.python}, which does not start: {error}."
      ) from error
    if missing := done.stdout.split():
      raise InputError(
        f"--torch_python is {self.python}, which lacks {', '.join(missing)}; give an interpreter "
        f"with {', '.join([NEEDS, *more])}."
      )


def _check_file(flag: str, folder: Path, file: str, repository: str) -> None:
  if not (folder / file).is_file():
    raise InputError(f"{flag} is {folder}, which has no {file}; give a checkout of {repository}.")


def device() -> str:
  """Where PyTorch computes, "cuda" or "cpu"; InputError if it cannot be where ours does."""
  backend = jax.default_backend()
  if backend not in ("cpu", "gpu"):
    raise InputError(f"--reference is for GPUs and CPUs, and jax has {backend}.")
  if backend == "gpu" and jax.device_count() > 1:
    raise InputError(
      f"--reference takes one GPU, and ours would take {jax.device_count()}; give --devices=1."
    )
  return "cuda" if backend == "gpu" else "cpu"


def define_flags() -> None:
  """Defines the flags that say where the reference is."""
  flags.DEFINE_string("reference", "", "A checkout of hustvl/LightningDiT to compare with.")
  flags.DEFINE_string("taming", "", "A checkout of CompVis/taming-transformers, for tokenizers.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has PyTorch.")


def checkouts(compiled: bool) -> Checkouts | None:
  """What the flags name."""
  given = flags.FLAGS
  if not given.reference:
    return None
  return Checkouts(Path(given.reference), given.taming, given.torch_python, compiled)


def job_of(
  checkouts: Checkouts, config: FrozenConfigDict, what: str, images: int
) -> dict[str, Any]:
  """The job of `torch/steps.py` that does the same work as ours on batches of `images`.

  Raises InputError if the reference cannot do it.
  """
  job = {
    "work": f"{config.task} {what}",
    "checkout": str(checkouts.lightningdit.absolute()),
    "compile": checkouts.compiled,
    "batch_size": images,
    "device": device(),
  }
  if what == "train" and config.get("accumulate_steps", 1) > 1:
    raise InputError("The reference does not take a batch in parts: config.accumulate_steps is 1.")
  if config.task == "diffusion":
    return job | _diffusion_job(config, what)
  if config.dtype != "float32":
    raise InputError(f"config.dtype is {config.dtype}; the reference's tokenizers are of float32.")
  model = config.model
  plain = {"patch_size": 1, "norm_groups": 32, "linear_shortcut": False, "final_norm": True}
  if other := [name for name, value in plain.items() if model[name] != value]:
    raise InputError(f"The reference's autoencoder has no config.model.{other[0]}.")
  job["image_size"] = config.data.image_size
  if what == "train":
    return job | training_job(config, checkouts)
  ours = configs.base.tokenizer().model
  fixed = ("ch", "num_res_blocks", "attn_resolutions")
  if other := [name for name in fixed if model[name] != ours[name]]:
    raise InputError(f"The reference's AutoencoderKL has config.model.{other[0]} as published.")
  kind = "vavae" if model.decoder_attn_resolutions is None else "marvae"
  arguments = {"embed_dim": model.embed_dim, "ch_mult": model.ch_mult, "model_type": kind}
  return job | {"model": arguments}


def _diffusion_job(config: FrozenConfigDict, what: str) -> dict[str, Any]:
  model = model_arguments(config.model)
  model["use_checkpoint"] = config.model.use_checkpoint  # the reference recomputes all, too
  if what == "sample":
    if config.sample.mode != "ODE":
      raise InputError(f"config.sample.mode is {config.sample.mode}; beside the reference: ODE.")
    sample = {name: config.sample[name] for name in _SAMPLE}
    return {"model": model, "sample": sample, "dtype": config.sample.dtype}
  optimizer = config.optimizer
  return {
    "model": model,
    "dtype": config.dtype,
    "learning_rate": optimizer.learning_rate,
    "clip_norm": optimizer.clip_norm,
    "betas": [optimizer.b1, optimizer.b2],
    "decays": list(optimizer.ema_decays),
  }


def training_job(config: FrozenConfigDict, checkouts: Checkouts) -> dict[str, Any]:
  """The arguments of the reference's tokenizer training, in the last stage of ours.

  Raises InputError if it does not have them.
  """
  checkouts.check_taming()
  size, name = config.data.image_size, config.teacher.name
  # With DINOv2 its latents have as many cells as 224 pixels have patches of 14.
  if name not in _TEACHERS or (name == "dinov2_vitl14" and size != 256):
    raise InputError(
      f"config.data.image_size={size} and config.teacher.name={name!r}; beside ours the reference "
      f"trains tokenizers with {' or '.join(_TEACHERS)}, with the first at 256 pixels."
    )
  kind, model = _TEACHERS[name]
  loss = {name: config.loss[name] for name in _LOSS}
  loss |= {name: config.stages[name][-1] for name in _STAGE}
  ends = {"double_z": True, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
  return {
    "taming": str(Path(checkouts.taming).absolute()),
    "embed_dim": config.model.embed_dim,
    "ddconfig": {name: config.model[name] for name in _AUTOENCODER} | ends,
    "teacher": {"kind": kind, "model": model, "width": teachers.feature_size(name)},
    "loss": loss | {"disc_start": 0},
    "learning_rate": config.optimizer.learning_rate,
  }
