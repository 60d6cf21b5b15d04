"""The PyTorch reference at work, for `launch.lab.benchmark steps` to time beside ours.

An interpreter with PyTorch runs this script, which imports nothing of this project but the scripts
beside it. It reads a job (see `WORKS`) and answers each further question with the seconds that the
work took once. Models and losses are imported from a checkout of
hustvl/LightningDiT, and run on random data as its own scripts run them: `train.py`, `inference.py`
(its sampler), `extract_features.py`, all with TF32 products where they compute in float32, and the
`training_step` of `vavae/`, without. Weights are random. Results stay on the device, as ours do.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

import checkout
import torch
from checkout import precision
from serving import serve
from torch import nn

Job = dict[str, Any]
Work = Callable[[], object]  # does the work once, on new random data
# Messages of PyTorch, and of libraries that get no memory.
NO_MEMORY = ("out of memory", "ALLOC_FAILED")


def diffusion_training(job: Job) -> Work:
  """An update of LightningDiT, its optimizer and its average.

  The job: "checkout", "compile" (its torch.compile of each block), "model" (the arguments of
  LightningDiT), "batch_size", "dtype", "learning_rate", "betas", "clip_norm" (0: off), "decays" (of
  the averages).
  """
  arguments = job["model"]
  network = checkout.lightningdit(job["checkout"], job["compile"])
  shape = (job["batch_size"], arguments["in_channels"], *[arguments["input_size"]] * 2)
  model = network(**arguments)
  emas = [(decay, network(**arguments)) for decay in job["decays"]]
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=job["learning_rate"], weight_decay=0, betas=job["betas"]
  )

  def step() -> float:
    data, noise = torch.randn(shape), torch.randn(shape)
    t = torch.sigmoid(torch.randn(len(data)))
    label = torch.randint(0, arguments["num_classes"], (len(data),))
    share = t.view(-1, 1, 1, 1)
    with precision(job):
      predicted = model(share * data + (1 - share) * noise, t, label).float()
    target = data - noise
    cosine = nn.functional.cosine_similarity(predicted, target, dim=1)
    loss = ((predicted - target) ** 2).mean() + (1 - cosine).mean()
    optimizer.zero_grad()
    loss.backward()
    if job["clip_norm"]:
      nn.utils.clip_grad_norm_(model.parameters(), job["clip_norm"])
    optimizer.step()
    with torch.no_grad():
      for decay, ema in emas:
        for average, new in zip(ema.parameters(), model.parameters(), strict=True):
          average.mul_(decay).add_(new, alpha=1 - decay)
    return loss.item()

  return step


def sampling(job: Job) -> Work:
  """Latents by the reference's own solver.

  The job: "checkout", "compile", "model", "batch_size", "dtype", "sample" (see `checkout.sampler`).
  """
  arguments = job["model"]
  model = checkout.lightningdit(job["checkout"], job["compile"])(**arguments).eval()
  # Its last layer begins at zero, and so would every velocity be.
  nn.init.normal_(model.final_layer.linear.weight, std=0.02)
  shape = (job["batch_size"], arguments["in_channels"], *[arguments["input_size"]] * 2)
  solve = checkout.sampler(model, job["sample"])

  @torch.no_grad()
  def draw() -> torch.Tensor:
    noise = torch.randn(shape)
    label = torch.randint(0, arguments["num_classes"], (len(noise),))
    with precision(job):
      return solve(noise, label)

  return draw


def tokenizer_training(job: Job) -> Work:
  """The `training_step` of VA-VAE, with both of its optimizers.

  The job: see `checkout.tokenizer_training`; also "batch_size", "image_size".
  """
  torch.backends.cuda.matmul.allow_tf32 = False
  model = checkout.tokenizer_training(job).train()
  model.loss.perceptual_loss.eval()  # without dropout
  model.log = model.log_dict = lambda *_, **__: None
  model.global_step = job["loss"]["disc_start"]
  shape = (job["batch_size"], *[job["image_size"]] * 2, 3)
  return lambda: model.training_step({"image": 2 * torch.rand(shape) - 1}, 0)


def encoding(job: Job) -> Work:
  """Latents of pictures and of their mirror images.

  The job: "checkout", "model" (the arguments of AutoencoderKL), "batch_size", "image_size".
  """
  model = checkout.autoencoder(job["checkout"])(**job["model"]).eval()
  shape = (job["batch_size"], 3, *[job["image_size"]] * 2)

  @torch.no_grad()
  def encode() -> list[torch.Tensor]:
    image = 2 * torch.rand(shape) - 1
    return [model.encode(x).sample() for x in (image, image.flip(-1))]

  return encode


def decoding(job: Job) -> Work:
  """Pictures of latents; for the job see `encoding`."""
  model = checkout.autoencoder(job["checkout"])(**job["model"]).eval()
  side = job["image_size"] // 2 ** (len(job["model"]["ch_mult"]) - 1)
  shape = (job["batch_size"], job["model"]["embed_dim"], side, side)

  @torch.no_grad()
  def decode() -> torch.Tensor:
    image = model.decode(torch.randn(shape))
    return torch.clamp(127.5 * image + 128, 0, 255).permute(0, 2, 3, 1).to(torch.uint8)

  return decode


WORKS: dict[str, Callable[[Job], Work]] = {
  "diffusion train": diffusion_training,
  "diffusion sample": sampling,
  "tokenizer train": tokenizer_training,
  "tokenizer encode": encoding,
  "tokenizer decode": decoding,
}


def begin(job: Job) -> tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]:
  """Prepares the job's "work", one of `WORKS`, on its "device", "cuda" or "cpu"."""
  cuda = job["device"] == "cuda"
  if cuda and not torch.cuda.is_available():
    sys.exit(f"PyTorch {torch.__version__} sees no GPU, which the comparison needs.")
  torch.backends.cuda.matmul.allow_tf32 = True
  torch.set_default_device(job["device"])
  device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
  about = {"torch": torch.__version__, "torch_device": device}
  work = fitting(lambda: WORKS[job["work"]](job))
  if isinstance(work, dict):
    return about | work, lambda _: work

  def again() -> dict[str, Any]:
    began = time.perf_counter()
    work()
    if cuda:
      torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - began}

  return about, lambda _: fitting(again)


def fitting(work: Callable[[], Any]) -> Any:
  """The work's result, or {"out_of_memory": True} if the device's memory does not hold it."""
  try:
    return work()
  except RuntimeError as error:  # PyTorch's OutOfMemoryError is one
    if not any(words in str(error) for words in NO_MEMORY):
      raise
    return {"out_of_memory": True}


if __name__ == "__main__":
  checkout.stand_in()
  serve(begin)
