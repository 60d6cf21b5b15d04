"""pytorch-fid, torch-fidelity and torchmetrics, for `benchmark fid` to stand beside ours.

A script of its own, run by whichever interpreter has them, that imports nothing of this project.
For each line of the standard input, a command and its arguments in JSON, one line of JSON answers.

  python benchmark_fid_torch.py WEIGHTS PICTURES.npz

WEIGHTS are pytorch-fid's file, or are made at random there; PICTURES.npz has uint8 `a` and `b`
[N,H,W,3].
"""

import contextlib
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

BATCH = 50
Extractor = Any


def make_weights(path: str) -> None:
  """Random weights that keep activations at their size, so that features differ by picture."""
  from pytorch_fid import inception

  torch.manual_seed(0)
  with (
    mock.patch.object(inception, "load_state_dict_from_url"),
    mock.patch.object(torch.nn.Module, "load_state_dict"),
  ):
    network = inception.fid_inception_v3()
  for module in network.modules():
    if isinstance(module, torch.nn.Conv2d):
      torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, torch.nn.BatchNorm2d):
      torch.nn.init.normal_(module.bias, std=0.1)
  torch.nn.init.normal_(network.fc.weight, std=0.05)
  torch.save(network.state_dict(), path)


def extractors(weights: str) -> dict[str, Extractor]:
  """By protocol: NCHW uint8 -> (pool3, logits without bias or None)."""
  from pytorch_fid import inception
  from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
  from torchmetrics.image.fid import NoTrainInceptionV3

  loaded = torch.load(weights, weights_only=True)
  with mock.patch.object(inception, "load_state_dict_from_url", return_value=loaded):
    pytorch_fid = inception.InceptionV3([3]).eval()
  names = ["2048", "logits_unbiased"]
  fidelity = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=weights)
  metrics = NoTrainInceptionV3("inception", names, feature_extractor_weights_path=weights)

  def by_pytorch_fid(image: torch.Tensor) -> Any:
    return pytorch_fid(image.float() / 255)[0][:, :, 0, 0], None

  return {
    "pytorch-fid": by_pytorch_fid,
    "torch-fidelity": fidelity.eval(),
    "torchmetrics": metrics._torch_fidelity_forward,
  }


def distance(way: str, a: np.ndarray, b: np.ndarray) -> dict[str, float]:
  """FID of features by a library's own arithmetic, and the seconds it took."""
  from pytorch_fid.fid_score import calculate_frechet_distance
  from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
  from torchmetrics.image.fid import _compute_fid

  began = time.perf_counter()
  if way == "torch-fidelity":
    stats = [fid_features_to_statistics(torch.tensor(x)) for x in (a, b)]
    value = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
  else:
    moments = [value for x in (a, b) for value in (x.mean(0), np.cov(x, rowvar=False))]
    if way == "pytorch-fid":
      value = calculate_frechet_distance(*moments)
    else:
      value = _compute_fid(*(torch.tensor(x, dtype=torch.float64) for x in moments))
  return {"fid": float(value), "seconds": time.perf_counter() - began}


def score(logits: np.ndarray, splits: int) -> float:
  """torch-fidelity's inception score, in the order given."""
  from torch_fidelity.metric_isc import isc_features_to_metric

  found = isc_features_to_metric(torch.tensor(logits), splits=splits, shuffle=False)
  return float(found["inception_score_mean"])


@torch.inference_mode()
def main() -> None:
  """The script."""
  weights, file = sys.argv[1:]
  with np.load(file) as stored:
    pictures = {name: torch.tensor(stored[name]).permute(0, 3, 1, 2) for name in ("a", "b")}
  with contextlib.redirect_stdout(sys.stderr):
    if not Path(weights).is_file():
      make_weights(weights)
    ways = extractors(weights)
  kept: dict[tuple[str, str], Any] = {}
  for line in sys.stdin:
    command, *arguments = json.loads(line)
    answer: Any = None
    with contextlib.redirect_stdout(sys.stderr):
      if command == "time":
        way, batches = arguments
        shape = (BATCH, *pictures["a"].shape[1:])
        image = torch.randint(256, shape, dtype=torch.uint8)
        ways[way](image)
        began = time.perf_counter()
        for _ in range(batches):
          ways[way](image)
        answer = BATCH * batches / (time.perf_counter() - began)
      elif command == "features":
        (way,) = arguments
        for name, image in pictures.items():
          found = [ways[way](image[i : i + BATCH]) for i in range(0, len(image), BATCH)]
          kept[way, name] = np.concatenate([x[0].numpy() for x in found])
          if name == "b" and found[0][1] is not None:
            logits = np.concatenate([x[1].numpy() for x in found])
            answer = {"inception_score": score(logits, 1)}
        a, b = (kept[way, name].astype(np.float64) for name in ("a", "b"))
        answer = {**distance(way, a, b), **(answer or {})}
      elif command == "versions":
        names = ("torch", "pytorch-fid", "torch-fidelity", "torchmetrics")
        answer = {name: importlib.metadata.version(name) for name in names}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
