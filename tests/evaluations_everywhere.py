"""Evaluations and a cache of features on several numbers of processes, and by others after a kill.

  python -m tests.evaluations_everywhere PIPELINE OUTPUT RUN,...

A run is FOLDER:PROCESSES, or FOLDER:PROCESSES:PATTERN, in which the last process is killed just
before a file gets a name of that pattern, and the others with it. The evaluations of a run write
into OUTPUT/FOLDER. The processes are forks of one, which imports all once. PIPELINE and OUTPUT can
be in a bucket, where there are no features.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import FrozenConfigDict

import vavae_jax.training
from launch import cached_features, restore
from launch.engine import processes
from launch.evaluation import generation, reconstruction, solvers, space, statistics, sweep
from launch.evaluation.cells import StoredCells
from launch.evaluation.features import Network
from launch.evaluation.figures import Options
from launch.evaluation.frontier import frontier
from launch.evaluation.output import Output
from launch.evaluation.pictures import Sampled, own_pictures
from launch.evaluation.reference import reference_of
from launch.evaluation.reference import store as store_statistics
from lightningdit_jax.store.latents import LatentStore
from tests import forked, killed
from vavae_jax import frozen
from vavae_jax.common.files import is_url, place
from vavae_jax.data import feature_cache

FEATURES = 6
GRID = {"method": ["euler"], "num_steps": [3, 5]}


def apply(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
  """Few features and classes, all that Inception's figures need."""
  small = image_BHWC[:, ::8, ::8].astype(jnp.float32)
  x = small.reshape(len(small), -1) @ params["w"] / 1e3
  return {"pool": x, "spatial": jnp.cos(x), "probabilities": jax.nn.softmax(x)}


def evaluate(pipeline: Path, output: Path) -> None:
  """All evaluations that processes share."""
  statistics.BLOCK, statistics.CPU_BATCH, statistics.SPLIT = 10, 4, 20
  space.tsne = lambda values, seed: values[:, seed : seed + 2].astype(np.float64)  # for time
  weights = np.random.default_rng(1).standard_normal((8 * 8 * 3, FEATURES), np.float32)
  network = Network("adm", "FID", {"protocol": "adm", "weights_sha256": "0"}, {"w": weights}, apply)
  diffusion = restore.load(pipeline / "diffusion", "diffusion")
  tokenizer = restore.tokenizer_of(diffusion)
  settings = diffusion.config.sample
  seen, held_out = (own_pictures(tokenizer, held_out=x) for x in (False, True))
  drawn = Sampled(diffusion, tokenizer, settings, count=43, labels="balanced", seed=0)
  of = Output(output / "generation", "generation")
  reference = reference_of(seen, network, keep=True, progress=of.progress)
  generation.evaluate(drawn, reference, network, of, options=Options())
  of = Output(output / "reconstruction", "reconstruction")
  reconstruction.evaluate(tokenizer, held_out, network, of)
  store = LatentStore(pipeline / "latents")
  space.evaluate(StoredCells(store), Output(output / "latents", "latents"), runs=2, count=55)
  solvers.evaluate(diffusion, settings, GRID, Output(output / "solvers", "solvers"), count=20)
  store_statistics(seen, network, output / "statistics.npz")
  processes.wait_for_all()
  word = f"tiny:{output / 'reconstruction.json'}:{output / 'generation.json'}"
  frontier([word], Output(output / "frontier", "frontier"), "psnr", "fid")
  sweep.sweep(
    {"cfg_scale": [1.0, 1.5]},
    lambda point: Sampled(
      diffusion,
      tokenizer,
      FrozenConfigDict(settings.to_dict() | point),
      count=20,
      labels="balanced",
      seed=1,
    ),
    reference,
    network,
    Output(output / "sweep", "sweep"),
    options=Options(precision_recall=False),
  )
  if not is_url(output):
    cache_features(tokenizer.config.data.source, output / "cache")
  processes.wait_for_all()


def cache_features(source: str, folder: Path) -> None:
  """As a training does whose teacher is tiny."""
  from tests.test_tokenizer_training import TinyNetwork, configuration  # which starts a backend

  tiny = TinyNetwork(nnx.Rngs(3))
  frozen._networks = lambda config: {"teacher": tiny}
  vavae_jax.training.check = lambda config: None
  feature_cache.BATCH = 5
  changes = {"data.source": source, "data.crop": "center", "teacher.cache": str(folder)}
  cached_features.make(configuration(**changes))


def main() -> None:
  """The command."""
  pipeline, output = map(place, sys.argv[1:3])
  for run in sys.argv[3].split(","):
    folder, number, *pattern = run.split(":")
    count = int(number)

    def one(index: int) -> None:
      if pattern and index == count - 1:  # noqa: B023 - forks have values of their own
        killed.at(pattern[0])  # noqa: B023
      evaluate(pipeline, output / folder)  # noqa: B023

    forked.job(one, count, last_dies=bool(pattern))
    if pattern:
      blocks = (output / folder).rglob("*_10.safetensors")
      left = sorted(path.parent.name for path in blocks if path.parent.name[0] != ".")
      print(f"left by {run}: {left}")


if __name__ == "__main__":
  main()
