"""The whole pipeline on somebody's own pictures: `vavae run --pictures=DIR`.

  python -m launch.quickstart --pictures=DIR --workdir=RUNS/mine

The quickstart's models and steps on a CPU; on GPUs and TPUs pictures of 128 pixels and models of
about the size of LightningDiT-S for as many minutes, not yet run there. Classes, batches and the
share of held-out pictures follow from the pictures; every key can be set all the same.
"""

from ml_collections import ConfigDict

from configs import quickstart

LEAST = 16  # pictures
CLASSES_SHOWN = 12
PER_CLASS, MOST_SAMPLES = 40, 1_000
# Of the quickstart (docs/quickstart.md): seconds for each picture of a step, and for all the rest,
# where a CPU's products of float32 had this rate.
SECONDS = {"tokenizer": 190 / 32_000, "diffusion": 511 / 128_000, "rest": 75}
PRODUCT_RATE = 180e9


def get_config(argument: str = "cpu") -> ConfigDict:
  """The pipeline for a kind of machine, "cpu", "gpu" or "tpu"; "tiny" behind a comma is a test."""
  words = argument.split(",")
  config = quickstart.pipeline(tiny="tiny" in words)
  if not {"cpu", "tiny"} & {*words}:
    _larger(config.tokenizer, config.diffusion)
  for part in (config.tokenizer, config.diffusion):
    part.keep_checkpoints = 1
  config.sample.num_samples = 8 if "tiny" in words else 0  # 0: by the classes
  config.tokenizer.data.split = "name"
  return config


def fit(config: ConfigDict, source: str, classes: int, train: int, held_out: float) -> None:
  """Sets what depends on the pictures: `train` of them are trained on, in so many classes."""
  config.tokenizer.data.source = source
  config.tokenizer.data.held_out = held_out
  if config.diffusion.model.num_classes == quickstart.diffusion().model.num_classes:
    config.diffusion.model.num_classes = classes
  for part in (config.tokenizer, config.diffusion):
    part.batch_size = min(part.batch_size, _power_of_two(train))
  accumulate = config.diffusion.accumulate_steps
  config.diffusion.accumulate_steps = min(accumulate, config.diffusion.batch_size)
  if not config.sample.num_samples:
    config.sample.num_samples = min(PER_CLASS * classes, MOST_SAMPLES)


def _power_of_two(most: int) -> int:
  return 1 << (most.bit_length() - 1)


def _larger(first: ConfigDict, second: ConfigDict) -> None:
  """128 pixels, for an accelerator."""
  first.data.image_size = first.model.resolution = 128
  first.model.ch = 128
  first.update(batch_size=64, num_steps=6_000, save_every_steps=1_000, evaluate_every_steps=2_000)
  first.stages.disc_start = (5_000,)
  first.optimizer.update(learning_rate=4e-3, decay_steps=6_000)
  second.update(batch_size=256, num_steps=20_000, save_every_steps=4_000, dtype="bfloat16")
  second.evaluate_every_steps = 5_000
  second.model.update(input_size=8, hidden_size=384, depth=12, num_heads=6, scan_unroll=0)
  second.optimizer.update(learning_rate=1e-3, decay_steps=20_000, ema_decays=(0.9995,))
  second.sample.batch_size = 256
