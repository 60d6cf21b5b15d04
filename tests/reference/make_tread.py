"""Makes the reference case of token routing; needs PyTorch and timm.

  python -m tests.reference.make_tread CHECKOUT     # of CompVis/tread, at fccf77c

A DiT of theirs with procedural weights: its prediction with all tokens and with some led around
blocks 1 to 3, the gradients of that, and a step's velocity by `sample_tread`. Their blocks run
uncompiled, and what the router draws is kept.
"""

import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch

from launch.lab.torch import checkout  # stand-ins for what timm imports without need
from tests.reference import procedural

FOLDER = Path(__file__).parent
CONFIG = {
  "input_size": 8,
  "patch_size": 2,
  "in_channels": 4,
  "hidden_size": 32,
  "depth": 6,
  "num_heads": 2,
  "num_classes": 10,
}
ROUTE = {"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": 3}
SCALE, GAMMAS, NUM_STEPS = 1.5, (0.3, 0.7), 4
# Of each kind of weight one, before, within and behind the stretch.
WATCHED = (
  "x_embedder.proj.weight",
  "blocks.0.mlp.fc1.weight",
  "blocks.2.attn.qkv.weight",
  "blocks.5.adaLN_modulation.1.weight",
)


def main(source: str) -> None:
  sys.path.insert(0, source)
  import dit
  import rf

  model = dit.DiT(**CONFIG, enable_routing=True, routes=[ROUTE])
  shapes = {name: list(x.shape) for name, x in model.state_dict().items() if name != "pos_embed"}
  weights = {name: torch.tensor(x) for name, x in procedural.state_dict(shapes).items()}
  model.load_state_dict(weights, strict=False)
  x = torch.tensor(procedural.normal("x", (3, 4, 8, 8)))
  t, y = torch.tensor(procedural.uniform("t", (3,))), torch.tensor([1, 8, 5])
  draw, kept = model.router.get_mask, []

  def get_mask(x: torch.Tensor, selection_rate: float) -> torch.Tensor:
    kept.append(draw(x, selection_rate))
    return kept[-1]

  model.router.get_mask = get_mask
  torch.manual_seed(0)
  plain = model.eval()(x, t, y)
  assert not kept
  routed = model.train()(x, t, y)
  (routed**2).sum().backward()
  gradients = {name: dict(model.named_parameters())[name].grad.numpy() for name in WATCHED}
  with torch.no_grad():
    z = rf.RF().sample_tread(model, GAMMAS[0], model, GAMMAS[1], x, NUM_STEPS, SCALE, y=y)
  arrays = {"plain": plain, "routed": routed, "kept": kept[0], "z": z}
  arrays |= {f"kept_{i}": ids for i, ids in enumerate(kept[1:])}
  np.savez_compressed(
    FOLDER / "tread",
    **{name: array.detach().numpy() for name, array in arrays.items()},
    **{f"grad/{name}": array for name, array in gradients.items()},
  )
  spec = {
    "what": f"CompVis/tread dit.DiT and rf.RF.sample_tread, torch {torch.__version__}",
    "config": CONFIG,
    "route": ROUTE,
    "state_dict_shapes": shapes,
    "inputs": {"x": "normal('x', (3,4,8,8))", "t": "uniform('t', (3,))", "y": y.tolist()},
    "gradients": "of the sum of squares of what it predicts with routing",
    "sampling": {"scale": SCALE, "gammas": GAMMAS, "num_steps": NUM_STEPS, "from": "x"},
    "keys": {"kept_i": "of the stronger pass, then the weaker, of each step; all labels dropped"},
  }
  (FOLDER / "tread.json").write_text(json.dumps(spec, indent=1) + "\n")


if __name__ == "__main__":
  sys.meta_path.append(checkout.StandIns())
  main(sys.argv[1])
