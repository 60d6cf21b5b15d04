"""LightningDiT of any published size on VA-VAE f16d32 latents.

  python -m launch.train --config=configs/lightningdit.py:B/1 --workdir=runs/b \
    --config.latents.path=DIR

Argument: B/1, B/2, L/1, L/2, XL/1, XL/2, 1p0B/1, 1p0B/2, 1p6B/1 or 1p6B/2. Latents of 16 or 64
channels: --config.model.in_channels=16; 512 px: --config.model.input_size=32. The recipe is that of
64 epochs (80,000 steps at batch 1024); the paper's FID-10K of B is of 160 epochs
(--config.num_steps=200000): 15.82, L 9.82, XL 8.22, without guidance, by dopri5. Too little memory:
--config.accumulate_steps=4, --config.model.use_checkpoint, --config.mesh.fsdp=8. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "XL/1") -> ConfigDict:
  """The 64-epoch recipe at a size."""
  return base.diffusion(f"LightningDiT-{size}")
