"""LightningDiT-XL/1 for 64 epochs on VA-VAE f16d32 latents, as published: FID 2.11 with guidance.

  python -m launch.train --config=configs/lightningdit_xl_64ep.py --workdir=runs/xl_64ep \
    --config.latents.path=DIR

80,000 steps at batch 1024; the paper took 10 hours on 8 H800. The published run's mean squared
error was 1.2133 at step 100, 0.3854 at 1,000, 0.3270 at 10,000, 0.3045 at 80,000. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """The published configuration, which is the default one."""
  return base.diffusion()
