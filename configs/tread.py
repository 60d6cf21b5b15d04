"""LightningDiT with TREAD's token routing: for most of the training half of the tokens skip blocks.

  python -m launch.train --config=configs/tread.py --workdir=runs/tread --config.latents.path=DIR

Argument: a size as of configs/lightningdit.py, XL/1 if none is given; behind a comma "muon", for
the blocks' matrices. The recipe is that of 64 epochs with the authors' route, blocks 2 to L-4. It
ends for the last 8 % of the steps, as their 60 of 740 epochs for classifier-free guidance do, and
samples are drawn as of the 64-epoch recipe. Without that end (--config.route.until=0) guide by
tokens: `launch.sample --routed=0.3 --guide_routed=0.7 --cfg_scale=1.5 --cfg_interval_start=0
--cfg_channels=0`, the authors' example.

The paper (arXiv 2501.04765), DiT-XL/2 on SD-VAE latents at batch 256: FID 7.38 after 400,000 steps,
19.47 without; 3.93 after 680 epochs, 2.09 with guidance after 740. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import lightningdit


def get_config(argument: str = "XL/1") -> ConfigDict:
  """The recipe at a size, perhaps with Muon."""
  words = [word for word in argument.split(",") if word]
  sizes = [word for word in words if word != "muon"]
  config = lightningdit.get_config(",".join(sizes) or "XL/1")
  config.optimizer.muon = "muon" in words
  config.route.update(share=0.5, until=round(config.num_steps * 680 / 740))
  return config
