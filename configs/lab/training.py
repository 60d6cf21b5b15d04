r"""Whole trainings of the PyTorch reference and of this project, side by side.

  python -m launch.lab.equivalence training --reference=LIGHTNINGDIT --torch_python=PYTHON \
    --config=configs/lab/training.py:cifar --config.source=zip:cifar10_train.zip

Arguments: "cifar" compares trainings of diffusion models, "vavae" of a tokenizer with teacher,
LPIPS and discriminator, which takes --taming too: an hour of one core of a CPU each. "tiny" and
"vavae_tiny" are smoke tests on the embedded emoji. Behind a comma one part, for `launch.train`:
"tokenizer", or without "vavae" also "diffusion".
"""

from ml_collections import ConfigDict

from configs import base

SIZES = ("cifar", "tiny", "vavae", "vavae_tiny")


def get_config(argument: str = "cifar") -> ConfigDict:
  """The configuration of one part, or of the whole comparison."""
  size, _, part = argument.partition(",")
  parts = {"": experiment, "tokenizer": tokenizer, "diffusion": diffusion}
  if of_tokenizers(size):
    parts = {"": tokenizer_experiment, "tokenizer": vavae}
  if size not in SIZES or part not in parts:
    raise ValueError(f"{argument!r} is none of {', '.join(SIZES)}, alone or with a part of it.")
  return parts[part](size)


def of_tokenizers(size: str) -> bool:
  """Whether trainings of tokenizers are compared."""
  return size.startswith("vavae")


def tokenizer(size: str = "cifar") -> ConfigDict:
  """An autoencoder of 4 x 4 cells without teacher, GAN and LPIPS: all that matters is its latents.

  With the linear shortcut these are nearly the first principal components of patches of 8 x 8.
  """
  config = base.tokenizer()
  config.update(batch_size=32, num_steps=400, log_every_steps=50, save_every_steps=400)
  config.evaluate_every_steps = 400
  config.data.update(source="tfds:cifar10/train", image_size=32, held_out=0.1, split="position")
  config.data.crop = "center"
  config.model.update(
    embed_dim=16,
    z_channels=16,
    ch=32,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=32,
    patch_size=8,
    linear_shortcut=True,
  )
  config.teacher.name = ""
  config.loss.update(perceptual_weight=0.0, disc_weight=0.0)
  config.stages.update(
    epochs=(0.0,), vf_weight=(0.0,), cos_margin=(0.0,), distmat_margin=(0.0,), disc_start=(0,)
  )
  config.optimizer.update(learning_rate=3e-3, b1=0.9, b2=0.99, warmup_steps=50, decay_steps=400)
  if size == "tiny":
    config.update(batch_size=8, num_steps=4, save_every_steps=4, evaluate_every_steps=4)
    config.data.update(source="embedded:emoji", image_size=64)
    config.model.update(embed_dim=4, z_channels=4, ch=16, norm_groups=8)
    config.model.update(resolution=64, patch_size=16)
    config.optimizer.update(warmup_steps=0, decay_steps=0)
  return config


def diffusion(size: str = "cifar") -> ConfigDict:
  """LightningDiT of 2.0 M parameters, trained as published but for rate, batch and average."""
  config = base.diffusion()
  config.update(batch_size=32, num_steps=3_000, log_every_steps=50, save_every_steps=1_500)
  config.update(keep_every_steps=1_500, keep_checkpoints=1, evaluate_every_steps=0)
  config.dtype = "float32"  # bfloat16 is slower than float32 on most processors
  config.model.update(
    input_size=4, in_channels=16, hidden_size=160, depth=4, num_heads=4, num_classes=10
  )
  config.model.update(attention="xla", scan_unroll=4)
  # The published 0.9999 would still be three quarters of the initial weights at the end.
  config.optimizer.update(learning_rate=1e-3, ema_decays=(0.998,))
  config.sample.update(num_steps=11, cfg_scale=4.0, batch_size=250)
  if size == "tiny":
    config.update(batch_size=8, num_steps=4, log_every_steps=2, save_every_steps=2)
    config.keep_every_steps = 2
    config.model.update(in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=9)
    config.model.scan_unroll = 2
    config.latents.valid_samples = 16
    config.sample.update(num_steps=3, batch_size=32)
  return config


def experiment(size: str = "cifar") -> ConfigDict:
  """What is compared."""
  config = ConfigDict(
    {
      "size": size,
      "source": "tfds:cifar10/train",
      "seeds": (0, 1, 2),  # of order, times, noise and dropped labels, on each side
      # Steps with the same batches, times and noise; at half of them the sides change places.
      "fed_steps": 300,
      "num_samples": 5_000,  # of each training
      "crossed_samples": 500,  # of the other side's weights, from the same noise as the first ones
      "continued_steps": 500,  # with the other side's state, from the middle of a training on
    }
  )
  if size == "tiny":
    config.update(source="embedded:emoji", seeds=(0, 1), fed_steps=4, num_samples=96)
    config.update(crossed_samples=48, continued_steps=2)
  return config


def vavae(size: str = "vavae") -> ConfigDict:
  """A tokenizer trained as published, but small and with all losses from the first step.

  Its teacher is an MAE, since with DINOv2 the reference takes 256 pixels alone. Normalised by twos
  of channels, the least that leave the convolutions' biases a gradient.
  """
  config = base.tokenizer()
  config.update(batch_size=2, num_steps=500, log_every_steps=10, save_every_steps=500)
  config.evaluate_every_steps = 250
  config.data.update(source="tfds:cifar10/train", image_size=64, held_out=0.9, split="position")
  config.data.crop = "center"
  config.model.update(ch=64, num_res_blocks=1)
  config.teacher.name = "mae_vits16"
  config.perceptual.heads = ""
  config.stages.update(
    epochs=(0.0,), vf_weight=(0.1,), cos_margin=(0.5,), distmat_margin=(0.25,), disc_start=(0,)
  )
  if size == "vavae_tiny":
    config.update(num_steps=4, log_every_steps=2, save_every_steps=4, evaluate_every_steps=2)
    config.data.update(source="embedded:emoji", image_size=32)
    config.model.update(ch=32, embed_dim=4, z_channels=4)
  return config


def tokenizer_experiment(size: str = "vavae") -> ConfigDict:
  """What is compared of tokenizers' trainings."""
  config = ConfigDict(
    {
      "size": size,
      "source": "tfds:cifar10/train",
      "seeds": (0, 1, 2),  # of order, noise and the discriminator's initial weights
      "fed_steps": 100,  # with the same batches and noise
    }
  )
  if size == "vavae_tiny":
    config.update(source="embedded:emoji", seeds=(0, 1), fed_steps=4)
  return config
