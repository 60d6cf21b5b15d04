"""Files on the Hugging Face hub, and short names of those that the paper's authors released, and of
what others made of theirs.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vavae_jax import folder
from vavae_jax.common.addresses import HUB
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import is_url
from vavae_jax.weights.state_dicts import SUFFIXES


class Released(NamedTuple):
  """A released file and its training's configuration: module, and behind ":" an argument."""

  file: str
  config: str = ""


RELEASED = {
  "vavae-f16d32-dinov2": Released(
    "hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt",
    "configs.vavae_f16d32",
  ),
  "lightningdit-xl-64ep": Released(
    "hustvl/lightningdit-xl-imagenet256-64ep/lightningdit-xl-imagenet256-64ep.pt",
    "configs.lightningdit_xl_64ep",
  ),
  "lightningdit-xl-800ep": Released(
    "hustvl/lightningdit-xl-imagenet256-800ep/lightningdit-xl-imagenet256-800ep.pt",
    "configs.lightningdit_xl_800ep",
  ),
  "latents-stats": Released("hustvl/vavae-imagenet256-f16d32-dinov2/latents_stats.pt"),
  # Of the tokenizers of table 2, those that are published.
  **{
    f"{name}-50ep": Released(
      f"hustvl/va-vae-imagenet256-experimental-variants/"
      f"{name.replace('-f16', '-imagenet256-f16')}-50ep.ckpt",
      f"configs.vavae_f16d32:{argument},50ep",
    )
    for name, argument in {
      "ldm-f16d16": "d16,plain",
      "ldm-f16d32": "d32,plain",
      "ldm-f16d64": "d64,plain",
      "vavae-f16d32-dinov2": "d32,dinov2",
      "vavae-f16d32-mae": "d32,mae",
      "vavae-f16d64-dinov2": "d64,dinov2",
      "vavae-f16d64-mae": "d64,mae",
    }.items()
  },
  # VA-VAE tuned with the diffusion model, by diffusers' names; its configuration has statistics.
  "e2e-vavae": Released("REPA-E/e2e-vavae-hf/diffusion_pytorch_model.safetensors"),
  "e2e-vavae-stats": Released("REPA-E/e2e-vavae-hf/config.json"),
}


def config_of(source: str) -> str:
  """`Released.config` of a released file, by short name or file name; "" if none."""
  for name, released in RELEASED.items():
    if source == name or Path(source).name == Path(released.file).name:
      return released.config
  return ""


def find(source: str) -> Path:
  """The path of weights: a key of `RELEASED`, or whatever `folder.find` takes, a file too.

  A path that exists comes first. InputError, which says what to put where, if there is none.
  """
  if source in RELEASED and not Path(source).exists():
    source = HUB + RELEASED[source].file
  try:
    path = folder.find(source, files=SUFFIXES)
  except InputError as error:
    raise InputError(f"{error} Or give one of {', '.join(RELEASED)}.") from error
  if is_url(path) and path.is_file():
    raise InputError(f"{source} is a file in a bucket; copy it here, and give its path.")
  return path
