"""LightningDiT-B/1 for people without a pod: less than a day of one large GPU, by arithmetic.

  python -m launch.train --config=configs/no_pod.py --workdir=runs/b --config.latents.path=DIR

130 million parameters for 400,000 steps at batch 256, 80 epochs, with half of the tokens led around
blocks 2 to 8 until the last 8 % of the steps (configs/tread.py) and norms of queries and keys. A
step has 25 TFLOP, 35 without routing, all of them 1.0e19: 9 hours at 300 TFLOP/s. Argument "muon":
Muon for the blocks' matrices, 2.7 TFLOP a step. Little memory: --config.accumulate_steps=4.

In the spirit of SR-DiT (arXiv 2512.12386; SwayStar123/SpeedrunDiT): a B/1 of 140 million parameters
reaches FID 3.49 in as many steps without guidance, balanced labels, for about 240 dollars. It also
has what is not here: alignment of the diffusion model itself, another tokenizer, value residuals, a
contrastive loss. Not yet run here.
"""

from ml_collections import ConfigDict

from configs import tread


def get_config(argument: str = "") -> ConfigDict:
  """The recipe, with Muon if the argument says so."""
  if argument not in ("", "muon"):
    raise ValueError(f'{argument!r} is no argument of this recipe; give "muon" or none.')
  config = tread.get_config(f"B/1,{argument}")
  config.batch_size = 256
  config.num_steps = 400_000
  config.route.until = round(config.num_steps * 680 / 740)
  config.optimizer.learning_rate = 1e-4
  config.model.use_qknorm = True
  config.published.labels = "balanced"
  return config
