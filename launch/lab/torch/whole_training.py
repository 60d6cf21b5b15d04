"""The reference's own training: `do_train` of its `train.py`, as it stands, on a CPU.

An interpreter with PyTorch runs this script for `launch.lab.equivalence training`; it imports
nothing of this project but the scripts beside it. Data set, transport, optimizer, loop and
checkpoints are the reference's. What `REPLACED` lists is not; random numbers, which `train.py`
leaves to chance, get a seed.
"""

import json
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkout
import numpy as np
import torch
from serving import serve
from torch import nn

Job = dict[str, Any]
NEEDED = ("scipy", "torchdiffeq")
REPLACED = (
  "accelerate's Accelerator and DistributedDataParallel, by one process without them",
  "torch.compile, by the uncompiled functions",
  "torch.distributed and torch.cuda.synchronize, by nothing",
  "TensorBoard, by a JSON file",
  "workers that load data, by this process",
  "the average's decay, which update_ema does not take from the configuration",
)


class Accelerator:
  """What `do_train` uses of accelerate's, in one process in float32."""

  device = torch.device("cpu")
  is_main_process = sync_gradients = True
  local_process_index, num_processes, mixed_precision = 0, 1, "no"

  def prepare(self, *objects: Any) -> tuple[Any, ...]:
    return objects

  def backward(self, loss: torch.Tensor) -> None:
    loss.backward()

  def clip_grad_norm_(self, parameters: Any, norm: float) -> None:
    nn.utils.clip_grad_norm_(parameters, norm)


class Alone(nn.Module):
  """In the place of DistributedDataParallel.

  `do_train` resumes by giving its load_state_dict the names of the model inside, which
  DistributedDataParallel refuses.
  """

  def __init__(self, module: nn.Module, device_ids: Any):
    super().__init__()
    self.module = module

  def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
    return self.module(*arguments, **named)

  def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
    return self.module.load_state_dict(*arguments, **named)


class Writer:
  """In the place of TensorBoard's: keeps the losses by their steps."""

  def __init__(self, losses: dict[int, float]):
    self.losses = losses

  def add_text(self, *_: Any, **__: Any) -> None:
    pass

  def add_scalar(self, name: str, value: float, step: int) -> None:
    self.losses[step] = value


class Replayed:
  """In the place of the loader: the batches of a record, from a step on."""

  def __init__(self, latent: torch.Tensor, label: torch.Tensor):
    self.latent, self.label = latent, label

  def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(self.latent, self.label, strict=True)


def reference(job: Job, losses: dict[int, float]) -> Any:
  """The module `train.py` of the checkout, able to run on a CPU in one process.

  It writes its training losses into `losses`, by their steps.
  """
  tensorboard: Any = types.ModuleType("torch.utils.tensorboard")
  tensorboard.SummaryWriter = lambda log_dir: Writer(losses)
  sys.modules[tensorboard.__name__] = tensorboard
  network = checkout.lightningdit(job["checkout"])
  import train

  train.LightningDiT_models["small"] = lambda **given: network(**job["model"] | given)
  train.DDP = Alone
  train.dist = types.SimpleNamespace(
    ReduceOp=train.dist.ReduceOp,
    get_rank=lambda: 0,
    get_world_size=lambda: 1,
    all_reduce=lambda *_, **__: None,
    barrier=lambda: None,
  )
  torch.cuda.synchronize = lambda: None
  return train


def watch_steps(train: Any, job: Job, begin: int) -> None:
  """Averages with the job's decay, and saves the parameters after the steps "snapshots"."""
  update_ema, step = train.update_ema, begin - 1  # it is called once before anything is loaded

  def averaged(ema: nn.Module, model: nn.Module, decay: float = job["decay"]) -> None:
    nonlocal step
    update_ema(ema, model, decay)
    step += 1
    if step > begin and step in job["snapshots"]:
      arrays = {name: p.detach().numpy() for name, p in model.named_parameters()}
      np.savez(Path(job["folder"]) / f"{step}.npz", **arrays)

  train.update_ema = averaged


def record(train: Any) -> dict[str, list[torch.Tensor]]:
  """Keeps what each step draws: normalised latents, labels with dropped ones, times, noise."""
  from models.lightningdit import LabelEmbedder
  from transport import Transport

  kept: dict[str, list[torch.Tensor]] = {name: [] for name in ("latent", "label", "t", "noise")}
  sample, token_drop = Transport.sample, LabelEmbedder.token_drop

  def drawn(self: Any, *arguments: Any) -> tuple[torch.Tensor, ...]:
    t, noise, latent = found = sample(self, *arguments)
    for name, value in (("t", t), ("noise", noise), ("latent", latent)):
      kept[name].append(value)
    return found

  def dropped(self: Any, *arguments: Any) -> torch.Tensor:
    kept["label"].append(token_drop(self, *arguments))
    return kept["label"][-1]

  Transport.sample, LabelEmbedder.token_drop = drawn, dropped
  return kept


def replay(train: Any, path: str, begin: int) -> None:
  """Makes the steps after `begin` draw what a record has."""
  from models.lightningdit import LabelEmbedder
  from transport import Transport

  with np.load(path) as file:
    given = {name: torch.from_numpy(file[name][begin:]) for name in file.files}
  drawn = zip(given["t"], given["noise"], given["latent"], strict=True)
  Transport.sample = lambda self, *_: next(drawn)
  LabelEmbedder.token_drop = lambda self, labels, *_: labels
  train.DataLoader = lambda *_, **__: Replayed(given["latent"], given["label"])


def take_over(train: Any, job: Job, config: dict[str, Any]) -> int:
  """Lets `do_train` resume from a state of ours, with its optimizer; returns the step.

  The reference's own resume reads no optimizer state: its line for that is a comment.
  """
  with np.load(job["state"]) as file:
    given = {name: torch.from_numpy(file[name]) for name in file.files}
  step = int(given.pop("step"))
  model = checkout.lightningdit(job["checkout"])(**job["model"])
  weights = {}
  for part in ("model", "ema"):
    own = {k.removeprefix(f"{part}/"): x for k, x in given.items() if k.startswith(f"{part}/")}
    weights[part] = model.state_dict() | own
  moments: dict[int, Any] = {}
  for i, (name, _) in enumerate(model.named_parameters()):
    if f"exp_avg/{name}" in given:
      both = {kind: given[f"{kind}/{name}"] for kind in ("exp_avg", "exp_avg_sq")}
      moments[i] = both | {"step": torch.tensor(float(step))}
  path = Path(config["train"]["output_dir"]) / config["train"]["exp_name"] / "checkpoints"
  path.mkdir(parents=True)
  torch.save(weights, path / f"{step:07d}.pt")
  config["train"]["resume"] = True
  make = torch.optim.AdamW

  def restored(*arguments: Any, **named: Any) -> torch.optim.Optimizer:
    optimizer = make(*arguments, **named)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    return optimizer

  torch.optim.AdamW = restored
  return step


def begin(job: Job) -> tuple[dict[str, Any], None]:
  """Trains.

  Args:
    job: "checkout", "threads", "seed", "model" (the arguments of LightningDiT), "config" (what
      `do_train` reads), "decay" (of the average), "folder" (of all that is written), "weights" (a
      state dict to begin with) or "state" (of ours, to go on from), "record" (whether to keep what
      is drawn), "replay" (a record, or ""), "snapshots" (steps).
  """
  if missing := [name for name in NEEDED if name in checkout.ABSENT]:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}, which the reference computes with.")
  torch.set_num_threads(job["threads"])
  folder = Path(job["folder"])
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  losses: dict[int, float] = {}
  train, config = reference(job, losses), job["config"]
  config["train"] |= {"output_dir": str(folder), "exp_name": "run"}
  step = 0
  if job["state"]:
    step = take_over(train, job, config)
  else:
    weights = folder / "initial.pt"
    torch.save({"model": torch.load(job["weights"])}, weights)
    config["train"]["weight_init"] = str(weights)
  torch.manual_seed(job["seed"])
  np.random.seed(job["seed"])  # noqa: NPY002 (the reference draws flips and times from it)
  watch_steps(train, job, step)
  kept = record(train) if job["record"] else {}
  if job["replay"]:
    replay(train, job["replay"], step)
  train.do_train(config, Accelerator())
  if kept:
    np.savez(folder / "record.npz", **{name: torch.stack(x).numpy() for name, x in kept.items()})
  (folder / "losses.json").write_text(json.dumps(losses))
  threads = torch.get_num_threads()
  return {"torch": torch.__version__, "threads": threads, "replaced": REPLACED}, None


if __name__ == "__main__":
  checkout.stand_in("accelerate", "diffusers", "yaml")
  serve(begin)
