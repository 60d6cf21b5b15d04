r"""LightningDiT-XL/1 for samples of 1, 2 or 4 steps: Decoupled MeanFlow, from a flow's weights.

  python -m launch.train --config=configs/lightningdit_xl_dmf.py --workdir=runs/dmf \
    --config.latents.path=DIR --config.init_from=MODEL
  python -m launch.sample --workdir=runs/dmf --output=runs/dmf.npz --published

MODEL is a model folder, whose weights are averages, or the released file of PyTorch. Steps are one
less than --num_steps: 2 are one step, 3 two, 5, as here, four.

Lee, Yu and Shin, arXiv 2510.24474, with the settings of kyungmnlee/dmf at a6db0f6 for 256 px: 20 of
28 blocks see the time at which a step begins, model guidance 0.6 but for the noisiest 0.3, 400,000
steps of 256 (80 epochs) at a rate of 1e-4, gradients clipped at 1. Their SiT-XL/2 with REPA, on
SD-VAE latents, reached FID 2.16 in one step and 1.51 in four; nobody has trained
it on these latents. For 512 px they take 800,000 steps, guidance from t = 0.2 on, normed queries
and keys, and sample with timestep_shift=0.667. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """The published recipe, sampled in four steps."""
  config = base.diffusion()
  config.batch_size = 256
  config.num_steps = 400_000
  config.model.dmf_depth = 20
  config.transport.use_cosine_loss = False
  config.transport.update(map_mu=-0.4, map_end_mu=1.2, map_guidance=0.6, map_guidance_start=0.3)
  config.optimizer.update(learning_rate=1e-4, clip_norm=1.0)
  config.sample.update(method="map", num_steps=5, timestep_shift=0.0)
  config.sample.update(cfg_scale=1.0, cfg_interval_start=0.0, cfg_channels=0)
  return config
