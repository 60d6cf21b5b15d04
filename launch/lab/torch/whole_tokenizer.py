"""The reference's own training of a tokenizer: `training_step` of its `vavae/`, on a CPU.

An interpreter with PyTorch runs this script for `launch.lab.equivalence training`; it imports
nothing of this project but the scripts beside it. Networks, losses, both optimizers and the order
of their steps are the reference's. What `REPLACED` lists is not.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import torch
from layers import TRAINED_BY_OPTIMIZERS, randomise
from serving import serve
from torch import nn
from torch.utils.data import DataLoader, Dataset

Job = dict[str, Any]
REPLACED = (
  "Lightning's Trainer, by a loop that counts the steps of both optimizers as it does",
  "ImageNetTrain, by the pictures that this project reads",
  "MAE's ViT-L, by a ViT-S of random weights",
  "weights of LPIPS, by random ones",
)


class Pictures(Dataset):
  """uint8 [N,H,W,3], as the reference's ImagePaths gives them."""

  def __init__(self, pictures: np.ndarray):
    self.pictures = pictures

  def __len__(self) -> int:
    return len(self.pictures)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return {"image": (self.pictures[i] / 127.5 - 1.0).astype(np.float32)}


class Steps:
  """Takes steps and keeps what they draw and log."""

  def __init__(self, model: Any):
    self.model = model
    self.logged: dict[str, list[float]] = {}
    self.drawn: dict[str, list[np.ndarray]] = {"image": [], "noise": []}
    model.log = lambda *_, **__: None
    model.log_dict = self._log

  def _log(self, found: dict[str, torch.Tensor], **_: Any) -> None:
    for name, value in found.items():
      self.logged.setdefault(name.removeprefix("train/"), []).append(float(value))

  def take(self, step: int, batch: dict[str, torch.Tensor], keep: bool) -> None:
    """The step after `step` others; `keep`: with what it draws."""
    self.model.global_step = 2 * step  # Lightning counts the steps of both optimizers
    randn = torch.randn

    def drawn(*arguments: Any, **named: Any) -> torch.Tensor:
      noise = randn(*arguments, **named)
      self.drawn["noise"].append(noise.numpy())
      return noise

    if keep:
      pixels = (batch["image"] + 1) * 127.5
      self.drawn["image"].append(pixels.round().to(torch.uint8).permute(0, 3, 1, 2).numpy())
      torch.randn = drawn
    try:
      self.model.training_step(batch, step)
    finally:
      torch.randn = randn


def write_initial(job: Job) -> None:
  """Writes the reference's own initial weights, with a random teacher and a random LPIPS."""
  model = checkout.tokenizer_training(job)
  teacher: Any = model.foundation_model.model
  for network in (teacher, model.loss.perceptual_loss):
    randomise(network, job["seed"])
  torch.save(teacher.state_dict(), job["teacher_weights"])
  torch.save(model.state_dict(), job["weights"])


def load(job: Job) -> Any:
  """The reference's module with the initial weights, and with the discriminator of the job."""
  model = checkout.tokenizer_training(job)
  tensors = torch.load(job["weights"], weights_only=True)
  with np.load(job["discriminator"]) as file:
    tensors |= {name: torch.from_numpy(file[name]) for name in file.files}
  model.load_state_dict(tensors, strict=True)
  return model


@torch.no_grad()
def psnr(model: Any, pictures: np.ndarray, batch_size: int) -> float:
  """Mean PSNR of the posterior's mean, of 8-bit pictures, as its `evaluate_tokenizer.py` has it."""
  found: list[float] = []
  for i in range(0, len(pictures), batch_size):
    image = torch.from_numpy(pictures[i : i + batch_size]).permute(0, 3, 1, 2)
    decoded = model.decode(model.encode(image.float() / 127.5 - 1).mode())
    seen = torch.clamp(127.5 * decoded + 128, 0, 255).to(torch.uint8)
    error = ((seen.double() - image.double()) ** 2).mean((1, 2, 3))
    found += (10 * torch.log10(255**2 / error)).tolist()
  return float(np.mean(found))


def snapshot(model: nn.Module) -> dict[str, Any]:
  """All that training changes."""
  named = itertools.chain(model.named_parameters(), model.named_buffers())
  own = [(name, x) for name, x in named if name.startswith(TRAINED_BY_OPTIMIZERS)]
  return {name: x.detach().numpy() for name, x in own if not name.endswith("num_batches_tracked")}


def endless(loader: DataLoader) -> Iterator[dict[str, torch.Tensor]]:
  """Epoch after epoch, each in an order of its own."""
  while True:
    yield from loader


def train(job: Job) -> None:
  """Trains, and writes `losses.json`, and of fed trainings parameters and what was drawn."""
  folder = Path(job["folder"])
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  model = load(job)
  with np.load(job["pictures"]) as file:
    pictures, held_out = file["train"], file["held_out"]
  torch.manual_seed(job["seed"])
  # As `DataModuleFromConfig` of its `main.py` makes it.
  loader = DataLoader(Pictures(pictures), job["batch_size"], shuffle=True)
  steps, rated = Steps(model), {}
  for step, batch in zip(range(1, job["steps"] + 1), endless(loader)):  # noqa: B905 (endless)
    steps.take(step - 1, batch, job["record"])
    if step in job["snapshots"]:
      np.savez(folder / f"{step}.npz", **snapshot(model))
    if job["rate_every"] and step % job["rate_every"] == 0:
      rated[step] = psnr(model, held_out, job["batch_size"])
  if job["record"]:
    drawn: Job = {name: np.stack(x) for name, x in steps.drawn.items()}
    np.savez(folder / "record.npz", **drawn)
  (folder / "losses.json").write_text(json.dumps({"logged": steps.logged, "psnr": rated}))


WORKS = {"initial": write_initial, "train": train}


def begin(job: Job) -> tuple[dict[str, Any], None]:
  """Does the job's "work".

  Args:
    job: see `checkout.tokenizer_training`; "threads", "seed", "weights" (a file of all weights) and
      "teacher_weights" (one of the teacher's alone, which "initial" writes too). To "train" also
      "discriminator" (weights in its place), "pictures" (an npz of "train" and "held_out"),
      "batch_size", "steps", "folder" (of all that is written), "record" (whether to keep what is
      drawn), "snapshots" and "rate_every" (steps).
  """
  torch.set_num_threads(job["threads"])
  torch.manual_seed(job["seed"])
  WORKS[job["work"]](job)
  return {"torch": torch.__version__, "replaced": REPLACED}, None


if __name__ == "__main__":
  checkout.stand_in()
  serve(begin)
