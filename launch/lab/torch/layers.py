"""The PyTorch side of `launch.lab.equivalence`: the reference on given weights and inputs.

An interpreter with PyTorch runs this script, which imports nothing of this project but the scripts
beside it. It reads a job and writes an npz: `layer/III/NAME` for the outputs of the watched modules
in the order they ran, `output`, and what else the job asks for. The models are imported from a
checkout of hustvl/LightningDiT, teachers from timm.
"""

from __future__ import annotations

import contextlib
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import checkout
import numpy as np
import torch
from checkout import ABSENT, REPLACED, precision, vgg16
from serving import serve
from torch import nn

Arrays = dict[str, torch.Tensor]
Named = Iterator[tuple[str, torch.Tensor]]
# Of a tokenizer's training.
TRAINED_BY_OPTIMIZERS = (
  *("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "linear_proj."),
  "loss.discriminator.",
)


@contextlib.contextmanager
def watched(model: nn.Module, classes: list[str]) -> Iterator[Arrays]:
  """Yields a dict of the outputs of modules with these classes or names, in the order they run."""
  found: Arrays = {}

  def keep(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
      found[f"layer/{len(found):03}/{name}"] = output.detach().float()

    return hook

  handles = [
    module.register_forward_hook(keep(name))
    for name, module in model.named_modules()
    if type(module).__name__ in classes or name in classes
  ]
  yield found
  for handle in handles:
    handle.remove()


def load(model: nn.Module, job: dict[str, Any]) -> nn.Module:
  """The model with the job's weights, strictly; random ones are written if there is no file."""
  weights = Path(job["weights"])
  if not weights.exists():
    randomise(model, job["seed"])
    torch.save(model.state_dict(), weights)
  tensors = torch.load(weights, weights_only=True)
  # What publishers leave in or out of their files, and the reference's models do not or do have.
  tensors.pop("mask_token", None)
  own = model.state_dict()
  constants = {name: own[name] for name in own if "scaling_layer." in name}
  model.load_state_dict(constants | tensors, strict=True)
  return model.eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
  """Normal weights that keep the scale of activations; none stays zero, which would hide much."""
  generator = torch.Generator().manual_seed(seed)
  for name, parameter in model.named_parameters():
    if (name == "pos_embed" and not parameter.requires_grad) or name.endswith("logvar"):
      continue  # constants
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim > 1:
      parameter.copy_(noise * parameter[0].numel() ** -0.5)
    else:
      parameter.copy_(0.1 * noise + (1.0 if name.endswith(("weight", "gamma")) else 0.0))
    if ".model.1." in name and "lin" in name:  # LPIPS' heads are not negative
      parameter.abs_()
  for name, buffer in model.named_buffers():
    if name.endswith("running_mean"):
      buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    elif name.endswith("running_var"):
      buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def lightningdit(job: dict[str, Any], given: Arrays) -> Named:
  """Forward, the reference's loss, its gradients, steps of AdamW, a trajectory."""
  model = load(checkout.lightningdit(job["checkout"])(**job["arguments"]), job)
  latent, noise, t, label = (given[name] for name in ("latent", "noise", "t", "label"))
  with torch.no_grad(), watched(model, job["watch"]) as found, precision(job):
    output = model(latent, t, label)
  yield from found.items()
  if guidance := job.get("guidance"):  # of CVL-UESTC/Internal-Guidance, with its early head
    output, early = output
    yield "output/early", early
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
      if guidance:
        y = torch.cat([label, torch.full_like(label, job["arguments"]["num_classes"])])
        double, more = torch.cat([noise, noise]), {"cfg_interval": True, **guidance}
        end = sampler(double, model.forward_with_cfg, y=y, **more)[-1].chunk(2)[0]
      else:
        end = sampler(noise, model, y=label)[-1]
    yield f"trajectory/{job['trajectory'] - 1}", end


def autoencoder(job: dict[str, Any], given: Arrays) -> Named:
  """Moments of a picture's posterior, and the picture of its mean."""
  model = load(checkout.autoencoder(job["checkout"])(**job["arguments"]), job)
  with torch.no_grad(), watched(model, job["watch"]) as found, precision(job):
    posterior = model.encode(given["image"])
    decoded = model.decode(given["z"])
  yield from found.items()
  yield from (("mean", posterior.mean), ("logvar", posterior.logvar), ("output", decoded))


def teacher(job: dict[str, Any], given: Arrays) -> Named:
  """The features as the reference's aux_foundation_model takes them from timm's model."""
  import timm

  # SAM's takes any size without being asked.
  any_size = {} if job["name"].startswith("sam") else {"dynamic_img_size": True}
  model = load(timm.create_model(job["name"], num_classes=0, **any_size), job)
  image = given["image"]
  rows, columns = image.shape[2] // 16, image.shape[3] // 16
  if "patch14" in job["name"]:
    image = nn.functional.interpolate(image, (14 * rows, 14 * columns), mode="bilinear")
  with torch.no_grad(), watched(model, job["watch"]) as found, precision(job):
    features = model.forward_features(image)
  if features.ndim == 4:  # SAM's, whose blocks have grids with channels last
    yield from ((name, x.permute(0, 3, 1, 2)) for name, x in found.items())
    yield "output", features
    return
  yield from found.items()
  tokens = features[:, model.num_prefix_tokens :]
  yield "output", tokens.unflatten(1, (rows, columns)).permute(0, 3, 1, 2)


def tokenizer_training(job: dict[str, Any], given: Arrays) -> Named:
  """Steps of the reference's own training_step: logged values, gradients, parameters afterwards."""
  model = load(checkout.tokenizer_training(job), job).train()
  model.loss.perceptual_loss.eval()  # without dropout
  logged: dict[str, torch.Tensor] = {}
  model.log = lambda *_, **__: None
  model.log_dict = lambda found, **_: logged.update(found)
  trained = {
    name: p for name, p in model.named_parameters() if name.startswith(TRAINED_BY_OPTIMIZERS)
  }
  for step in range(job["steps"]):
    model.global_step = 2 * step  # Lightning counts the steps of both optimizers
    noise = given[f"noise_{step}"]
    image = given[f"image_{step}"].float() / 127.5 - 1
    with mock.patch.object(torch, "randn", lambda *_, noise=noise, **__: noise):
      model.training_step({"image": image.permute(0, 2, 3, 1)}, step)
    for key, value in logged.items():
      name = key.removeprefix("train/")
      if name not in ("logvar", "rec_loss", "disc_factor"):  # ours logs their parts, or not
        yield f"loss/{step}_{name}", value
    if step == 0:
      yield from ((f"gradient/{name}", p.grad) for name, p in trained.items())
  yield from ((f"parameter/{name}", p) for name, p in trained.items())
  for name, buffer in model.named_buffers():
    if "running_" in name:
      yield f"parameter/{name}", buffer


def inception(job: dict[str, Any], given: Arrays) -> Named:
  """torch-fidelity's network on its own input and on that of the checkout's pytorch-fid."""
  from torch_fidelity import feature_extractor_inceptionv3

  sys.path.insert(0, job["checkout"])
  from tools.calculate_fid import InceptionV3

  extractor = feature_extractor_inceptionv3.FeatureExtractorInceptionV3
  names = ["2048", "logits_unbiased"]
  with mock.patch.object(extractor, "load_state_dict"), mock.patch.object(torch, "load"):
    model = extractor("inception", names, feature_extractor_weights_path="none")
  model = load(model, job)
  image = given["image"].to(torch.uint8)
  spatial: list[torch.Tensor] = []
  handle = model.Mixed_6d.branch1x1.register_forward_hook(lambda *call: spatial.append(call[2]))
  with torch.no_grad(), watched(model, job["watch"]) as found:
    pool3, logits = model(image)
  handle.remove()
  yield from found.items()
  yield from (("output/adm pool3", pool3), ("output/adm logits_unbiased", logits))
  yield "output/adm spatial", spatial[0][:, :7].permute(0, 2, 3, 1)
  prepared: list[torch.Tensor] = []
  pytorch_fid = types.SimpleNamespace(
    resize_input=True,
    normalize_input=True,
    blocks=[prepared.append],
    output_blocks=(),
    last_needed_block=0,
  )
  InceptionV3.forward(pytorch_fid, image / 255)
  with (
    torch.no_grad(),
    mock.patch.object(
      feature_extractor_inceptionv3,
      "interpolate_bilinear_2d_like_tensorflow1x",
      return_value=prepared[0] * 128 + 128,
    ),
  ):
    yield "output/pytorch-fid pool3", model(image)[0]


def lpips(job: dict[str, Any], given: Arrays) -> Named:
  """The distance of two pictures and its gradient by the second."""
  import torchvision.models

  torchvision.models.vgg16 = vgg16
  sys.path.insert(0, job["checkout"])
  from models.lpips import LPIPS

  LPIPS.load_from_pretrained = lambda self: None
  model = load(LPIPS(), job)
  other = given["other"].requires_grad_()
  with watched(model, job["watch"]) as found:
    distance = model(given["image"], other)
  distance.sum().backward()
  yield from found.items()
  yield from (("output", distance.flatten()), ("gradient/other", other.grad))


MODELS = {
  f.__name__: f for f in (lightningdit, autoencoder, tokenizer_training, teacher, lpips, inception)
}


def write(job: dict[str, Any]) -> tuple[dict[str, str], None]:
  """Writes the job's "outputs"; returns PyTorch's version and the modules that were replaced."""
  with np.load(job["inputs"]) as arrays:
    given = {name: torch.tensor(array) for name, array in arrays.items()}
  # An array at a time, since a model's gradients and parameters would fill the memory.
  with zipfile.ZipFile(job["outputs"], "w") as archive:
    for name, tensor in MODELS[job["model"]](job, given):
      with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array(file, tensor.detach().float().numpy())
  return {"torch": torch.__version__, "replaced": ", ".join(REPLACED)}, None


if __name__ == "__main__":
  checkout.stand_in()
  serve(write)
