"""The reference's PyTorch models, out of a checkout of hustvl/LightningDiT.

For the scripts beside this one, which an interpreter with PyTorch runs; nothing of this project is
imported. Empty modules stand in for those that the reference imports without need, and a VGG16
for torchvision's, which does not load beside every PyTorch.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# For downloads, progress bars, pictures, other models' operators: nothing that is computed here.
UNNEEDED = ("requests", "tqdm", "torchvision", "torchdiffeq", "scipy", "fairscale")


def loads(name: str) -> bool:
  """Whether a module can be imported; torchvision without its operators raises RuntimeError."""
  try:
    importlib.import_module(name)
  except (ImportError, RuntimeError):
    for module in [module for module in sys.modules if module.partition(".")[0] == name]:
      del sys.modules[module]
    return False
  return True


ABSENT = [name for name in UNNEEDED if not loads(name)]
REPLACED = [
  *(f"{name} (empty)" for name in ABSENT),
  "pytorch_lightning (its module is PyTorch's)",
  "torchvision's VGG16 (written anew)",
]


def empty(_: Any, name: str) -> Any:
  """A class without content, whose attributes are such classes."""
  if name.startswith("__"):
    raise AttributeError(name)
  return type("Empty", (type,), {"__getattr__": empty})(name, (), {})


class StandIn(types.ModuleType):
  """A module in which every name is an empty class."""

  __getattr__ = empty


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds the modules of `ABSENT` and their submodules."""

  def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
    if fullname.partition(".")[0] not in ABSENT:
      return None
    return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

  def create_module(self, spec: Any) -> types.ModuleType:
    return StandIn(spec.name)

  def exec_module(self, module: types.ModuleType) -> None:
    pass


def stand_in(*more: str) -> None:
  """Lets the modules of `ABSENT` be imported, and empty ones in the place of `more`."""
  ABSENT.extend(more)
  sys.meta_path.insert(0, StandIns())  # before the finder of a module that does not load


def lightningdit(checkout: str, compiled: bool = False) -> Any:
  """The class LightningDiT of a checkout; `compiled`: with its torch.compile of each block."""
  if not compiled:
    torch.compile = lambda function=None, **_: function if function else lambda f: f
  sys.path.insert(0, checkout)
  from models.lightningdit import LightningDiT

  return LightningDiT


def sampler(
  model: nn.Module, sample: dict[str, Any]
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
  """From noise and labels to latents by the reference's solver, as its `inference.py` composes it.

  Its guidance always computes both halves, and always takes the class 1,000 for the absent one;
  here it is the model's.

  Args:
    sample: num_steps, method, atol, rtol, timestep_shift, cfg_scale, cfg_interval_start.
  """
  from transport import Sampler, create_transport

  options = dict(sample)
  guidance = {name: options.pop(name) for name in ("cfg_scale", "cfg_interval_start")}
  solve = Sampler(create_transport()).sample_ode(sampling_method=options.pop("method"), **options)
  null: Any = model.y_embedder

  def draw(noise: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    if guidance["cfg_scale"] <= 1:
      return solve(noise, model.forward, y=label)[-1]
    y = torch.cat([label, torch.full_like(label, null.num_classes)])
    double = torch.cat([noise, noise])
    both = solve(double, model.forward_with_cfg, y=y, cfg_interval=True, **guidance)[-1]
    return both.chunk(2)[0]

  return draw


def autoencoder(checkout: str) -> Any:
  """The class AutoencoderKL of a checkout, which encodes and decodes."""
  sys.path.insert(0, checkout)
  from tokenizer.autoencoder import AutoencoderKL

  return AutoencoderKL


def precision(job: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
  """Autocast to bfloat16 on the job's device, as the reference trains, or nothing."""
  if job["dtype"] == "bfloat16":
    return torch.autocast(job.get("device", "cpu"), torch.bfloat16)
  return contextlib.nullcontext()


def vgg16(pretrained: bool = True) -> nn.Module:
  """torchvision's VGG16, its convolutions alone; the job gives the weights."""
  del pretrained
  layers: list[nn.Module] = []
  channels = 3
  for widths in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
    for width in widths:
      layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
      channels = width
    layers.append(nn.MaxPool2d(2, 2))
  model = nn.Module()
  model.features = nn.Sequential(*layers)
  return model


def tokenizer_training(job: dict[str, Any]) -> nn.Module:
  """The reference's AutoencoderKL of `vavae/`, which trains; no weights are fetched for it.

  Args:
    job: "checkout" and "taming" (one of CompVis/taming-transformers), "ddconfig", "embed_dim",
      "teacher" ("kind", the reference's name, and timm's "model" of a "width"), "loss" (the
      arguments of LPIPSWithDiscriminator), "learning_rate".
  """
  import timm
  import torchvision.models

  create, teacher = timm.create_model, job["teacher"]
  timm.create_model = lambda name, pretrained, **kwargs: create(
    teacher["model"], num_classes=0, **kwargs
  )
  torchvision.models.vgg16 = vgg16
  lightning: Any = types.SimpleNamespace(LightningModule=nn.Module)
  sys.modules["pytorch_lightning"] = lightning
  sys.path[:0] = [f"{job['checkout']}/vavae", job["taming"]]
  from taming.modules.losses.lpips import LPIPS

  LPIPS.load_from_pretrained = lambda self: None
  from ldm.models import foundation_models
  from ldm.models.autoencoder import AutoencoderKL

  made = foundation_models.create_foundation_model  # which takes every width for ViT-L's
  foundation_models.create_foundation_model = lambda kind: (made(kind)[0], teacher["width"])
  loss = {"target": "ldm.modules.losses.LPIPSWithDiscriminator", "params": job["loss"]}
  model = AutoencoderKL(
    job["ddconfig"], loss, job["embed_dim"], use_vf=teacher["kind"], reverse_proj=True
  )
  model.learning_rate = job["learning_rate"]
  optimizers, _ = model.configure_optimizers()
  model.optimizers = lambda: optimizers
  model.manual_backward = lambda loss: loss.backward()
  return model
