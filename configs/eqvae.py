"""EQ-VAE: a released tokenizer fine-tuned so that its latents turn and shrink as pictures do.

  python -m launch.train --config=configs/eqvae.py --workdir=runs/eqvae \
    --config.init_from=FILE --config.data.source=folder:data/openimages/train

FILE: an AutoencoderKL, such as the SD-VAE that the paper begins with. As the authors' code: five
epochs of batches of 160, at the rate that its rule gives for them, the discriminator from the first
batch on; half of the batches shrink and turn latents, and a quarter of the others are of pictures
shrunk before. Theirs also draws scales from k/32, k = 8 to 31, a program of its own for each:
--config.equivariance.scales=(0.25,0.28125,...). Their pictures are crops of half to all of the
shorter side; here of all of it. Diffusion then trains on new latents: launch.encode.

With the argument "vavae" it is VA-VAE f16d32's last stage with this term, for its released weights:
the alignment goes on, and no pictures are shrunk before they are encoded.

Paper (arXiv 2502.09509), SD-VAE on OpenImages: rFID 0.82, PSNR 25.95, LPIPS .141, SSIM .72; with
its latents DiT-XL/2 learns seven times as fast. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import vavae_f16d32

BATCH = 160  # 8 GPUs, 10 pictures each, two batches for a step
RATE = 4.5e-6 * BATCH


def get_config(argument: str = "") -> ConfigDict:
  """The fine-tuning of the SD-VAE, or of VA-VAE."""
  if argument not in ("", "vavae"):
    raise ValueError(f'{argument!r} is no argument of this recipe; give "vavae" or none.')
  config = vavae_f16d32.get_config("" if argument else "sd_f8d4")
  config.equivariance.share = 0.5
  stages = {name: column[-1:] for name, column in config.stages.items() if len(column)}
  config.stages.update(stages, epochs=(5.0,))
  if not argument:
    config.equivariance.low_share = 0.25
    config.batch_size = BATCH
    config.optimizer.learning_rate = RATE
  return config
