"""Frechet distances of procedural features by pytorch-fid, torch-fidelity and torchmetrics.

python tests/reference/make_frechet.py    # with the extra [torch]
"""

import json
from pathlib import Path

import numpy as np

from tests.reference import procedural

FOLDER = Path(__file__).parent
# Features each side, and how many: of the last there are fewer features than dimensions.
CASES = {"plain": (400, 500, 24), "near": (3000, 3000, 64), "few": (40, 50, 64)}


def features(name: str) -> tuple[np.ndarray, np.ndarray]:
  n, m, width = CASES[name]
  a = procedural.normal(f"{name}_a", (n, width))
  return a, np.float32(1.2) * procedural.normal(f"{name}_b", (m, width)) + np.float32(0.1)


def distances(name: str) -> dict[str, float]:
  import torch
  from pytorch_fid.fid_score import calculate_frechet_distance
  from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
  from torchmetrics.image.fid import _compute_fid

  sides = features(name)
  moments = [value for x in sides for value in (x.mean(0, np.float64), np.cov(x.T))]
  stats = [fid_features_to_statistics(torch.tensor(x, dtype=torch.float64)) for x in sides]
  fidelity = fid_statistics_to_metric(*stats, verbose=False)
  return {
    "pytorch-fid": float(calculate_frechet_distance(*moments)),
    "torch-fidelity": float(fidelity["frechet_inception_distance"]),
    "torchmetrics": float(_compute_fid(*(torch.tensor(x) for x in moments))),
  }


if __name__ == "__main__":
  found = {name: distances(name) for name in CASES}
  (FOLDER / "frechet.json").write_text(json.dumps(found, indent=1) + "\n")
