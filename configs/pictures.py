"""The whole pipeline on somebody's own pictures: `vavae run --pictures=DIR`.

  python -m launch.quickstart --pictures=DIR --workdir=RUNS/mine

The machine's kind gives the models' sizes. What is None here follows from the pictures and from the
machine's speed, by `fit`, where nobody sets it and no run was begun; docs/quickstart.md has the
rule with what was measured. Every key can be set all the same.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import quickstart

LEAST = 16  # pictures
CLASSES_SHOWN = 12
PER_CLASS, MOST_SAMPLES = 40, 1_000
# How often a training sees each picture, as in the quickstart. With more passes diffusion learns
# its pictures by heart: with 177 its loss of others was lowest after 140, and threefold after 720.
PASSES = {"tokenizer": 2_000 * 16 / 1_667, "diffusion": 4_000 * 32 / 1_667}
# With fewer steps a model from nothing has not learnt to draw at all, whatever it saw.
LEAST_STEPS = 1_000
LONGEST = 60 * 60  # seconds of both trainings, by the estimate; with many pictures they end there
# Of activations while the accelerators' diffusion model learns; half of the memory is for them.
PICTURE_BYTES = 20e6
SHARES = (0.1, 0.15, 0.2, 0.3, 0.5)  # held out: the first that holds out two
# Pictures, so that judging does not outlast training: held out, and trained on.
MOST_HELD_OUT, MOST_JUDGED = 5_000, 10_000
# What `fit` sets where it is None, with its type; a run that was begun keeps what it began with.
OPEN = {
  "num_steps": int,
  "save_every_steps": int,
  "evaluate_every_steps": int,
  "optimizer.decay_steps": int,
  "optimizer.ema_decays": tuple,
}
OPEN_OF = {
  "tokenizer": OPEN | {"data.held_out": float, "data.flip": bool, "stages.disc_start": tuple},
  "diffusion": OPEN | {"model.num_classes": int},
}


@dataclasses.dataclass(frozen=True)
class Speed:
  """Seconds that a machine took, and FLOP/s of its products: `hardware.product_rate`.

  For a picture: of a step of either training, to encode, to judge by; and for all that is constant.
  """

  tokenizer: float
  diffusion: float
  encode: float
  judge: float
  rest: float
  rate: float


# Two CPU cores, in the quickstart; an NVIDIA H200, with pictures of 128 pixels.
SPEEDS = {
  "cpu": Speed(190 / 32_000, 511 / 128_000, 0.003, 0.009, 55, 180e9),
  "accelerator": Speed(1 / (46 * 64), 1 / (132 * 128), 0.002, 0.002, 100, 600e12),
}


def get_config(argument: str = "cpu") -> ConfigDict:
  """The pipeline for a kind of machine, "cpu", "gpu" or "tpu"; "tiny" behind a comma is a test."""
  words = argument.split(",")
  tiny = "tiny" in words
  config = quickstart.pipeline(tiny=tiny)
  if not {"cpu", "tiny"} & {*words}:
    _larger(config.tokenizer, config.diffusion)
  for part in (config.tokenizer, config.diffusion):
    part.keep_checkpoints = 1
    for name, kind in OPEN_OF[part.task].items():
      if not (tiny and (name in OPEN or name == "stages.disc_start")):
        part.update_from_flattened_dict({name: placeholder(kind)})
  config.sample.num_samples = 8 if tiny else 0  # 0: by the classes
  config.tokenizer.data.split = "name"
  return config


def fit(
  config: ConfigDict, *, classes: int, train: int, machine: str, rate: float, memory: float = 0.0
) -> float:
  """Sets what is None, and makes batches as small as the pictures and the memory need them.

  Args:
    config: of `get_config`; what follows from the source itself is set.
    classes: number of them.
    train: pictures that are trained on.
    machine: of `SPEEDS`.
    rate: FLOP/s of all devices, as of `Speed`.
    memory: bytes of a device; 0: not known, so that it changes nothing.

  Returns:
    An estimate of the time, in seconds.
  """
  parts = {part.task: part for part in (config.tokenizer, config.diffusion)}
  for part in parts.values():
    # A quarter of few pictures: larger batches only see them more often in as many steps.
    part.batch_size = min(part.batch_size, _power_of_two(min(train, max(16, train // 4))))
  speed = SPEEDS[machine]
  slower = speed.rate / rate
  second = {name: slower * getattr(speed, name) * part.batch_size for name, part in parts.items()}
  wanted = {
    name: part.num_steps or max(LEAST_STEPS, PASSES[name] * train / part.batch_size)
    for name, part in parts.items()
  }
  share = min(1.0, LONGEST / sum(second[name] * steps for name, steps in wanted.items()))
  for name, part in parts.items():
    steps = part.num_steps or max(LEAST_STEPS, round(share * wanted[name] / 100) * 100)
    _fill(
      part,
      {
        "num_steps": steps,
        "save_every_steps": max(1, steps // 5),
        "evaluate_every_steps": max(1, steps // 2),
        "optimizer": {"decay_steps": steps, "ema_decays": (max(0.5, round(1 - 20 / steps, 6)),)},
        "stages": {"disc_start": (9 * steps // 10,)},
        "data": {"flip": True},
        "model": {"num_classes": classes},
      },
    )
  batch, accumulate = parts["diffusion"].batch_size, parts["diffusion"].accumulate_steps
  while memory and batch / accumulate * PICTURE_BYTES > memory / 2:
    accumulate *= 2
  parts["diffusion"].accumulate_steps = min(accumulate, batch)
  if not config.sample.num_samples:
    config.sample.num_samples = min(PER_CLASS * classes, MOST_SAMPLES)
  trained = sum(second[name] * part.num_steps for name, part in parts.items())
  judged = min(train, MOST_JUDGED)
  return trained + slower * (speed.encode * train + speed.judge * judged + speed.rest)


def go_on(part: ConfigDict, noted: Mapping[str, Any]) -> None:
  """Sets what is None as a training noted it, and the batch, which depends on the pictures too.

  A decay that ended with the training does so too where somebody sets another number of steps.
  """
  decay = noted["optimizer"]["decay_steps"]
  if part.num_steps and part.optimizer.decay_steps is None and decay == noted["num_steps"]:
    part.optimizer.decay_steps = part.num_steps
  _fill(part, noted)
  part.batch_size = min(part.batch_size, noted["batch_size"])


def _fill(part: ConfigDict, values: Mapping[str, Any]) -> None:
  """Sets those of the open keys that are None and have a value, in a tree as the configuration."""
  for name, kind in OPEN_OF[part.task].items():
    *sections, key = name.split(".")
    node, value = part, values
    for section in sections:
      node, value = node[section], value.get(section, {})
    if node[key] is None and key in value:
      node[key] = kind(value[key])


def _power_of_two(most: int) -> int:
  return 1 << (most.bit_length() - 1)


def _larger(first: ConfigDict, second: ConfigDict) -> None:
  """128 pixels, for an accelerator."""
  first.data.image_size = first.model.resolution = 128
  first.model.ch = 128
  first.batch_size = 64
  first.optimizer.learning_rate = 4e-3
  second.update(batch_size=256, dtype="bfloat16")
  second.model.update(input_size=8, hidden_size=384, depth=12, num_heads=6, scan_unroll=0)
  second.optimizer.learning_rate = 1e-3
  second.sample.batch_size = 256
