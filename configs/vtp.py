"""LightningDiT-XL/1 on latents of VTP, a tokenizer of vision transformers with 64 channels.

  python -m launch.train --config=configs/vtp.py:L --workdir=runs/vtp --config.latents.path=DIR

Argument: VTP's size, L, B or S, each with times of its own, which lie nearer to the noise than
VA-VAE's. The tokenizer is not here: DIR is what the authors' generation/scripts/
extract_features_vtp.sh writes, and `launch.convert runs/vtp vtp.pt` gives their
inference_lightningdit_vtp.sh what it samples. As their generation/configs/train_vtp_*_dit_xl.yaml:
80 epochs, and 50,000 samples without guidance.

MiniMax-AI/VTP (arXiv 2512.13687), XL/1 on L: FID 2.62; their 2.03 is of a model of 1.0 billion
parameters. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base

# Mean and deviation of the normal behind the training's times.
TIMES = {"L": (-0.75, 1.0), "B": (-0.5, 1.25), "S": (-0.5, 1.25)}


def get_config(argument: str = "L") -> ConfigDict:
  """The authors' recipe for a size of VTP."""
  if argument not in TIMES:
    raise ValueError(f"{argument!r} is no size of VTP; give one of {', '.join(TIMES)}.")
  config = base.diffusion()
  config.model.in_channels = 64
  config.num_steps = 100_000
  config.transport.shifted_mu, config.transport.lognorm_sigma = TIMES[argument]
  config.sample.update(cfg_scale=1.0, cfg_interval_start=0.0, timestep_shift=0.075)
  return config
