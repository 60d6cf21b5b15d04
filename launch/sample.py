r"""Samples pictures with a trained LightningDiT and its tokenizer.

  python -m launch.sample --workdir=RUNS/diffusion --output=RUNS/samples.npz --num_samples=1000

Writes one npz as ADM's evaluator reads it (arr_0 uint8 pictures, arr_1 labels), a contact sheet
beside it (.png) and the settings (.json). Sample i is a function of the seed and i alone, whatever
the batch size and the number of devices. A run that was stopped goes on when started again.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict
from PIL import Image

import lightningdit_jax.training
from launch import trained
from launch.engine import console, mesh
from lightningdit_jax import latents
from vavae_jax import images
from vavae_jax.errors import InputError
from vavae_jax.files import atomic_file, write_json


@functools.lru_cache(maxsize=8)
def _sampler(config: FrozenConfigDict, tokenizer: trained.Trained, sample: FrozenConfigDict, seed: int):
  store = lightningdit_jax.training.open_store(config.latents.path)
  mean, std = latents.statistics(store, latent_norm=config.latents.latent_norm)

  @jax.jit
  def run(params: Any, decoder: Any, batch: dict[str, jax.Array]) -> jax.Array:
    normalised = lightningdit_jax.training.sample_latents(
      config, params, batch["index"], batch["label"], seed=seed, sample=sample
    )
    z_BhwZ = latents.denormalise(normalised, mean, std, config.latents.latent_multiplier)
    return images.to_uint8(trained.autoencoder(tokenizer, decoder).decode(z_BhwZ))

  return run
