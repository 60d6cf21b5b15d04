"""Table 1 of the paper, from DiT to LightningDiT: each row adds one change to the row before.

  python -m launch.train --config=configs/ablation.py:swiglu --workdir=runs/ablation/swiglu \
    --config.latents.path=DIR

Argument, with the paper's FID-50K after 80 epochs, by dopri5 without guidance, interval and shift
(`launch.sample --published`):

  dit 19.50, rectified_flow 17.20, batch 16.59, beta2 16.61, lognorm 13.99, direction 12.52,
  swiglu 10.10, rmsnorm 9.25, rope 7.13 (all on SD-VAE f8d4 latents, XL/2), vavae 4.29 (XL/1 on
  VA-VAE f16d32 latents)

"rectified_flow" is SiT. "dit" predicts the noise on the VP path, the limit of DiT's 1,000 discrete
steps; its learnt variance and DDPM sampler are left out, so that 19.50 is not what it should reach.
Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base, lightningdit_sdvae

ROWS = (
  "dit",
  "rectified_flow",
  "batch",
  "beta2",
  "lognorm",
  "direction",
  "swiglu",
  "rmsnorm",
  "rope",
  "vavae",
)
IMAGES = 80 * 1_281_167


def get_config(row: str = "dit") -> ConfigDict:
  """The configuration of a row."""
  if row not in ROWS:
    raise ValueError(f"{row!r} is no row of the ablation; choose one of {', '.join(ROWS)}.")
  reached = ROWS[: ROWS.index(row) + 1]
  config = lightningdit_sdvae.get_config()
  if "vavae" in reached:
    config.model.update(base.diffusion().model)
    config.latents.update(base.diffusion().latents)
  has = {name: name in reached for name in ROWS}
  config.model.update(use_swiglu=has["swiglu"], use_rmsnorm=has["rmsnorm"], use_rope=has["rope"])
  config.transport.update(use_lognorm=has["lognorm"], use_cosine_loss=has["direction"])
  if not has["rectified_flow"]:
    config.transport.update(path_type="VP", prediction="noise")
  config.batch_size = 1024 if has["batch"] else 256
  config.optimizer.learning_rate = 2e-4 if has["batch"] else 1e-4
  config.optimizer.b2 = 0.95 if has["beta2"] else 0.999
  config.num_steps = round(IMAGES / config.batch_size)
  return config
