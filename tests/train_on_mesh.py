"""Trains both tiny models over the devices that this process sees, with all arrays sharded.

  python -m tests.train_on_mesh PICTURES LATENTS WORKDIR DATA FSDP [STEPS]

Without STEPS also a model of each with options of docs/beyond.md. Prints one line of JSON: of each
training the parameter with the most elements, as [its shape, the shape that one device holds].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from configs import quickstart
from launch.engine import processes
from launch.train import train
from vavae_jax.common import mesh

NUM_STEPS = 4


def beyond(pictures: str, latents: str) -> dict[str, ConfigDict]:
  """Trainings with options of docs/beyond.md, by name."""
  tokenizer, diffusion = quickstart.tokenizer(tiny=True), quickstart.diffusion(tiny=True)
  tokenizer.data.source, diffusion.latents.path = f"folder:{pictures}", latents
  tokenizer.equivariance.update(share=0.5, scales=(0.5,))  # of the third step
  tokenizer.teacher.name, tokenizer.loss.disc_weight = "", 0.0  # which take most of the time
  diffusion.optimizer.muon = True
  diffusion.route.update(share=0.5, first=0, last=0)
  for config in (tokenizer, diffusion):
    config.num_steps, config.evaluate_every_steps, config.log_every_steps = NUM_STEPS, 0, 1
  return {"turned": tokenizer, "routed": diffusion}


def main() -> None:
  """The command."""
  pictures, latents, workdir, data, fsdp, *more = sys.argv[1:]
  processes.start()
  # So that the arrays of tiny models are sharded too.
  mesh.MIN_SHARDED_SIZE = 2**11
  tokenizer, diffusion = quickstart.tokenizer(tiny=True), quickstart.diffusion(tiny=True)
  tokenizer.data.source, diffusion.latents.path = f"folder:{pictures}", latents
  trainings = {"tokenizer": tokenizer, "diffusion": diffusion}
  for config in trainings.values():
    config.num_steps = config.evaluate_every_steps = NUM_STEPS
  if not more:
    trainings |= beyond(pictures, latents)
  largest = {}
  for name, config in trainings.items():
    if more:
      config.num_steps, config.evaluate_every_steps = int(more[0]), 0
      config.log_every_steps, config.save_every_steps = 1, int(more[0])
    config.mesh.update(data=int(data), fsdp=int(fsdp))
    state = train(config, Path(workdir) / name)
    leaf = max(jax.tree.leaves(state.params), key=lambda x: x.size)
    largest[name] = [leaf.shape, leaf.addressable_shards[0].data.shape]
  print(json.dumps(largest))


if __name__ == "__main__":
  main()
