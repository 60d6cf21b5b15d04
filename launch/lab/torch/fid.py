"""pytorch-fid, torch-fidelity and torchmetrics, for `benchmark fid` to stand beside ours.

An interpreter with these libraries runs this script, which imports nothing of this project but the
script beside it. The job: "weights" (pytorch-fid's file, or where to write random ones) and
"pictures" (an npz with uint8 `a` and `b` [N,H,W,3]). Each further question is the name of a library
and a number of batches, to be timed; or 0, for its figures of the pictures.
"""

import importlib.metadata
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from serving import serve

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


@torch.inference_mode()
def speed(extract: Extractor, batches: int, shape: torch.Size) -> float:
  """Pictures a second, after one batch that is not timed."""
  image = torch.randint(256, (BATCH, *shape), dtype=torch.uint8)
  extract(image)
  began = time.perf_counter()
  for _ in range(batches):
    extract(image)
  return BATCH * batches / (time.perf_counter() - began)


@torch.inference_mode()
def figures(way: str, extract: Extractor, pictures: dict[str, torch.Tensor]) -> dict[str, float]:
  """FID and its seconds; of torch-fidelity the inception score of `b`, too."""
  features = {}
  for name, image in pictures.items():
    found = [extract(image[i : i + BATCH]) for i in range(0, len(image), BATCH)]
    features[name] = np.concatenate([x[0].numpy() for x in found]).astype(np.float64)
  result = distance(way, features["a"], features["b"])
  if found[0][1] is not None:
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = torch.tensor(np.concatenate([x[1].numpy() for x in found]))
    score = isc_features_to_metric(logits, splits=1, shuffle=False)  # in the order given
    result["inception_score"] = float(score["inception_score_mean"])
  return result


def begin(job: dict[str, str]) -> tuple[dict[str, str], Callable[[tuple[str, int]], Any]]:
  """Loads the networks and the pictures."""
  with np.load(job["pictures"]) as stored:
    pictures = {name: torch.tensor(stored[name]).permute(0, 3, 1, 2) for name in ("a", "b")}
  if not Path(job["weights"]).is_file():
    make_weights(job["weights"])
  ways = extractors(job["weights"])

  def answer(question: tuple[str, int]) -> Any:
    way, batches = question
    if batches:
      return speed(ways[way], batches, pictures["a"].shape[1:])
    return figures(way, ways[way], pictures)

  names = ("torch", "pytorch-fid", "torch-fidelity", "torchmetrics")
  return {name: importlib.metadata.version(name) for name in names}, answer


if __name__ == "__main__":
  serve(begin)
