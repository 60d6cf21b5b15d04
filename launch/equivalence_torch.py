"""The PyTorch side of `launch.equivalence`: the reference on given weights and inputs.

A script of its own, run by whichever interpreter has PyTorch, that imports nothing of this project
but the script beside it. It reads a job, one line of JSON on the standard input, and writes an npz:
`layer/III/NAME` for the outputs of the watched modules in the order they ran, `output`, and what
else the job asks for. The models are imported from a checkout of hustvl/LightningDiT (teachers from
timm); of modules that these import and do not need, empty ones stand in.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_torch import load_reference
from torch import nn

Arrays = dict[str, torch.Tensor]
Named = Iterator[tuple[str, torch.Tensor]]
# Imported for what is not needed here: downloads, progress bars, pictures, other models' operators.
UNNEEDED = ("requests", "tqdm", "torchvision", "torchdiffeq")
ABSENT = [name for name in UNNEEDED if importlib.util.find_spec(name) is None]
TEACHERS = {
  "dinov2_vits14": "vit_small_patch14_dinov2",
  "dinov2_vitb14": "vit_base_patch14_dinov2",
  "dinov2_vitl14": "vit_large_patch14_dinov2",
  "dinov2_vitg14": "vit_giant_patch14_dinov2",
  "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2",
  "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2",
  "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2",
  "dinov2_vitg14_reg": "vit_giant_patch14_reg4_dinov2",
  "mae_vitb16": "vit_base_patch16_224",
  "mae_vitl16": "vit_large_patch16_224",
  "mae_vith14": "vit_huge_patch14_224",
}


class Empty(type):
  """A class without content; what is asked of it is its own name."""

  def __getattr__(cls, name: str) -> str:
    if name.startswith("__"):
      raise AttributeError(name)
    return name


class StandIn(types.ModuleType):
  """A module in which every name is an empty class."""

  def __getattr__(self, name: str) -> Any:
    if name.startswith("__"):
      raise AttributeError(name)
    return Empty(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds the modules of `ABSENT`, and whatever is in them."""

  def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
    if fullname.partition(".")[0] not in ABSENT:
      return None
    return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

  def create_module(self, spec: Any) -> types.ModuleType:
    return StandIn(spec.name)

  def exec_module(self, module: types.ModuleType) -> None:
    pass


@contextlib.contextmanager
def watched(model: nn.Module, classes: list[str], found: Arrays) -> Iterator[None]:
  """Keeps what modules of these classes, or of these names, give, in the order they run."""

  def keep(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
      found[f"layer/{len(found):03}/{name}"] = output.detach().float()

    return hook

  handles = [
    module.register_forward_hook(keep(name))
    for name, module in model.named_modules()
    if type(module).__name__ in classes or name in classes
  ]
  yield
  for handle in handles:
    handle.remove()


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


def load(model: nn.Module, job: dict[str, Any]) -> nn.Module:
  """The model with the job's weights, strictly; where there are none, random ones are made."""
  weights = Path(job["weights"])
  if not weights.exists():
    randomise(model, job["seed"])
    torch.save(model.state_dict(), weights)
  model.load_state_dict(torch.load(weights, weights_only=True), strict=True)
  return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
  """Normal weights that keep the scale of activations; none stays zero, which would hide much."""
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    if name == "pos_embed" and not parameter.requires_grad:
      continue  # a constant
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim > 1:
      parameter.copy_(noise * parameter[0].numel() ** -0.5)
    else:
      parameter.copy_(0.1 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0))
    if name.startswith("lin"):  # LPIPS' heads are not negative
      parameter.abs_()


def lightningdit(job: dict[str, Any], given: Arrays) -> Named:
  """Forward, the reference's loss, its gradients, steps of AdamW, a trajectory."""
  model = load(load_reference(job["checkout"])(**job["arguments"]), job)
  found: Arrays = {}
  latent, noise, t, label = (given[name] for name in ("latent", "noise", "t", "label"))
  with torch.no_grad(), watched(model, job["watch"], found), precision(job):
    output = model(latent, t, label)
  yield from found.items()
  yield "output", output
  from transport import Sampler, create_transport

  transport = create_transport(use_cosine_loss=True, use_lognorm=True)
  transport.sample = lambda x1, *_, **__: (t, noise, x1)
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=job["learning_rate"], weight_decay=0, betas=(0.9, 0.95)
  )
  parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
  for step in range(job["steps"]):
    with precision(job):
      terms = transport.training_losses(model, latent, {"y": label})
    loss = terms["loss"].mean() + terms["cos_loss"].mean()
    optimizer.zero_grad()
    loss.backward()
    if step == 0:
      yield from ((f"gradient/{name}", p.grad) for name, p in parameters.items())
    optimizer.step()
    yield f"loss/{step}", loss
  if job["steps"]:
    yield from ((f"parameter/{name}", p) for name, p in parameters.items())
  if job["trajectory"] and "torchdiffeq" not in ABSENT:
    sampler = Sampler(transport).sample_ode(
      sampling_method="euler", num_steps=job["trajectory"], timestep_shift=0.3
    )
    load(model, job)
    with torch.no_grad(), precision(job):
      end = sampler(noise, model, y=label)[-1]
    yield f"trajectory/{job['trajectory'] - 1}", end


def autoencoder(job: dict[str, Any], given: Arrays) -> Named:
  """Moments of a picture's posterior, and the picture of its mean."""
  sys.path.insert(0, job["checkout"])
  from tokenizer.autoencoder import AutoencoderKL

  model = load(AutoencoderKL(**job["arguments"]), job)
  found: Arrays = {}
  with torch.no_grad(), watched(model, job["watch"], found), precision(job):
    posterior = model.encode(given["image"])
    decoded = model.decode(given["z"])
  yield from found.items()
  yield from (("mean", posterior.mean), ("logvar", posterior.logvar), ("output", decoded))


def teacher(job: dict[str, Any], given: Arrays) -> Named:
  """The features as the reference's aux_foundation_model takes them from timm's model."""
  import timm

  model = load(timm.create_model(TEACHERS[job["name"]], num_classes=0, dynamic_img_size=True), job)
  image = given["image"]
  rows, columns = image.shape[2] // 16, image.shape[3] // 16
  if "14" in job["name"]:
    image = nn.functional.interpolate(image, (14 * rows, 14 * columns), mode="bilinear")
  found: Arrays = {}
  with torch.no_grad(), watched(model, job["watch"], found), precision(job):
    tokens = model.forward_features(image)[:, model.num_prefix_tokens :]
  yield from found.items()
  yield "output", tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def lpips(job: dict[str, Any], given: Arrays) -> Named:
  """The distance of two pictures and its gradient by the second."""
  import torchvision.models

  torchvision.models.vgg16 = vgg16
  sys.path.insert(0, job["checkout"])
  from models.lpips import LPIPS

  LPIPS.load_from_pretrained = lambda self: None
  model = load(LPIPS(), job)
  other = given["other"].requires_grad_()
  found: Arrays = {}
  with watched(model, job["watch"], found):
    distance = model(given["image"], other)
  distance.sum().backward()
  yield from found.items()
  yield from (("output", distance.flatten()), ("gradient/other", other.grad))


def precision(job: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
  """bfloat16 as the reference trains, or nothing."""
  if job["dtype"] == "bfloat16":
    return torch.autocast("cpu", torch.bfloat16)
  return contextlib.nullcontext()


MODELS = {f.__name__: f for f in (lightningdit, autoencoder, teacher, lpips)}


def main() -> None:
  """The script."""
  sys.meta_path.append(StandIns())
  job = json.loads(sys.stdin.readline())
  with np.load(job["inputs"]) as arrays:
    given = {name: torch.tensor(array) for name, array in arrays.items()}
  # An array at a time, since a model's gradients and parameters would fill the memory.
  with zipfile.ZipFile(job["outputs"], "w") as archive:
    for name, tensor in MODELS[job["model"]](job, given):
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, tensor.detach().float().numpy())
  print(json.dumps({"torch": torch.__version__}), flush=True)


if __name__ == "__main__":
  main()
