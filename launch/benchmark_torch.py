"""The PyTorch reference at work, for `launch.benchmark` to time beside ours.

A script of its own, run by whichever interpreter has PyTorch, that imports nothing of this project
but the script beside it: it reads one line of JSON (see `WORKS`), then does the work once for each
further line and tells the seconds. On a GPU where there is one. Models and losses are imported from
a checkout of hustvl/LightningDiT, and run on random data as its own scripts run them: `train.py`,
`inference.py` (its sampler, float32 with TF32 products unless bfloat16 is asked for),
`extract_features.py` and the `training_step` of `vavae/`. Weights are random.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import reference_torch
import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Job = dict[str, Any]


class Work(Protocol):
  """Something to time, made of a job: each call does it once, on data of its own."""

  def __call__(self) -> object: ...


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
  """Autocast as accelerate has it, or nothing."""
  if dtype == "bfloat16":
    return torch.autocast(DEVICE, torch.bfloat16)
  return contextlib.nullcontext()


class DiffusionTraining:
  """An update of LightningDiT, its optimizer and its average.

  The job: "checkout", "compile" (its torch.compile of each block), "model" (the arguments of
  LightningDiT), "batch_size", "dtype", "learning_rate", "betas", "decays" (of the averages).
  """

  def __init__(self, job: Job):
    model = job["model"]
    network = reference_torch.lightningdit(job["checkout"], job["compile"])
    self.dtype = job["dtype"]
    self.shape = (job["batch_size"], model["in_channels"], *[model["input_size"]] * 2)
    self.model = network(**model).to(DEVICE)
    self.emas = [(decay, network(**model).to(DEVICE)) for decay in job["decays"]]
    self.num_classes = model["num_classes"]
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(), lr=job["learning_rate"], weight_decay=0, betas=job["betas"]
    )

  def __call__(self) -> float:
    data, noise = torch.randn(self.shape, device=DEVICE), torch.randn(self.shape, device=DEVICE)
    t = torch.sigmoid(torch.randn(len(data), device=DEVICE))
    label = torch.randint(0, self.num_classes, (len(data),), device=DEVICE)
    share = t.view(-1, 1, 1, 1)
    with precision(self.dtype):
      predicted = self.model(share * data + (1 - share) * noise, t, label).float()
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


class Sampling:
  """Latents by the reference's own solver, of which guidance always computes both halves.

  The job: "checkout", "compile", "model", "batch_size", "dtype", "sample" (num_steps, method,
  timestep_shift, cfg_scale, cfg_interval_start).
  """

  def __init__(self, job: Job):
    model, self.sample = job["model"], job["sample"]
    self.model = reference_torch.lightningdit(job["checkout"], job["compile"])(**model)
    self.model.eval().to(DEVICE)
    # Its last layer begins at zero, and so would every velocity be.
    nn.init.normal_(self.model.final_layer.linear.weight, std=0.02)
    self.dtype, self.null = job["dtype"], model["num_classes"]
    self.shape = (job["batch_size"], model["in_channels"], *[model["input_size"]] * 2)
    from transport import Sampler, create_transport

    self.solve = Sampler(create_transport()).sample_ode(
      sampling_method=self.sample["method"],
      num_steps=self.sample["num_steps"],
      timestep_shift=self.sample["timestep_shift"],
    )

  @torch.no_grad()
  def __call__(self) -> torch.Tensor:
    noise = torch.randn(self.shape, device=DEVICE)
    label = torch.randint(0, self.null, (len(noise),), device=DEVICE)
    with precision(self.dtype):
      if self.sample["cfg_scale"] <= 1:
        return self.solve(noise, self.model.forward, y=label)[-1]
      settings = {
        "y": torch.cat([label, torch.full_like(label, self.null)]),
        "cfg_scale": self.sample["cfg_scale"],
        "cfg_interval": True,
        "cfg_interval_start": self.sample["cfg_interval_start"],
      }
      both = self.solve(torch.cat([noise, noise]), self.model.forward_with_cfg, **settings)[-1]
    return both.chunk(2)[0]


class TokenizerTraining:
  """The `training_step` of VA-VAE, with both of its optimizers.

  The job: as of `reference_torch.tokenizer_training`, "batch_size", "image_size".
  """

  def __init__(self, job: Job):
    self.model = reference_torch.tokenizer_training(job).to(DEVICE).train()
    self.model.loss.perceptual_loss.eval()  # without dropout
    self.model.log = self.model.log_dict = lambda *_, **__: None
    self.model.global_step = job["loss"]["disc_start"]
    self.shape = (job["batch_size"], *[job["image_size"]] * 2, 3)

  def __call__(self) -> None:
    self.model.training_step({"image": 2 * torch.rand(self.shape, device=DEVICE) - 1}, 0)


class Encoding:
  """Latents of pictures and of their mirror images, on the host.

  The job: "checkout", "model" (the arguments of AutoencoderKL), "batch_size", "image_size".
  """

  def __init__(self, job: Job):
    self.model = reference_torch.autoencoder(job["checkout"])(**job["model"]).to(DEVICE).eval()
    self.shape = (job["batch_size"], 3, *[job["image_size"]] * 2)

  @torch.no_grad()
  def __call__(self) -> list[torch.Tensor]:
    image = 2 * torch.rand(self.shape, device=DEVICE) - 1
    return [self.model.encode(x).sample().cpu() for x in (image, image.flip(-1))]


class Decoding:
  """Pictures of latents, on the host; the job as of `Encoding`."""

  def __init__(self, job: Job):
    self.model = reference_torch.autoencoder(job["checkout"])(**job["model"]).to(DEVICE).eval()
    side = job["image_size"] // 2 ** (len(job["model"]["ch_mult"]) - 1)
    self.shape = (job["batch_size"], job["model"]["embed_dim"], side, side)

  @torch.no_grad()
  def __call__(self) -> torch.Tensor:
    image = self.model.decode(torch.randn(self.shape, device=DEVICE))
    return torch.clamp(127.5 * image + 128, 0, 255).permute(0, 2, 3, 1).to("cpu", torch.uint8)


WORKS: dict[str, Callable[[Job], Work]] = {
  "diffusion train": DiffusionTraining,
  "diffusion sample": Sampling,
  "tokenizer train": TokenizerTraining,
  "tokenizer encode": Encoding,
  "tokenizer decode": Decoding,
}


def main() -> None:
  """The script; the job's "work" is one of `WORKS`."""
  reference_torch.stand_in()
  torch.backends.cuda.matmul.allow_tf32 = True
  job = json.loads(sys.stdin.readline())
  with contextlib.redirect_stdout(sys.stderr):  # the reference prints, too
    work = WORKS[job["work"]](job)
  told = {"torch": torch.__version__, "torch_threads": torch.get_num_threads()}
  print(json.dumps(told), flush=True)
  for _ in sys.stdin:
    began = time.perf_counter()
    try:
      work()
      if DEVICE == "cuda":
        torch.cuda.synchronize()
    except torch.cuda.OutOfMemoryError:
      print(json.dumps({"out_of_memory": True}), flush=True)
      continue
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
  main()
