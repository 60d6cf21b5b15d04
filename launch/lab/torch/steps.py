"""The PyTorch reference at work, for `launch.lab.benchmark steps` to time beside ours.

An interpreter with PyTorch runs this script, which imports nothing of this project but the scripts
beside it. It reads a job (see `WORKS`) and answers each further question with the seconds that the
work took once. Models and losses are imported from a checkout of
hustvl/LightningDiT, and run on random data as its own scripts run them: `train.py`, `inference.py`
(its sampler), `extract_features.py`, all with TF32 products where they compute in float32, and the
`training_step` of `vavae/`, without. Weights are random. Results stay on the device, as ours do.
"""

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import checkout
import torch
from serving import serve
from torch import nn

Job = dict[str, Any]
# Besides PyTorch's own error, what libraries say that get none.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")


class Work(Protocol):
  """Made of a job; each call does the work once, on new random data."""

  def __call__(self) -> object: ...


def precision(job: Job) -> contextlib.AbstractContextManager[Any]:
  """Autocast as accelerate has it, or nothing."""
  if job["dtype"] == "bfloat16":
    return torch.autocast(job["device"], torch.bfloat16)
  return contextlib.nullcontext()


class DiffusionTraining:
  """An update of LightningDiT, its optimizer and its average.

  The job: "checkout", "compile" (its torch.compile of each block), "model" (the arguments of
  LightningDiT), "batch_size", "dtype", "learning_rate", "betas", "clip_norm" (0: off), "decays" (of
  the averages).
  """

  def __init__(self, job: Job):
    model, self.job = job["model"], job
    network = checkout.lightningdit(job["checkout"], job["compile"])
    self.shape = (job["batch_size"], model["in_channels"], *[model["input_size"]] * 2)
    self.model = network(**model)
    self.emas = [(decay, network(**model)) for decay in job["decays"]]
    self.num_classes = model["num_classes"]
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(), lr=job["learning_rate"], weight_decay=0, betas=job["betas"]
    )

  def __call__(self) -> float:
    data, noise = torch.randn(self.shape), torch.randn(self.shape)
    t = torch.sigmoid(torch.randn(len(data)))
    label = torch.randint(0, self.num_classes, (len(data),))
    share = t.view(-1, 1, 1, 1)
    with precision(self.job):
      predicted = self.model(share * data + (1 - share) * noise, t, label).float()
    target = data - noise
    cosine = nn.functional.cosine_similarity(predicted, target, dim=1)
    loss = ((predicted - target) ** 2).mean() + (1 - cosine).mean()
    self.optimizer.zero_grad()
    loss.backward()
    if self.job["clip_norm"]:
      nn.utils.clip_grad_norm_(self.model.parameters(), self.job["clip_norm"])
    self.optimizer.step()
    with torch.no_grad():
      for decay, ema in self.emas:
        for average, new in zip(ema.parameters(), self.model.parameters(), strict=True):
          average.mul_(decay).add_(new, alpha=1 - decay)
    return loss.item()


class Sampling:
  """Latents by the reference's own solver, of which guidance always computes both halves.

  The job: "checkout", "compile", "model", "batch_size", "dtype", "sample" (num_steps, method, atol,
  rtol, timestep_shift, cfg_scale, cfg_interval_start).
  """

  def __init__(self, job: Job):
    model, self.job, self.sample = job["model"], job, job["sample"]
    self.model = checkout.lightningdit(job["checkout"], job["compile"])(**model)
    self.model.eval()
    # Its last layer begins at zero, and so would every velocity be.
    nn.init.normal_(self.model.final_layer.linear.weight, std=0.02)
    self.null = model["num_classes"]
    self.shape = (job["batch_size"], model["in_channels"], *[model["input_size"]] * 2)
    from transport import Sampler, create_transport

    self.solve = Sampler(create_transport()).sample_ode(
      sampling_method=self.sample["method"],
      num_steps=self.sample["num_steps"],
      atol=self.sample["atol"],
      rtol=self.sample["rtol"],
      timestep_shift=self.sample["timestep_shift"],
    )

  @torch.no_grad()
  def __call__(self) -> torch.Tensor:
    noise = torch.randn(self.shape)
    label = torch.randint(0, self.null, (len(noise),))
    with precision(self.job):
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

  The job: as of `checkout.tokenizer_training`, "batch_size", "image_size".
  """

  def __init__(self, job: Job):
    torch.backends.cuda.matmul.allow_tf32 = False
    self.model = checkout.tokenizer_training(job).train()
    self.model.loss.perceptual_loss.eval()  # without dropout
    self.model.log = self.model.log_dict = lambda *_, **__: None
    self.model.global_step = job["loss"]["disc_start"]
    self.shape = (job["batch_size"], *[job["image_size"]] * 2, 3)

  def __call__(self) -> None:
    self.model.training_step({"image": 2 * torch.rand(self.shape) - 1}, 0)


class Encoding:
  """Latents of pictures and of their mirror images.

  The job: "checkout", "model" (the arguments of AutoencoderKL), "batch_size", "image_size".
  """

  def __init__(self, job: Job):
    self.model = checkout.autoencoder(job["checkout"])(**job["model"]).eval()
    self.shape = (job["batch_size"], 3, *[job["image_size"]] * 2)

  @torch.no_grad()
  def __call__(self) -> list[torch.Tensor]:
    image = 2 * torch.rand(self.shape) - 1
    return [self.model.encode(x).sample() for x in (image, image.flip(-1))]


class Decoding:
  """Pictures of latents; the job as of `Encoding`."""

  def __init__(self, job: Job):
    self.model = checkout.autoencoder(job["checkout"])(**job["model"]).eval()
    side = job["image_size"] // 2 ** (len(job["model"]["ch_mult"]) - 1)
    self.shape = (job["batch_size"], job["model"]["embed_dim"], side, side)

  @torch.no_grad()
  def __call__(self) -> torch.Tensor:
    image = self.model.decode(torch.randn(self.shape))
    return torch.clamp(127.5 * image + 128, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)


WORKS: dict[str, Callable[[Job], Work]] = {
  "diffusion train": DiffusionTraining,
  "diffusion sample": Sampling,
  "tokenizer train": TokenizerTraining,
  "tokenizer encode": Encoding,
  "tokenizer decode": Decoding,
}


def begin(job: Job) -> tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]:
  """Prepares the job's "work", one of `WORKS`, on its "device", "cuda" or "cpu"."""
  cuda = job["device"] == "cuda"
  if cuda and not torch.cuda.is_available():
    sys.exit(f"PyTorch {torch.__version__} sees no GPU, which the comparison needs.")
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.set_default_device(job["device"])
  works: list[Work] = []

  def again(_: Any) -> dict[str, Any]:
    began = time.perf_counter()
    works[0]()
    if cuda:
      torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began}

  device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
  about = {"torch": torch.__version__, "torch_device": device}
  lack = fitting(lambda: works.append(WORKS[job["work"]](job)))
  return about | (lack or {}), lambda question: lack or fitting(lambda: again(question))


def fitting(work: Callable[[], Any]) -> Any:
  """What work gives, or {"out_of_memory": True} where the device's memory does not hold it."""
  try:
    return work()
  except RuntimeError as error:  # PyTorch's OutOfMemoryError is one
    if not any(words in str(error) for words in NO_MEMORY):
      raise
    return {"out_of_memory": True}


if __name__ == "__main__":
  checkout.stand_in()
  serve(begin)
