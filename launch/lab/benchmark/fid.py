r"""Measures FID's features and arithmetic beside pytorch-fid, torch-fidelity and torchmetrics.

  python -m launch.lab.benchmark fid --source=zip:data/cifar10_test.zip --torch_python=PYTHON \
    --weights=pt_inception-2015-12-05-6726825d.pth --output=benchmark.json

--torch_python is an interpreter with PyTorch, torchvision and the three libraries. All of them take
the same two random halves of the pictures and the same weights. The table shows each one's FID and
pictures a second, measured in turns. Random weights, used without --weights, show whether the
implementations agree; their FID means nothing.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from launch.engine import command_line, console
from launch.evaluation.features import load_network
from launch.evaluation.pictures import Array, FromSource
from launch.evaluation.reference import compiled, gaussian_of, statistics_of
from launch.lab.benchmark.measuring import in_turns, keep, timed
from launch.lab.torch_process import SCRIPTS, TorchProcess
from vavae_jax.common.addresses import local_file
from vavae_jax.metrics import inception

FLAGS = flags.FLAGS
NEEDS = "torch, torchvision, pytorch-fid, torch-fidelity and torchmetrics"
BATCH = 50
# Library -> the protocol of ours with the same network and resize, if any.
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

  def ours(protocol: str) -> Callable[[], float]:
    network = load_network(protocol, str(weights))
    run, params = compiled(network, keep=False), jax.device_put(network.params)
    once = functools.partial(run, params, {"image": image, "index": index})

    def rate() -> float:
      timed(once)  # the first compiles, and others follow another network
      return BATCH * batches / sum(timed(once) for _ in range(batches))

    return rate

  works = {f"ours, {protocol}": ours(protocol) for protocol in inception.PROTOCOLS}
  works |= {name: functools.partial(tools.ask, [name, batches]) for name in BESIDE}
  return {name: float(np.median(x)) for name, x in in_turns(works, rounds).items()}


def define_flags() -> None:
  flags.DEFINE_string("source", "embedded:emoji", "Pictures, such as zip:FILE.")
  flags.DEFINE_integer("pictures", 500, "Pictures of each half.", lower_bound=10)
  flags.DEFINE_string("weights", "", "Weights of FID's Inception; random ones if not given.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has the tools.")
  flags.DEFINE_integer("rounds", 3, "Rounds; in each, all tools take a turn.", lower_bound=1)
  flags.DEFINE_integer("batches", 2, "Batches of 50 pictures in a round.", lower_bound=1)
  command_line.define_output("output", None, "A JSON file for the results.")


def main() -> None:
  with tempfile.TemporaryDirectory() as folder:
    chosen = FromSource(FLAGS.source, 0, limit=2 * FLAGS.pictures)
    pictures = chosen.read(0, len(chosen))
    mixed = np.random.default_rng(0).permutation(len(pictures))
    halves = {"a": pictures[mixed[::2]], "b": pictures[mixed[1::2]]}
    file = Path(folder) / "pictures.npz"
    np.savez(file, a=halves["a"], b=halves["b"])
    weights = local_file(FLAGS.weights) if FLAGS.weights else Path(folder) / "random.pth"
    job = {"weights": str(weights), "pictures": str(file)}
    with TorchProcess(FLAGS.torch_python, SCRIPTS / "fid.py", job, NEEDS) as tools:
      ours = figures(halves, weights)
      others = {}
      for name in BESIDE:
        console.say(f"{name} ...")
        others[name] = tools.ask([name, 0])
      rates = speeds(tools, weights, FLAGS.rounds, FLAGS.batches, pictures.shape[1])
  rows = [
    (f"ours, {protocol}", found["fid"], found["arithmetic_seconds"], "")
    for protocol, found in ours.items()
  ]
  for name, found in others.items():
    beside, differs = BESIDE[name], "its own resize"
    if beside:
      differs = f"{found['fid'] / ours[beside]['fid'] - 1:+.1e} of ours, {beside}"
    rows.append((name, found["fid"], found["seconds"], differs))
  cells = [
    (name, f"{fid:.8g}", f"{seconds:.1f}", f"{rates[name]:.2f}", differs)
    for name, fid, seconds, differs in rows
  ]
  header = ("tool", "FID", "arithmetic, s", "pictures/s", "differs by")
  console.table(f"{len(halves['a'])} and {len(halves['b'])} pictures", header, cells)
  score = others["torch-fidelity"]["inception_score"]
  console.say(f"inception score: ours {ours['adm']['inception_score']:.6f}, theirs {score:.6f}")
  about = {"versions": tools.about, "pictures": chosen.about}
  keep({**about, "ours": ours, "others": others, "pictures_per_second": rates}, FLAGS.output)
