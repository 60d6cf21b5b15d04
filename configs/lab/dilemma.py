r"""The paper's claim on a small scale: reconstruction against generation, and a teacher's effect.

  python -m launch.lab.dilemma --config=configs/lab/dilemma.py:cifar --workdir=runs/dilemma \
    --config.source=zip:cifar10_train.zip --config.test_source=zip:cifar10_test.zip

trains and evaluates everything, or the rest of it, and writes the page. Parts also run alone:

  python -m launch.train --config=configs/lab/dilemma.py:cifar,judge --workdir=DIR
  python -m launch.train --config=configs/lab/dilemma.py:cifar,tokenizer,aligned,f16d128,kl0.05 \
    --workdir=DIR
  python -m launch.train --config=configs/lab/dilemma.py:cifar,diffusion,f16d128,w192 \
    --workdir=DIR --config.latents.path=LATENTS

Arguments, joined by commas:

  cifar | tiny                   pictures and budget: CIFAR-10, or emoji as a smoke test
  judge | tokenizer | diffusion  one part; by default the whole experiment
  second                         the judge of other layers and another seed
  plain | aligned | shortcut     the tokenizer without or with a teacher, or without one and with a
                                 linear shortcut
  fPdZ                           latents of Z channels, each a cell of P x P pixels
  klW                            the weight of the tokenizer's KL divergence
  wD                             the diffusion model's width
"""

from __future__ import annotations

import re
from typing import Any

from ml_collections import ConfigDict

from configs import base

# Changes to the configuration of an aligned tokenizer.
VARIANTS: dict[str, dict[str, Any]] = {
  "plain": {"teacher.name": "", "teacher.centre": False},
  "aligned": {},
  # Principal components and little more, in seconds of training.
  "shortcut": {
    "teacher.name": "",
    "teacher.centre": False,
    "model.linear_shortcut": True,
    "model.final_norm": True,
  },
}
SIZES = ("cifar", "tiny")
_WORDS = {
  "size": "|".join(SIZES),
  "part": "judge|tokenizer|diffusion",
  "judge": "second",
  "variant": "|".join(VARIANTS),
  "shape": "f[0-9]{1,3}d[0-9]{1,5}",
  "kl": r"kl[0-9.e-]{1,9}",
  "width": "w[0-9]{1,5}",
}
# What each part takes beside the size.
_TAKEN = {
  "": (),
  "judge": ("judge",),
  "tokenizer": ("variant", "shape", "kl"),
  "diffusion": ("shape", "width"),
}
IMAGE_SIZE = 32


def get_config(argument: str = "cifar") -> ConfigDict:
  """The configuration of one part or of the whole experiment."""
  given: dict[str, str] = {}
  for word in argument.split(","):
    kind = next((kind for kind, words in _WORDS.items() if re.fullmatch(words, word)), None)
    if kind is None:
      choices = ", ".join(["cifar, tiny, judge, tokenizer, diffusion, second", *VARIANTS])
      raise ValueError(f"{word!r} is not one of {choices}, fPdZ, klW, wD.")
    if kind in given:
      raise ValueError(f"{given[kind]} and {word} exclude each other; give one of them.")
    given[kind] = word
  size, part = given.pop("size", "cifar"), given.pop("part", "")
  if unfit := {*given} ^ {*_TAKEN[part]} - ({"judge"} - {*given}):
    taken = " and ".join(_TAKEN[part]) or "nothing"
    raise ValueError(
      f"{part or 'the experiment'} takes {taken} beside the size; check {', '.join(sorted(unfit))}."
    )
  if part == "judge":
    return judge(size, "judge" in given)
  if part == "tokenizer":
    return tokenizer(size, given["variant"], given["shape"], given["kl"])
  return diffusion(size, given["shape"], given["width"]) if part else experiment(size)


def shape_of(word: str) -> tuple[int, int]:
  """Pixels along the side of a cell of "fPdZ", and channels."""
  pixels, channels = map(int, word[1:].split("d"))
  return pixels, channels


def judge(size: str = "cifar", second: bool = False) -> ConfigDict:
  """The classifier whose features serve to evaluate generated pictures; it is no teacher.

  A second one, of other layers and another seed, tells whether its verdict depends on the judge.
  """
  config = base.classifier()
  config.update(batch_size=128, num_steps=6_000, log_every_steps=100, save_every_steps=1_000)
  config.evaluate_every_steps = 1_000
  _pictures(config, size)
  config.data.update(flip=True, pad=4)
  config.model.update(width=64)
  config.optimizer.update(weight_decay=0.1, warmup_steps=500)
  if size == "tiny":
    config.update(name="Emoji")
    config.model.update(num_classes=9, width=8, norm_groups=2, patch_size=4)
  if second:
    config.update(seed=1, name=f"{config.name}2")
    config.model.update(depth=2, width=config.model.width * 3 // 4)
  _tiny(config, size)
  config.optimizer.decay_steps = config.num_steps
  return config


def tokenizer(size: str, variant: str, shape: str, kl: str) -> ConfigDict:
  """A tokenizer of a `variant`, for latents of the `shape` "fPdZ", by the weight "klW"."""
  pixels, channels = shape_of(shape)
  config = base.tokenizer()
  config.update(batch_size=64, num_steps=3_000, log_every_steps=100, save_every_steps=1_000)
  config.evaluate_every_steps = 3_000
  _pictures(config, size)
  config.data.crop = "center"  # so that the teacher sees each picture once and for all
  # No strided levels: one grid of cells, whose pixels are channels of the first layer.
  config.model.update(
    embed_dim=channels,
    z_channels=channels,
    ch=192,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=IMAGE_SIZE,
    patch_size=pixels,
    final_norm=False,  # it hinders anything linear
  )
  config.teacher.update(
    name="efficientnet_lite0_last", scale=4, centre=True, cache="runs/dilemma/features"
  )
  # No perceptual distance and no GAN, so that only the teacher knows more than pixels.
  config.loss.update(perceptual_weight=0.0, disc_weight=0.0, kl_weight=float(kl[2:]))
  config.stages.update(
    epochs=(0.0,), vf_weight=(0.3,), cos_margin=(0.0,), distmat_margin=(0.0,), disc_start=(0,)
  )
  # Without a final norm a rate of 3e-3 was seen to blow latents up, by single gradients.
  config.optimizer.update(
    learning_rate=1e-3, b1=0.9, b2=0.99, warmup_steps=200, clip_norm=1.0, ema_decays=(0.99,)
  )
  _tiny(config, size)
  if size == "tiny":
    config.model.update(ch=16, norm_groups=8)
  config.optimizer.decay_steps = config.num_steps
  config.update_from_flattened_dict(VARIANTS[variant])
  return config


def diffusion(size: str, shape: str, width: str) -> ConfigDict:
  """LightningDiT of a width "wD", for latents of a shape "fPdZ"."""
  pixels, channels = shape_of(shape)
  hidden = int(width[1:])
  config = base.diffusion()
  config.update(batch_size=128, num_steps=10_000, log_every_steps=100)
  config.update(save_every_steps=500, keep_every_steps=500, keep_checkpoints=1)  # for the curves
  config.evaluate_every_steps = 0
  config.dtype = "float32"  # bfloat16 is slower than float32 on most processors
  config.loader.threads = 1
  config.log_to = ()
  config.latents.path = "runs/dilemma/latents"
  config.model.update(
    input_size=IMAGE_SIZE // pixels,
    in_channels=channels,
    hidden_size=hidden,
    depth=4,
    num_heads=max(hidden // 64, 1),
    num_classes=10,
  )
  config.optimizer.update(learning_rate=2e-3, warmup_steps=200, clip_norm=1.0, ema_decays=(0.99,))
  # No guidance. At 128 channels 17 times of Heun are within 0.03 of FD-CIFAR of finer ones, 17 of
  # Euler within 0.5.
  config.sample.update(method="heun", num_steps=17, cfg_scale=1.0, cfg_channels=0, batch_size=250)
  _tiny(config, size)
  if size == "tiny":
    config.model.update(depth=2, num_classes=9)
    config.sample.update(num_steps=3, batch_size=9)
    config.optimizer.ema_decays = (0.5,)
  config.model.scan_unroll = config.model.depth
  config.optimizer.decay_steps = config.num_steps
  return config


def _pictures(config: ConfigDict, size: str) -> None:
  """The training set, of which a tenth is held out."""
  source = {"cifar": "tfds:cifar10/train", "tiny": "embedded:emoji"}[size]
  config.data.update(source=source, image_size=IMAGE_SIZE, held_out=0.1, split="position")
  config.log_to = ()
  config.loader.threads = 1  # for pictures this small four wait for each other, at twice the cost


def _tiny(config: ConfigDict, size: str) -> None:
  if size == "tiny":
    config.update(batch_size=8, num_steps=4, log_every_steps=2, save_every_steps=2)
    config.update(optimizer={"warmup_steps": 2})
    config.evaluate_every_steps = 0 if config.task == "diffusion" else 4
    config.keep_every_steps = 2 if config.task == "diffusion" else 0


# Spaces as "VARIANT/fPdZ/klW/wD", in the order that answers soonest. First a dilemma that the
# diffusion model's width does not make, by the spread that a KL divergence gives; then what the
# width made.
FIRST = (
  *(
    f"{variant}/f16d128/kl{kl}/w192" for kl in ("1e-6", "0.05") for variant in ("plain", "aligned")
  ),
  *(f"shortcut/f8d128/kl1e-6/{width}" for width in ("w128", "w256")),
)
THEN = tuple(
  f"{variant}/f8d{channels}/kl{kl}/w192"
  for channels in (96, 48, 16)
  for kl in ("1e-6", "0.05")
  for variant in ("plain", "aligned")
)


def experiment(size: str = "cifar") -> ConfigDict:
  """The experiment: tokenizers, diffusion models on the latents of each, and their evaluation."""
  config = ConfigDict(
    {
      "size": size,
      "source": "tfds:cifar10/train",
      # Pictures that no training uses, for the distance of perfect samples; "": none.
      "test_source": "tfds:cifar10/test",
      # "VARIANT/fPdZ/klW/wD"; all seeds of the first before any of the others.
      "spaces": FIRST,
      "more_spaces": THEN,
      "tokenizer_seeds": (0, 1),
      "seeds": (0, 1),  # of the diffusion models on the latents of each tokenizer
      "judge_steps": judge(size).num_steps,
      "tokenizer_steps": tokenizer(size, "plain", "f8d16", "kl0").num_steps,
      "steps": (500, 1_000, 2_000, 5_000, 10_000),  # of diffusion, after which samples are drawn
      "num_samples": 10_000,
      "cells": 2_000,  # of each of `runs` t-SNEs for the uniformity
      "runs": 1,
      "probe_pictures": 10_000,  # for the quick figures of a tokenizer; 0: none
      "second": True,  # whether another judge sees the last samples, too
    }
  )
  if size == "tiny":
    config.update(source="embedded:emoji", test_source="", num_samples=300, cells=60, steps=(2, 4))
    config.spaces = ("plain/f16d8/kl1e-6/w64", "aligned/f16d8/kl1e-6/w64")
    config.more_spaces = ("shortcut/f8d4/kl0.05/w64",)
    config.update(tokenizer_seeds=(0,), seeds=(0,), probe_pictures=0)
  return config
