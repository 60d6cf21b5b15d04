"""The PyTorch reference's loader of latents, for `benchmark loading` to time beside ours.

A script of its own, run by whichever interpreter has PyTorch, that imports nothing of this project:
for each line with a number of batches on the standard input it tells the seconds that they took.

  python benchmark_data_torch.py CHECKOUT STORE BATCH_SIZE
"""

import json
import sys
import time
import types
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

WORKERS = 2
LOADED_AHEAD = 8


def endless(loader: Any) -> Iterator[Any]:
  """Batches of one epoch after the other."""
  while True:
    yield from loader


def main() -> None:
  """The script."""
  checkout, store, batch_size = sys.argv[1:]
  bars = types.ModuleType("tqdm")
  bars.__dict__["tqdm"] = iter
  sys.modules["tqdm"] = bars
  sys.path.insert(0, checkout)
  from datasets.img_latent_dataset import ImgLatentDataset

  dataset = ImgLatentDataset(store)
  loader = DataLoader(
    dataset, int(batch_size), shuffle=True, num_workers=WORKERS, drop_last=True,
    persistent_workers=True,
  )  # fmt: skip
  batches = endless(loader)
  for line in sys.stdin:
    for _ in range(LOADED_AHEAD):
      next(batches)
    began = time.perf_counter()
    for _ in range(int(line)):
      next(batches)
    print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
  main()
