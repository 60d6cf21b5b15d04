"""The reference's losses and samples of given weights, on given latents, times, noise and labels.

An interpreter with PyTorch runs this script for `launch.lab.equivalence training`; it imports
nothing of this project but the scripts beside it.
"""

from typing import Any

import checkout
import numpy as np
import torch
from serving import serve


def begin(job: dict[str, Any]) -> tuple[dict[str, Any], None]:
  """Writes the file "outputs".

  Args:
    job: "checkout", "threads", "model" (the arguments of LightningDiT), "weights" (a state dict, or
      a checkpoint, whose average counts), "sample" (as `checkout.sampler` takes it), "batch_size",
      "count" (of samples), "inputs" (a file with "latent", "noise", "label" and "t" of the losses,
      "sample_noise" and "sample_label"), "outputs" (a file of mse and cosine for each of the times,
      samples "plain" and "guided").
  """
  torch.set_num_threads(job["threads"])
  model = checkout.lightningdit(job["checkout"])(**job["model"])
  content = torch.load(job["weights"])
  model.load_state_dict(content.get("ema", content))
  model.eval()
  with np.load(job["inputs"]) as file:
    given = {name: torch.from_numpy(file[name]) for name in file.files}
  with torch.no_grad():
    found = losses(model, given, job["batch_size"])
    for name, scale in (("plain", 1.0), ("guided", job["sample"]["cfg_scale"])):
      draw = checkout.sampler(model, job["sample"] | {"cfg_scale": scale})
      parts = zip(
        *(
          given[f"sample_{x}"][: job["count"]].split(job["batch_size"]) for x in ("noise", "label")
        ),
        strict=True,
      )
      found[name] = torch.cat([draw(noise, label) for noise, label in parts])
  np.savez(job["outputs"], **{name: x.numpy() for name, x in found.items()})
  return {"torch": torch.__version__}, None


def losses(
  model: torch.nn.Module, given: dict[str, torch.Tensor], batch_size: int
) -> dict[str, torch.Tensor]:
  """Means over all latents at each time, by the reference's `training_losses`."""
  from transport import Transport, create_transport

  transport = create_transport(use_cosine_loss=True)
  names = {"loss": "mse", "cos_loss": "cosine"}
  found: dict[str, list[torch.Tensor]] = {name: [] for name in names.values()}
  for t in given["t"]:
    parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    batches = (given[name].split(batch_size) for name in ("latent", "noise", "label"))
    for latent, noise, label in zip(*batches, strict=True):
      drawn = t.expand(len(latent)), noise, latent
      Transport.sample = lambda self, *_, drawn=drawn: drawn
      terms = transport.training_losses(model, latent, {"y": label})
      for name in names:
        parts[name].append(terms[name])
    for theirs, ours in names.items():
      found[ours].append(torch.cat(parts[theirs]).mean())
  return {name: torch.stack(x) for name, x in found.items()}


if __name__ == "__main__":
  checkout.stand_in()
  serve(begin)
