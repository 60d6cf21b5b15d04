"""LightningDiT of any published size on VA-VAE f16d32 latents.

  python -m launch.train --config=configs/lightningdit.py:B/1 --workdir=runs/b \
    --config.latents.path=DIR

Argument: B/1, B/2, L/1, L/2, XL/1, XL/2, 1p0B/1, 1p0B/2, 1p6B/1 or 1p6B/2. Latents of 16 or 64
channels: --config.model.in_channels=16; 512 px: --config.model.input_size=32. The recipe is that of
64 epochs (80,000 steps at batch 1024), sampled as its FID of 2.11. With ",table2" behind the size
it is that of the paper's FID-10K by dopri5 without guidance, interval and shift (B 15.82 after 160
epochs, L 9.82, XL 8.22), which `launch.sample --published` draws. Too little memory:
--config.accumulate_steps=4, --config.model.use_checkpoint, --config.mesh.fsdp=8. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base

TABLE = "table2"


def get_config(argument: str = "XL/1") -> ConfigDict:
  """The 64-epoch recipe at a size, or that of table 2."""
  words = argument.split(",")
  sizes = [word for word in words if word != TABLE] or ["XL/1"]
  config = base.diffusion(f"LightningDiT-{','.join(sizes)}")
  if TABLE in words:
    config.num_steps = 200_000
    config.sample.update(base.UNGUIDED)
    config.published.num_samples = 10_000
  return config
