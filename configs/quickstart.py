"""The whole pipeline at a size for a laptop, on the emoji that the package carries.

  bash launch/quickstart.sh                      installs and runs everything
  python -m launch.quickstart --workdir=DIR      runs everything, or what is left of it

Parts run alone with the same configuration:

  python -m launch.train --config=configs/quickstart.py:tokenizer --workdir=DIR/tokenizer
  python -m launch.encode --workdir=DIR/tokenizer --output=DIR/latents
  python -m launch.train --config=configs/quickstart.py:diffusion --workdir=DIR/diffusion \
    --config.latents.path=DIR/latents

Arguments: "tokenizer", "diffusion", "pipeline" (both and the rest); "tiny" beside one, behind a
comma, makes it a smoke test of seconds.
"""

from ml_collections import ConfigDict

from configs import base
from vavae_jax.common.keys import COUNT, MAYBE, Key


def get_config(argument: str = "pipeline") -> ConfigDict:
  """The configuration of one part or of all."""
  parts = {"tokenizer": tokenizer, "diffusion": diffusion, "pipeline": pipeline}
  words = argument.split(",")
  chosen = [word for word in words if word in parts]
  if len(chosen) != 1 or not {*words} - {*chosen} <= {"tiny"}:
    raise ValueError(f"{argument!r} is none of {sorted(parts)}, nor one of them with 'tiny'.")
  return parts[chosen[0]](tiny="tiny" in words)


def tokenizer(*, tiny: bool = False) -> ConfigDict:
  """A VA-VAE f16d48 for 64 px, aligned with EfficientNet-Lite0."""
  config = base.tokenizer()
  config.batch_size = 16
  config.num_steps = 2_000
  config.log_every_steps = 40
  config.save_every_steps = 400
  config.evaluate_every_steps = 1_000
  config.data.update(source="embedded:emoji", image_size=64, held_out=0.1, split="position")
  # 16 x 16 pixels are folded into channels first, so that no halving is left to do; what is linear
  # in them goes past the networks. That bears a learning rate 80 times the published one.
  config.model.update(
    embed_dim=48,
    z_channels=48,
    ch=64,
    ch_mult=(1,),
    num_res_blocks=1,
    attn_resolutions=(),
    resolution=64,
    patch_size=16,
    linear_shortcut=True,
  )
  config.teacher.name = "efficientnet_lite0"
  # Its gradient by the picture would cost more than the whole rest of a step.
  config.loss.perceptual_weight = 0.0
  # One stage, with margins and weight of the published third.
  config.stages.update(
    epochs=(0.0,), vf_weight=(0.1,), cos_margin=(0.5,), distmat_margin=(0.25,), disc_start=(1_800,)
  )
  config.loss.disc_weight = 0.1
  # The published 1e-6 is for 256 px and days. This much brings the latents near to white, so that
  # the diffusion model sees every direction of them alike, and costs 0.1 dB.
  config.loss.kl_weight = 0.1
  config.discriminator.update(ndf=16)
  config.optimizer.update(learning_rate=8e-3, b1=0.9, b2=0.99, warmup_steps=100, ema_decays=(0.99,))
  config.optimizer.decay_steps = config.get_oneway_ref("num_steps")
  if tiny:
    config.batch_size = 8
    config.num_steps = 6
    config.log_every_steps = config.save_every_steps = 2
    config.evaluate_every_steps = 3
    config.model.update(ch=16, norm_groups=8)
    config.stages.disc_start = (3,)
    config.discriminator.ndf = 8
    config.optimizer.update(warmup_steps=2, decay_steps=6)
  return config


def diffusion(*, tiny: bool = False) -> ConfigDict:
  """LightningDiT of 4 x 4 tokens, width 192, depth 6, on the tokenizer's latents."""
  config = base.diffusion()
  config.batch_size = 32
  config.num_steps = 4_000
  config.log_every_steps = 40
  config.save_every_steps = 800
  config.evaluate_every_steps = 2_000
  config.dtype = "float32"  # bfloat16 is slower than float32 on most processors
  config.latents.path = "runs/quickstart/latents"
  config.model.update(
    input_size=4, in_channels=48, hidden_size=192, depth=6, num_heads=3, num_classes=9
  )
  config.model.scan_unroll = config.model.depth
  # 20 times the published rate, which a model this small bears: docs/quickstart.md has the losses.
  config.optimizer.update(learning_rate=4e-3, warmup_steps=100, clip_norm=1.0, ema_decays=(0.995,))
  config.optimizer.decay_steps = config.get_oneway_ref("num_steps")
  # All channels: the guidance of three that the published scale of 10 is for means little to
  # latents without a preferred order of channels.
  config.sample.update(num_steps=51, cfg_scale=3.0, cfg_channels=0, batch_size=60)
  if tiny:
    config.update(batch_size=16, accumulate_steps=2)
    config.num_steps = 6
    config.log_every_steps = config.save_every_steps = 2
    config.evaluate_every_steps = 3
    config.model.update(hidden_size=32, depth=2, num_heads=2, scan_unroll=1)
    config.optimizer.update(warmup_steps=2, decay_steps=6, ema_decays=(0.5,))
    config.sample.update(num_steps=3, batch_size=9)
  return config


# Of the pipeline.
KEYS = {
  "tokenizer": base.KEYS["tokenizer"],
  "diffusion": base.KEYS["diffusion"],
  "encode": {
    "batch_size": Key(64, "[1, 1e6]"),
    "shard_size": Key(500, COUNT),
    "seed": Key(0, MAYBE),
  },
  "sample": {"num_samples": Key(360, "[4, 1e6]"), "seed": Key(0, MAYBE)},
}


def pipeline(*, tiny: bool = False) -> ConfigDict:
  """Both trainings, and what is between and behind them."""
  config = ConfigDict()
  config.tokenizer = tokenizer(tiny=tiny)
  config.diffusion = diffusion(tiny=tiny)
  config.diffusion.export = "" if tiny else "end"
  config.encode = ConfigDict({"batch_size": 8 if tiny else 64, "shard_size": 500, "seed": 0})
  config.sample = ConfigDict({"num_samples": 18 if tiny else 360, "seed": 0})
  return config
