"""The PyTorch reference's loader of latents, for `benchmark loading` to time beside ours.

An interpreter with PyTorch runs this script, which imports nothing of this project but the script
beside it. The job: "checkout" (of hustvl/LightningDiT), "store" and "batch_size". It answers each
number of batches with the seconds that they took.
"""

import itertools
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import torch
from serving import serve
from torch.utils.data import DataLoader

WORKERS = 2
LOADED_AHEAD = 8


def begin(job: dict[str, Any]) -> tuple[dict[str, str], Callable[[int], float]]:
  """Prepares the loader."""
  bars: Any = types.SimpleNamespace(tqdm=iter)
  sys.modules["tqdm"] = bars
  sys.path.insert(0, job["checkout"])
  from datasets.img_latent_dataset import ImgLatentDataset

  loader = DataLoader(
    ImgLatentDataset(job["store"]),
    job["batch_size"],
    shuffle=True,
    num_workers=WORKERS,
    drop_last=True,
    persistent_workers=True,
  )
  batches = itertools.chain.from_iterable(itertools.repeat(loader))  # epoch after epoch

  def load(count: int) -> float:
    for _ in range(LOADED_AHEAD):
      next(batches)
    began = time.perf_counter()
    for _ in range(count):
      next(batches)
    return time.perf_counter() - began

  return {"torch": torch.__version__}, load


if __name__ == "__main__":
  serve(begin)
