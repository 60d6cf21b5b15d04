"""Runs a command as `python -m` does, but for the work between its checks and what it tells.

python -m tests.without_work launch.evaluate generation --workdir=RUNS/diffusion ...
"""

from __future__ import annotations

import json
import runpy
import sys
from types import SimpleNamespace

import numpy as np

from launch.engine import configuration, loop, processes
from launch.evaluation import generation, probe, reconstruction, reference, solvers, space


def _generate(samples, reference, network, output, **_):
  del reference, network
  _write(output, samples=samples.about)


def _rebuild(tokenizer, pictures, network, output, **_):
  del pictures, network
  _write(output, tokenizer={"sha256": tokenizer.sha256})


def _write(output, **about):
  output.json.write_text(json.dumps({"evaluation": output.kind, "figures": {}} | about))


def _store(pictures, network, path):
  del pictures
  size = network.sizes["pool"]
  np.savez(path, mu=np.zeros(size), sigma=np.eye(size))
  return True


def _train(task, config, workdir, *, prepare, **_):
  config, _, notes = prepare()
  task.check(config)
  configuration.claim_workdir(workdir, config, notes)
  return SimpleNamespace(step=0)


if __name__ == "__main__":
  generation.evaluate, reconstruction.evaluate, loop.run = _generate, _rebuild, _train
  reference.store = _store
  probe.evaluate = solvers.evaluate = space.evaluate = lambda *_, **__: None
  del sys.argv[0]
  if sys.argv[0] == "launch.sample":
    processes.first_does = lambda work: False
  runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
