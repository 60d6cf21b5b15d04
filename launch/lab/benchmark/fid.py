r"""Measures FID's features and arithmetic beside pytorch-fid, torch-fidelity and torchmetrics.

  python -m launch.lab.benchmark fid --source=zip:data/cifar10_test.zip --torch_python=PYTHON \
    --weights=pt_inception-2015-12-05-6726825d.pth --output=benchmark.json

--torch_python is an interpreter that has PyTorch, torchvision and the three. The same pictures, two
halves of a random choice, go through all of them with the same weights; figures are shown beside
each other, and pictures a second, of which all take turns. Without --weights the weights are
random ones, which tell whether implementations agree, and nothing of pictures.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from launch.engine import console
from launch.engine.circumstances import circumstances
from launch.evaluation.features import load_network
from launch.evaluation.pictures import Array, FromSource
from launch.evaluation.reference import compiled, gaussian_of, statistics_of
from launch.lab.torch_process import SCRIPTS, TorchProcess
from vavae_jax.common.files import write_json
from vavae_jax.metrics import inception

# Flags that are defined here are those of the command that asks for them.
flags.disclaim_key_flags()
FLAGS = flags.FLAGS
NEEDS = "torch, torchvision, pytorch-fid, torch-fidelity and torchmetrics"
BATCH = 50
# Whose network is compared with ours of which protocol.
BESIDE = {"pytorch-fid": "pytorch-fid", "torch-fidelity": "adm", "torchmetrics": ""}


def figures(halves: dict[str, np.ndarray], weights: Path) -> dict[str, Any]:
  """FID of the halves, inception score of the second and seconds of the arithmetic, by protocol."""
  found: dict[str, Any] = {}
  for protocol in inception.PROTOCOLS:
    network = load_network(protocol, str(weights))
    a, b = (statistics_of(Array(x), network, f"{protocol} {n}") for n, x in halves.items())
    began = time.perf_counter()
    gaussian, moments = gaussian_of(a), b.moments["pool"]
    distance = gaussian.distance(moments.mean, moments.cov)
    seconds = time.perf_counter() - began
    found[protocol] = {
      "fid": distance.distance,
      "negative_eigenvalue": distance.negative,
      "inception_score": b.inception_score(),
      "arithmetic_seconds": seconds,
    }
  return found


def speeds(
  tools: TorchProcess, weights: Path, rounds: int, batches: int, side: int
) -> dict[str, float]:
  """Pictures a second, the median of rounds in which all take turns."""
  index: Any = np.arange(BATCH, dtype=np.int32)
  image: Any = np.random.default_rng(0).integers(256, size=(BATCH, side, side, 3), dtype=np.uint8)
  ours = {}
  for protocol in inception.PROTOCOLS:
    network = load_network(protocol, str(weights))
    ours[f"ours, {protocol}"] = (compiled(network, keep=False), jax.device_put(network.params))
  rates: dict[str, list[float]] = {name: [] for name in (*ours, *BESIDE)}
  for _ in console.tracked(range(rounds), "rounds"):
    for name, (run, params) in ours.items():
      jax.block_until_ready(run(params, {"image": image, "index": index}))
      began = time.perf_counter()
      for _ in range(batches):
        jax.block_until_ready(run(params, {"image": image, "index": index}))
      rates[name].append(BATCH * batches / (time.perf_counter() - began))
    for name in BESIDE:
      rates[name].append(tools.ask([name, batches]))
  return {name: float(np.median(x)) for name, x in rates.items()}


def define_flags() -> None:
  """Defines the command's flags."""
  flags.DEFINE_string("source", "embedded:emoji", "Pictures, such as zip:FILE.")
  flags.DEFINE_integer("pictures", 500, "Of each half.", lower_bound=10)
  flags.DEFINE_integer("image_size", 0, "Centre crop; 0: pictures as they are.", lower_bound=0)
  flags.DEFINE_string("weights", "", "Weights of FID's Inception; random ones if not given.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has the tools.")
  flags.DEFINE_integer("rounds", 3, "All take turns.", lower_bound=1)
  flags.DEFINE_integer("batches", 2, "A round, of 50 pictures.", lower_bound=1)
  flags.DEFINE_string("output", "", "Where to write the figures as JSON.")


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  with tempfile.TemporaryDirectory() as folder:
    chosen = FromSource(FLAGS.source, FLAGS.image_size, limit=2 * FLAGS.pictures)
    pictures = chosen.read(0, len(chosen))
    mixed = np.random.default_rng(0).permutation(len(pictures))
    halves = {"a": pictures[mixed[::2]], "b": pictures[mixed[1::2]]}
    file = Path(folder) / "pictures.npz"
    np.savez(file, a=halves["a"], b=halves["b"])
    weights = Path(FLAGS.weights) if FLAGS.weights else Path(folder) / "random.pth"
    job = {"weights": str(weights), "pictures": str(file)}
    with TorchProcess(FLAGS.torch_python, SCRIPTS / "fid.py", job, NEEDS) as tools:
      ours = figures(halves, weights)
      others = {}
      for name in BESIDE:
        console.say(f"{name} ...")
        others[name] = tools.ask([name, 0])
      rates = speeds(tools, weights, FLAGS.rounds, FLAGS.batches, pictures.shape[1])
  rows = []
  for protocol, found in ours.items():
    told = f"{found['arithmetic_seconds']:.1f}"
    rate = rates[f"ours, {protocol}"]
    rows.append((f"ours, {protocol}", _number(found["fid"]), told, f"{rate:.2f}", ""))
  for name, found in others.items():
    beside = BESIDE[name]
    off = found["fid"] / ours[beside]["fid"] - 1 if beside else None
    rows.append(
      (
        name,
        _number(found["fid"]),
        f"{found['seconds']:.1f}",
        f"{rates[name]:.2f}",
        f"{off:+.1e} of ours, {beside}" if off is not None else "its own resize",
      )
    )
  header = ("tool", "FID", "arithmetic, s", "pictures/s", "differs by")
  console.table(f"{len(halves['a'])} and {len(halves['b'])} pictures", header, rows)
  score = others["torch-fidelity"]["inception_score"]
  console.say(f"inception score: ours {ours['adm']['inception_score']:.6f}, theirs {score:.6f}")
  if FLAGS.output:
    result = {"ours": ours, "others": others, "pictures_per_second": rates}
    noted = {**circumstances(), "versions": tools.about, "pictures": chosen.about, **result}
    write_json(Path(FLAGS.output), noted)
    console.say(f"written to {FLAGS.output}")


def _number(value: float) -> str:
  return f"{value:.8g}"
