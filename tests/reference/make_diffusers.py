"""Makes the reference case of diffusers' AutoencoderKL; needs PyTorch and diffusers.

  python -m tests.reference.make_diffusers

Names and shapes of E2E-VAVAE's architecture (End2End-Diffusion/REPA-E, models/autoencoder.py,
f16d32) as diffusers builds it, and what a narrow one with procedural weights computes.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch

from tests.reference import procedural

FOLDER = Path(__file__).parent
FULL = {"block_out_channels": [128, 128, 256, 256, 512], "latent_channels": 32}
NARROW = {"block_out_channels": [32, 64], "latent_channels": 6, "layers_per_block": 1}


def build(sizes: dict) -> diffusers.AutoencoderKL:
  """With attention at the smallest resolution alone, as VA-VAE has it at 16 of 256 pixels."""
  plain = len(sizes["block_out_channels"]) - 1
  return diffusers.AutoencoderKL(
    down_block_types=["DownEncoderBlock2D"] * plain + ["AttnDownEncoderBlock2D"],
    up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * plain,
    **{"layers_per_block": 2, **sizes},
  )


def shapes_of(model: torch.nn.Module) -> dict[str, list[int]]:
  return {name: list(x.shape) for name, x in model.state_dict().items()}


def main() -> None:
  full, model = build(FULL), build(NARROW)
  shapes = shapes_of(model)
  model.load_state_dict({n: torch.tensor(x) for n, x in procedural.state_dict(shapes).items()})
  with torch.no_grad():
    posterior = model.encode(
      torch.tensor(procedural.uniform("image", (1, 3, 8, 8), -1))
    ).latent_dist
    image = model.decode(torch.tensor(procedural.normal("z", (1, 6, 4, 4)))).sample
  np.savez_compressed(
    FOLDER / "diffusers_vae", mean=posterior.mean, logvar=posterior.logvar, image=image
  )
  spec = {
    "what": f"diffusers {diffusers.__version__} AutoencoderKL, torch {torch.__version__}",
    "sizes": {"full": FULL, "narrow": NARROW},
    "inputs": {"image": "uniform('image', (1,3,8,8), -1)", "z": "normal('z', (1,6,4,4))"},
    "state_dict_shapes": shapes,
    "full_shapes": shapes_of(full),
  }
  (FOLDER / "diffusers_vae.json").write_text(json.dumps(spec) + "\n")


if __name__ == "__main__":
  main()
