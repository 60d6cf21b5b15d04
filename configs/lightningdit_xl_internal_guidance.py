r"""LightningDiT-XL/1 with Internal Guidance, 680 epochs on VA-VAE f16d32: FID 1.19 as published.

  python -m launch.train --config=configs/lightningdit_xl_internal_guidance.py --workdir=runs/ig \
    --config.latents.path=DIR
  python -m launch.sample --workdir=runs/ig --output=runs/ig.npz --published

Zhou et al., arXiv 2512.24176, with the settings of CVL-UESTC/Internal-Guidance at d048cc3: a second
head behind block 8 at half weight, uniform times, gradients clipped, Muon, batch 256. Its file says
3,000,000 steps, its page 680 epochs; here are the epochs. FID 1.19 is with both guidances, as
below; 1.34 is without classifier-free guidance: --cfg_scale=1 --internal_scale=1.7. Muon here is
for the matrices of blocks and decays all weights, there for all matrices and decays these; the
schedule of the position embedding is another, too: docs/beyond.md. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """The published recipe, with both guidances of its number."""
  config = base.diffusion()
  config.batch_size = 256
  config.num_steps = 3_403_000
  config.save_every_steps = 10_000
  config.model.early_head = 8
  config.transport.update(use_lognorm=False, early_weight=0.5)
  config.optimizer.update(muon=True, weight_decay=0.01, clip_norm=1.0)
  config.sample.update(method="heun2", num_steps=125, timestep_shift=0.3, internal_scale=1.4)
  config.sample.update(cfg_scale=1.45, cfg_interval_start=0.19, cfg_channels=0)
  return config
