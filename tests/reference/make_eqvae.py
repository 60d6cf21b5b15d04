"""Makes the reference case of the equivariance term; needs PyTorch.

  python -m tests.reference.make_eqvae CHECKOUT     # of zelaki/eqvae, at c34589c

Their `training_step` of a small autoencoder with procedural weights, once for each kind of batch,
with the draws given: what it decodes and compares with, the loss and its gradients. The loss is L1
summed, and the KL; LPIPS and the discriminator are left out.
"""

import json
import random
import sys
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn

from launch.lab.torch import checkout
from tests.reference import procedural

FOLDER = Path(__file__).parent
CONFIG = {
  "z_channels": 4,
  "resolution": 32,
  "ch": 32,
  "ch_mult": (1, 2),
  "num_res_blocks": 1,
  "attn_resolutions": (),
}
KL_WEIGHT = 1e-6
# (scale, quarters of a turn, 0: shrunk before it is encoded)
BATCHES = {"a": (0.25, 1), "b": (0.5, 2), "c": (0.75, 3), "low": (0.5, 0), "plain": (1.0, 0)}
WATCHED = ("encoder.conv_in.weight", "quant_conv.bias", "decoder.conv_out.weight")


class Loss(nn.Module):
  """What `LPIPSWithDiscriminator` is without perceptual and adversarial part."""

  def forward(self, inputs, reconstructions, posterior, *_, **__):
    nll = torch.sum(torch.abs(inputs - reconstructions)) / len(inputs)
    kl = torch.sum(posterior.kl()) / len(inputs)
    self.seen = inputs, reconstructions, nll, kl
    return nll + KL_WEIGHT * kl, {}


class LightningModule(nn.Module):
  """As much of Lightning's as a step needs."""

  global_step, device = 0, "cpu"

  def log(self, *_, **__) -> None:
    pass

  log_dict = log


def main(source: str) -> None:
  checkout.stand_in("taming")
  lightning = types.ModuleType("pytorch_lightning")
  lightning.LightningModule = LightningModule
  sys.modules["pytorch_lightning"] = lightning
  sys.path.insert(0, f"{source}/train_eqvae")
  from ldm.models import autoencoder

  autoencoder.instantiate_from_config = lambda _: Loss()
  arguments = {**CONFIG, "double_z": True, "in_channels": 3, "out_ch": 3, "dropout": 0.0}
  model = autoencoder.AutoencoderKL(arguments, {}, embed_dim=4)
  shapes = {name: list(x.shape) for name, x in model.state_dict().items()}
  model.load_state_dict({n: torch.tensor(x) for n, x in procedural.state_dict(shapes).items()})
  image = torch.tensor(np.floor(256 * procedural.uniform("image", (2, 32, 32, 3))) / 127.5 - 1)
  arrays = {}
  for name, (scale, quarters) in BATCHES.items():
    grid = round(16 * scale) if not quarters else 16
    noise = torch.tensor(procedural.normal("noise", (2, 4, grid, grid)))
    chosen = iter([scale, quarters] if quarters else [scale])
    chances = iter([0.0] if quarters else [1.0, float(scale == 1)])
    random.random, random.choice = lambda c=chances: next(c), lambda _, c=chosen: next(c)
    torch.randn = lambda *_, x=noise, **__: x
    model.zero_grad()
    loss = model.training_step({"image": image}, 0, 0)
    loss.backward()
    inputs, decoded, nll, kl = model.loss.seen
    arrays |= {f"{name}/target": inputs, f"{name}/decoded": decoded}
    arrays |= {f"{name}/nll": nll, f"{name}/kl": kl}
    gradients = {key: x.grad for key, x in model.named_parameters()}
    norm = torch.sqrt(sum(torch.sum(x**2) for x in gradients.values()))
    arrays |= {f"{name}/grad_norm": norm}
    arrays |= {f"{name}/grad/{key}": gradients[key] for key in WATCHED}
  found = {name: array.detach().numpy() for name, array in arrays.items()}
  np.savez_compressed(FOLDER / "eqvae", **found)
  spec = {
    "what": f"zelaki/eqvae AutoencoderKL.training_step, torch {torch.__version__}",
    "config": CONFIG | {"embed_dim": 4},
    "state_dict_shapes": shapes,
    "inputs": {
      "image": "uint8 floor(256 uniform('image', (2,32,32,3)))",
      "noise": "normal('noise', z's)",
    },
    "batches": {name: {"scale": x[0], "quarters": x[1]} for name, x in BATCHES.items()},
    "loss": f"sum of |target - decoded| / 2 + {KL_WEIGHT} KL",
  }
  (FOLDER / "eqvae.json").write_text(json.dumps(spec, indent=1) + "\n")


if __name__ == "__main__":
  main(sys.argv[1])
