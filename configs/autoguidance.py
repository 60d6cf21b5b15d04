"""A pair for autoguidance: LightningDiT-XL/1, and the small model whose mistakes it is guided from.

  python -m launch.train --config=configs/autoguidance.py --workdir=runs/xl \
    --config.latents.path=DIR
  python -m launch.train --config=configs/autoguidance.py:guide --workdir=runs/s \
    --config.latents.path=DIR
  python -m launch.sample --workdir=runs/xl --guide=runs/s --output=runs/xl.npz --num_samples=50000

The model is that of 64 epochs, sampled at scale 1.42, on all channels and at all times; the guide,
S/1, is trained on the same latents for 14 epochs, at a twentieth of the model's cost a step. The
guide's epochs and the scale are of RAE's pair (arXiv 2510.11690; bytetriper/RAE at a4d18c4,
configs/stage2/sampling): XL and S too, but with a wide head each (docs/rae.md), on its own latents,
and the XL trained longer. With ",512" behind the word, latents are of 512 px, the guide has 20
epochs and the scale is 1.5. Karras et al. (arXiv 2406.02507) guide a model by one of two thirds of
its width after a sixteenth of its steps, at scale 2.1, both with averages of their own.

Which guide and scale are best for a model, a sweep finds, over the guide's checkpoints of every two
epochs, its averages and the scale:

  python -m launch.evaluate sweep --workdir=runs/xl --guide=runs/s --num_samples=10000 \
    --grid=guide_step=5000,10000,15000,17516 --grid=cfg_scale=1.2,1.35,1.5,1.75,2.1 \
    --reference=REFERENCE --output=runs/xl_guides

Not yet run here.
"""

from ml_collections import ConfigDict

from configs import base

WORDS = ("model", "guide")
# Pixels -> the guide's epochs, and the scale.
PUBLISHED = {256: (14, 1.42), 512: (20, 1.5)}
IMAGES = 1_281_167
SMALL = {"depth": 12, "hidden_size": 384, "num_heads": 6}


def get_config(argument: str = "model") -> ConfigDict:
  """The "model" or its "guide", perhaps for 512 px."""
  word, *more = argument.split(",")
  if word not in WORDS or more not in ([], ["512"]):
    raise ValueError(f"{argument!r} is none of {', '.join(WORDS)}, nor one of them with ',512'.")
  config = base.diffusion()
  size = 512 if more else 256
  config.model.input_size = size // 16
  epochs, scale = PUBLISHED[size]
  config.sample.update(cfg_scale=scale, cfg_channels=0, cfg_interval_start=0.0)
  if word == "guide":
    config.model.update(SMALL)
    config.num_steps = round(epochs * IMAGES / config.batch_size)
    config.keep_every_steps = config.save_every_steps = 2_500
    config.optimizer.ema_decays = (0.9999, 0.999)
  return config
