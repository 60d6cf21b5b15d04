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


def get_config(argument: str = "cpu") -> ConfigDict:
  """The pipeline for a kind of machine, "cpu", "gpu" or "tpu"; "tiny" behind a comma is a test."""
  words = argument.split(",")
  config = quickstart.pipeline(tiny="tiny" in words)
  if not {"cpu", "tiny"} & {*words}:
    _larger(config.tokenizer, config.diffusion)
  for part in (config.tokenizer, config.diffusion):
    part.keep_checkpoints = 1
  config.tokenizer.data.split = "name"
  return config


def fit(config: ConfigDict, source: str, classes: int, train: int, held_out: float) -> None:
  """Sets what depends on the pictures: `train` of them are trained on, in so many classes."""
  config.tokenizer.data.source = source
  config.tokenizer.data.held_out = held_out
  config.diffusion.model.num_classes = classes
  for part in (config.tokenizer, config.diffusion):
    part.batch_size = min(part.batch_size, _power_of_two(train))
  accumulate = config.diffusion.accumulate_steps
  config.diffusion.accumulate_steps = min(accumulate, config.diffusion.batch_size)
  samples = min(config.sample.num_samples // 9, PER_CLASS) * classes
  config.sample.num_samples = max(min(samples, MOST_SAMPLES), 4)


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
