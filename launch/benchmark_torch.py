"""A training step of the PyTorch reference, for `launch.benchmark` to time beside ours.

A script of its own, run by whichever interpreter has PyTorch, that imports nothing of this project:
it reads one line of JSON (the model's arguments), then times one step for each further line. The
model is imported from a checkout of hustvl/LightningDiT and runs eagerly; the loss, AdamW and EMA
are what the reference's `train.py` does. Of timm and fairscale, which that model imports, only two
layers are used; they are given here, so that neither need be installed.
"""

import json
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class PatchEmbed(nn.Module):
  """timm's: a strided convolution, then tokens."""

  def __init__(
    self, img_size: int, patch_size: int, in_chans: int, embed_dim: int, bias: bool = True
  ):
    super().__init__()
    self.num_patches = (img_size // patch_size) ** 2
    self.patch_size = (patch_size, patch_size)
    self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
  """timm's: two matrices around an activation."""

  def __init__(
    self,
    in_features: int,
    hidden_features: int,
    act_layer: Callable[[], nn.Module],
    drop: float = 0.0,
  ):
    del drop  # the reference asks for none
    super().__init__()
    self.fc1 = nn.Linear(in_features, hidden_features)
    self.act = act_layer()
    self.fc2 = nn.Linear(hidden_features, in_features)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(self.act(self.fc1(x)))


def _module(name: str, **contents: Any) -> None:
  module = types.ModuleType(name)
  module.__dict__.update(contents)
  sys.modules[name] = module


def load_reference(checkout: str) -> Any:
  """The class LightningDiT of a checkout, without compilation."""
  for name in ("timm", "timm.models", "fairscale", "fairscale.nn"):
    _module(name)
  _module("timm.models.vision_transformer", PatchEmbed=PatchEmbed, Mlp=Mlp)
  _module("fairscale.nn.model_parallel")
  _module("fairscale.nn.model_parallel.initialize")
  # Of a part of the reference's file that LightningDiT does not use.
  unused = ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear")
  _module("fairscale.nn.model_parallel.layers", **dict.fromkeys(unused))
  torch.compile = lambda function=None, **_: function if function else lambda f: f
  sys.path.insert(0, checkout)
  from models.lightningdit import LightningDiT

  return LightningDiT


class Training:
  """Model, average and optimizer; `step` is one update."""

  def __init__(
    self,
    checkout: str,
    model: dict[str, Any],
    batch_size: int,
    learning_rate: float,
    betas: list[float],
    decays: list[float],
  ):
    network = load_reference(checkout)
    self.shape = (batch_size, model["in_channels"], model["input_size"], model["input_size"])
    self.model = network(**model)
    self.emas = [(decay, network(**model)) for decay in decays]
    self.num_classes = model["num_classes"]
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(), lr=learning_rate, weight_decay=0, betas=betas
    )

  def step(self) -> float:
    """One update on random latents."""
    data, noise = torch.randn(self.shape), torch.randn(self.shape)
    t = torch.sigmoid(torch.randn(len(data)))
    label = torch.randint(0, self.num_classes, (len(data),))
    share = t.view(-1, 1, 1, 1)
    predicted = self.model(share * data + (1 - share) * noise, t, label)
    target = data - noise
    cosine = nn.functional.cosine_similarity(predicted, target, dim=1)
    loss = ((predicted - target) ** 2).mean() + (1 - cosine).mean()
    self.optimizer.zero_grad()
    loss.backward()
    self.optimizer.step()
    with torch.no_grad():
      for decay, ema in self.emas:
        for average, new in zip(ema.parameters(), self.model.parameters(), strict=True):
          average.mul_(decay).add_(new, alpha=1 - decay)
    return loss.item()


def main() -> None:
  """The script."""
  training = Training(**json.loads(sys.stdin.readline()))
  told = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
  print(json.dumps(told), flush=True)
  for _ in sys.stdin:
    began = time.perf_counter()
    training.step()
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
  main()
