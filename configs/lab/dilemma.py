r"""The paper's claim on a small scale: reconstruction against generation, and a teacher's effect.

  python -m launch.lab.dilemma --config=configs/lab/dilemma.py:cifar --workdir=runs/dilemma \
    --config.source=zip:cifar10_train.zip --config.test_source=zip:cifar10_test.zip

trains and evaluates everything, or the rest of it, and writes the page. Parts also run alone:

  python -m launch.train --config=configs/lab/dilemma.py:cifar,judge --workdir=DIR
  python -m launch.train --config=configs/lab/dilemma.py:cifar,tokenizer,aligned,d48 --workdir=DIR
  python -m launch.train --config=configs/lab/dilemma.py:cifar,diffusion,d48 --workdir=DIR \
    --config.latents.path=LATENTS

Arguments, joined by commas:

  cifar | emoji | gpu | tiny     pictures and budget: CIFAR-10 or the embedded emoji in hours of two
                                 CPU cores; CIFAR-10 at 64 px on a GPU; emoji as a smoke test
  judge | tokenizer | diffusion  one part; by default the whole experiment
  dN                             channels of the latents
  plain | aligned                the tokenizer without or with a teacher; at the widest latents also
  no_cos | no_distmat | no_margin | fixed_weight    aligned without a part of the method,
  other_teacher | finer_teacher | strong            with another teacher or weight,
  plain_deep | aligned_deep                         or without the linear shortcut
  long                           the diffusion model with four times the steps
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ml_collections import ConfigDict

from configs import base

PARTS = ("judge", "tokenizer", "diffusion")
MAIN = ("plain", "aligned")  # at all widths; the other variants at the widest latents
NO_MARGIN = {"stages.cos_margin": (0.0,), "stages.distmat_margin": (0.0,)}
# Changes to the configuration of an aligned tokenizer.
VARIANTS: dict[str, dict[str, Any]] = {
  "plain": {"teacher.name": ""},
  "aligned": {},
  "no_cos": {"loss.cos_weight": 0.0},
  "no_distmat": {"loss.distmat_weight": 0.0},
  "no_margin": NO_MARGIN,
  # About the average of the adaptive weight.
  "fixed_weight": {"loss.adaptive_vf": False, "stages.vf_weight": (100.0,)},
  "other_teacher": {"teacher.name": "efficientnet_lite2"},
  "finer_teacher": {"teacher.scale": 4},
  # As in the first of the published stages.
  "strong": {"stages.vf_weight": (0.5,)} | NO_MARGIN,
  "plain_deep": {"teacher.name": "", "model.linear_shortcut": False},
  "aligned_deep": {"model.linear_shortcut": False},
}
SIZES = ("cifar", "emoji", "gpu", "tiny")
LONG = "long"
LONGER = 4  # times the steps of a diffusion model


def get_config(argument: str = "cifar") -> ConfigDict:
  """The configuration of one part or of the whole experiment."""
  words = argument.split(",")
  widths = [word for word in words if re.fullmatch("d[0-9]{1,6}", word)]
  groups: tuple[Collection[str], ...] = (SIZES, PARTS, VARIANTS, widths, (LONG,))
  if unknown := [word for word in words if not any(word in group for group in groups)]:
    choices = ", ".join([*SIZES, *PARTS, "dN", *VARIANTS, LONG])
    raise ValueError(f"{unknown[0]!r} is not one of {choices}.")
  chosen = [[word for word in words if word in group] for group in groups]
  for given in chosen:
    if len(given) > 1:
      raise ValueError(f"{' and '.join(given)} exclude each other; give one of them.")
  size, part, variant, channels, long = ("".join(given) for given in chosen)
  size = size or "cifar"
  if (part in ("tokenizer", "diffusion")) != bool(channels):
    raise ValueError("tokenizer and diffusion, and no other part, take a width such as d16.")
  if variant and part != "tokenizer":
    raise ValueError(f"{variant} is for a tokenizer.")
  if long and part != "diffusion":
    raise ValueError(f"{LONG} is for a diffusion model.")
  width = int(channels[1:] or 0)
  if part == "judge":
    return judge(size)
  if part == "tokenizer":
    return tokenizer(size, width, variant or "aligned")
  return diffusion(size, width, bool(long)) if part == "diffusion" else experiment(size)


def judge(size: str = "cifar", second: bool = False) -> ConfigDict:
  """The classifier whose features serve to evaluate generated pictures; it is no teacher.

  A second one, of other layers and another seed, tells whether its verdict depends on the judge.
  """
  config = base.classifier()
  config.update(log_every_steps=100, save_every_steps=1_000, evaluate_every_steps=1_000)
  _pictures(config, size)
  config.data.flip = True
  if size in ("emoji", "tiny"):
    config.update(name="Emoji", batch_size=64, num_steps=1_500)
    config.model.update(num_classes=9, patch_size=4)
  else:
    config.update(batch_size=128, num_steps=6_000)
    config.model.update(width=64, patch_size=1)
    config.data.pad = 4
    config.optimizer.update(weight_decay=0.1, warmup_steps=500)
  if size == "gpu":
    config.update(batch_size=256, num_steps=20_000)
    config.model.update(width=96, depth=2, patch_size=2)
    config.data.pad = 8
    config.optimizer.ema_decays = (0.999,)
  if second:
    config.update(seed=1, name=f"{config.name}2")
    config.model.update(depth=config.model.depth + 1, patch_size=2 * config.model.patch_size)
  _tiny(config, size)
  if size == "tiny":
    config.model.update(width=8, norm_groups=4)
  config.optimizer.decay_steps = config.num_steps
  return config


def tokenizer(size: str, width: int, variant: str) -> ConfigDict:
  """A tokenizer with `width` channels of latents, 4 x 4 cells a picture."""
  config = base.tokenizer()
  config.update(batch_size=32, num_steps=2_000, log_every_steps=50, save_every_steps=500)
  config.evaluate_every_steps = 1_000
  _pictures(config, size)
  config.data.crop = "center"  # so that the teacher sees each picture once and for all
  config.model.update(
    embed_dim=width,
    z_channels=width,
    ch=96,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=32,
    patch_size=8,
    linear_shortcut=True,  # without it 1,000 steps bring 48 channels to 22 dB instead of 36
  )
  config.teacher.update(name="efficientnet_lite0", scale=2, cache="runs/dilemma/features")
  # No perceptual distance and no GAN, so that only the teacher knows more than pixels.
  config.loss.update(perceptual_weight=0.0, disc_weight=0.0)
  config.stages.update(
    epochs=(0.0,), vf_weight=(0.1,), cos_margin=(0.5,), distmat_margin=(0.25,), disc_start=(0,)
  )
  config.optimizer.update(learning_rate=3e-3, b1=0.9, b2=0.99, warmup_steps=100, ema_decays=(0.99,))
  if size in ("emoji", "tiny"):
    config.update(num_steps=1_000, model={"resolution": 64, "patch_size": 16}, teacher={"scale": 1})
  if size == "gpu":
    config.update(batch_size=128, num_steps=40_000)
    config.model.update(ch=128, ch_mult=(1, 2, 4), num_res_blocks=2, patch_size=2, resolution=64)
    config.optimizer.update(learning_rate=3e-4, ema_decays=(0.999,))
  _tiny(config, size)
  if size == "tiny":
    config.model.update(ch=16, norm_groups=8)
  config.optimizer.decay_steps = config.num_steps
  config.update_from_flattened_dict(VARIANTS[variant])
  return config


def diffusion(size: str, width: int, long: bool = False) -> ConfigDict:
  """LightningDiT of one size, for latents of `width` channels."""
  config = base.diffusion()
  config.update(batch_size=64, num_steps=2_500, log_every_steps=50, save_every_steps=500)
  config.update(keep_every_steps=500, keep_checkpoints=1)  # for the curves
  config.evaluate_every_steps = 2_500
  config.dtype = "float32"  # bfloat16 is slower than float32 on most processors
  config.latents.path = "runs/dilemma/latents"
  config.model.update(
    input_size=4, in_channels=width, hidden_size=128, depth=4, num_heads=2, num_classes=10
  )
  config.optimizer.update(learning_rate=3e-3, warmup_steps=200, clip_norm=1.0, ema_decays=(0.99,))
  # Guidance is of all channels: the published first three mean nothing special here. At 128
  # channels 17 times of Heun are within 0.03 of FD-CIFAR of finer ones, 17 of Euler within 0.5.
  config.sample.update(method="heun", num_steps=17, cfg_scale=1.0, cfg_channels=0, batch_size=250)
  if size in ("emoji", "tiny"):
    config.num_steps = config.evaluate_every_steps = 1_500
    config.model.num_classes = 9
  if size == "gpu":
    config.update(batch_size=256, num_steps=60_000, dtype="bfloat16")
    config.update(save_every_steps=10_000, keep_every_steps=10_000)
    config.model.update(input_size=8, hidden_size=384, depth=12, num_heads=6)
    config.optimizer.update(learning_rate=4e-4, ema_decays=(0.9995,))
    config.sample.update(num_steps=101, batch_size=1_000)
  _tiny(config, size)
  if size == "tiny":
    config.model.update(hidden_size=32, depth=2)
    config.sample.update(num_steps=3, batch_size=9)
    config.optimizer.ema_decays = (0.5,)
  config.model.scan_unroll = config.model.depth
  if long:
    config.num_steps *= LONGER
    config.keep_every_steps *= 2
  config.optimizer.decay_steps = config.num_steps
  return config


def _pictures(config: ConfigDict, size: str) -> None:
  """The training set, of which a tenth is held out."""
  config.data.update(source="tfds:cifar10/train", image_size=32, held_out=0.1, split="position")
  if size in ("emoji", "tiny"):
    config.data.update(source="embedded:emoji", image_size=64)
  if size == "gpu":
    config.data.image_size = 64


def _tiny(config: ConfigDict, size: str) -> None:
  if size == "tiny":
    config.update(batch_size=8, num_steps=4, log_every_steps=2, save_every_steps=2)
    config.update(evaluate_every_steps=4, optimizer={"warmup_steps": 2})
    config.keep_every_steps = 2 if config.task == "diffusion" else 0


def experiment(size: str = "cifar") -> ConfigDict:
  """The experiment: tokenizers, diffusion models on the latents of each, and their evaluation."""
  config = ConfigDict(
    {
      "size": size,
      "source": "tfds:cifar10/train",
      # Pictures that no training uses, for the distance of perfect samples; "": none.
      "test_source": "tfds:cifar10/test",
      "widths": (4, 16, 48, 128),  # channels of the latents
      # Beside plain and aligned, at the widest latents.
      "ablations": (
        *("strong", "finer_teacher", "no_margin", "aligned_deep", "plain_deep"),
        *("other_teacher", "no_cos", "no_distmat", "fixed_weight"),
      ),
      "seeds": (0, 1),  # of the diffusion models on plain and aligned latents
      "ablation_seeds": (0,),
      "long": True,  # plain and aligned at the widest latents, also with more steps of diffusion
      "num_samples": 10_000,
      "curve_samples": 2_000,  # at each kept step of the first seed
      "cfg_scale": 2.0,  # of the guided samples, of the first seed
      "cells": 5_000,  # of each of `runs` t-SNEs for the uniformity
      "runs": 3,
    }
  )
  if size in ("emoji", "tiny"):
    config.update(source="embedded:emoji", test_source="")
  if size == "emoji":  # a second set, of 1,852 pictures
    config.update(widths=(4, 32, 128), ablations=(), seeds=(0,), long=False, cells=1_500)
    config.update(num_samples=5_000, curve_samples=1_000)
  if size == "gpu":
    config.update(num_samples=50_000, curve_samples=10_000, seeds=(0, 1, 2))
  if size == "tiny":
    config.update(
      widths=(4, 8), ablations=("no_cos",), num_samples=300, curve_samples=150, cells=60, runs=1
    )
  return config
