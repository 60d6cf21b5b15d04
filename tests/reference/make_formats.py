"""Makes formats/outputs.npz: what the reference computes with the weights of the files beside it.

  python -m tests.reference.make_formats CHECKOUT

CHECKOUT is one of hustvl/LightningDiT; PyTorch, einops and NumPy are needed. Inputs are procedural:
the names in `INPUTS`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from launch.lab.torch.checkout import lightningdit
from tests.reference import procedural

FORMATS = Path(__file__).parent / "formats"
# Name -> shape, as procedural.normal makes them.
INPUTS = {"latent": (2, 8, 4, 4), "image": (1, 3, 16, 16), "z": (1, 8, 4, 4)}
TIMES, LABELS = [0.25, 0.75], [1, 5]
LIGHTNINGDIT = {
  "input_size": 4,
  "patch_size": 1,
  "in_channels": 8,
  "hidden_size": 32,
  "depth": 1,
  "num_heads": 2,
  "num_classes": 5,
  "use_swiglu": True,
  "use_rope": True,
  "use_rmsnorm": True,
}
AUTOENCODER = {
  "ch": 32,
  "out_ch": 3,
  "ch_mult": (1, 2, 2),
  "num_res_blocks": 1,
  "attn_resolutions": (4,),
  "in_channels": 3,
  "resolution": 16,
  "z_channels": 8,
}


def main() -> None:
  """The script."""
  inputs = {name: torch.tensor(procedural.normal(name, shape)) for name, shape in INPUTS.items()}
  network = lightningdit(sys.argv[1])
  outputs = {}
  for file, part in (
    ("lightningdit_bare_state_dict", ""),
    ("lightningdit_ema_module_prefix", "ema"),
    ("lightningdit_train_checkpoint", "ema"),
    ("lightningdit_train_checkpoint", "model"),
  ):
    content = torch.load(FORMATS / f"{file}.pt", weights_only=True)
    weights = content[part] if part else content
    model = network(**LIGHTNINGDIT).eval()
    model.load_state_dict({name.removeprefix("module."): x for name, x in weights.items()})
    with torch.no_grad():
      velocity = model(inputs["latent"], torch.tensor(TIMES), torch.tensor(LABELS))
    outputs[f"{file}/{part}"] = velocity
  sys.path.insert(0, f"{sys.argv[1]}/vavae")
  from ldm.modules.diffusionmodules.model import Decoder, Encoder

  weights = torch.load(FORMATS / "vavae_lightning.ckpt", weights_only=True)["state_dict"]
  for side, module in (("encoder", Encoder), ("decoder", Decoder)):
    model = module(**AUTOENCODER, double_z=True, dropout=0.0).eval()
    prefix = f"{side}."
    model.load_state_dict(
      {k.removeprefix(prefix): x for k, x in weights.items() if k.startswith(prefix)}
    )
    convolution = "quant_conv" if side == "encoder" else "post_quant_conv"
    weight, bias = (weights[f"{convolution}.{kind}"] for kind in ("weight", "bias"))
    with torch.no_grad():
      outputs[side] = (
        torch.conv2d(model(inputs["image"]), weight, bias)
        if side == "encoder"
        else model(torch.conv2d(inputs["z"], weight, bias))
      )
  np.savez(FORMATS / "outputs.npz", **{name: x.numpy() for name, x in outputs.items()})


if __name__ == "__main__":
  main()
