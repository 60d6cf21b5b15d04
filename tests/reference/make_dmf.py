"""Makes the reference case of Decoupled MeanFlow; needs PyTorch and timm.

  python -m tests.reference.make_dmf CHECKOUT     # of kyungmnlee/dmf, at a6db0f6

A DMFT of theirs with procedural weights: what it predicts between two times, its loss with model
guidance, the noise, times and labels that were drawn, gradients of that, and samples of one and
three steps. Log variances are [B, 1, 1, 1] there and errors [B], which pairs every error with every
log variance; here each has its own.
"""

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from launch.lab.torch import checkout  # stand-ins for what timm imports without need
from tests.reference import procedural

FOLDER = Path(__file__).parent
CONFIG = {
  "input_size": 4,
  "patch_size": 2,
  "in_channels": 4,
  "hidden_size": 32,
  "depth": 3,
  "num_heads": 2,
  "num_classes": 1000,  # their loss takes it for the null label
}
DEPTH, BATCH = 2, 6
GUIDANCE = {"omega": 0.6, "g_min": 0.0, "g_max": 0.7, "g_type": "mg"}
TIMES = {"P_mean": 0.0, "P_mean_t": 0.4, "P_mean_r": -1.2}
WATCHED = (
  "x_embedder.proj.weight",
  "t_embedder.mlp.2.weight",
  "blocks.0.attn.qkv.weight",
  "blocks.2.adaLN_modulation.1.bias",
  "final_layer.linear.weight",
  "logvar_linear.weight",
)


def main(source: str) -> None:
  sys.path.insert(0, source)
  for name in ("models.flash_attention_2_jvp", "models.flash_attention_3_jvp"):
    sys.modules[name] = types.SimpleNamespace(flash_attn_func=None)
  import loss as of_authors
  import samplers
  from models.dmft import DMFT

  model = DMFT(**CONFIG, dmf_depth=DEPTH, use_logvar=True, attn_func="base")
  shapes = {name: list(x.shape) for name, x in model.state_dict().items() if name != "pos_embed"}
  weights = {name: torch.tensor(x) for name, x in procedural.state_dict(shapes).items()}
  model.load_state_dict(weights, strict=False)
  shape, y = (BATCH, 4, 4, 4), torch.tensor([1, 8, 5, 999, 0, 7])
  x = torch.tensor(procedural.normal("x", shape))
  t, r = (torch.tensor(procedural.uniform(name, (BATCH,))) for name in ("t", "r"))
  with torch.no_grad():
    predicted, log_variance = model(x, t, r, y, return_logvar=True)
    samples = {
      f"sample_{steps}": samplers.euler_sampler(model, x, y, num_steps=steps) for steps in (1, 3)
    }

  arrays = {"predicted": predicted, "log_variance": log_variance.reshape(-1), **samples}
  found = of_authors.DMFLoss(**TIMES, **GUIDANCE, cfg_prob=0.4)
  times, noise, interpolant = found.sample_times, [], of_authors.interpolant
  drop = found.cond_drop

  def sample_times(count: int) -> tuple[torch.Tensor, ...]:
    drawn = times(count)
    arrays.update(zip(("t_fm", "t_mf", "r_mf"), (x.reshape(-1) for x in drawn), strict=True))
    return drawn

  def cond_drop(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    labels, dropped = drop(labels)
    arrays["label"] = labels
    return labels, dropped

  def keep_noise(x: torch.Tensor, t: torch.Tensor, path: str) -> tuple[torch.Tensor, ...]:
    x_t, v_t = interpolant(x, t, path)
    noise.append(v_t + x)
    return x_t, v_t

  def each_by_its_own(x: torch.Tensor, y: torch.Tensor, lv: torch.Tensor) -> tuple[Any, Any]:
    return weighted(x, y, lv.reshape(-1))

  weighted, of_authors.log_lv_loss = of_authors.log_lv_loss, each_by_its_own
  found.sample_times, found.cond_drop = sample_times, cond_drop
  of_authors.interpolant = keep_noise
  torch.manual_seed(0)
  loss, parts = found(model, model, x, y)
  loss.mean().backward()
  arrays |= {"loss": loss.reshape(-1), "noise_fm": noise[0], "noise_mf": noise[1]}
  arrays |= {name: parts[name] for name in ("fm_loss", "mf_loss")}
  assert (arrays["label"] == CONFIG["num_classes"]).sum() not in (0, BATCH)
  guided = [(arrays[name] <= GUIDANCE["g_max"]).sum() for name in ("t_fm", "t_mf")]
  assert all(0 < count < BATCH for count in guided)
  gradients = {name: dict(model.named_parameters())[name].grad.numpy() for name in WATCHED}
  np.savez_compressed(
    FOLDER / "dmf",
    **{name: array.detach().numpy() for name, array in arrays.items()},
    **{f"grad/{name}": array for name, array in gradients.items()},
  )
  spec = {
    "what": f"kyungmnlee/dmf DMFT, DMFLoss and euler_sampler, torch {torch.__version__}",
    "config": CONFIG,
    "dmf_depth": DEPTH,
    "state_dict_shapes": shapes,
    "inputs": {
      "x": "normal('x', (6,4,4,4))",
      "t": "uniform('t', (6,))",
      "r": "uniform('r', (6,))",
      "y": y.tolist(),
    },
    "guidance": GUIDANCE,
    "keys": {
      "sample_n": "by n steps from the noise x",
      "t_fm, t_mf, r_mf, noise_fm, noise_mf, label": "what the loss drew for the latents x",
      "fm_loss, mf_loss": "sums of squares",
      "grad/...": "of the mean of the loss",
    },
  }
  (FOLDER / "dmf.json").write_text(json.dumps(spec, indent=1) + "\n")


if __name__ == "__main__":
  sys.meta_path.append(checkout.StandIns())
  main(sys.argv[1])
