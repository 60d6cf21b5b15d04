"""How far both trainings' losses and evaluations differ from one device's on all meshes and numbers
of processes.

  python -m tests.same_everywhere --output=same.json

The tiny trainings of the quickstart, 20 steps, on one device; on 8 virtual devices as 1x8, 2x4, 4x2
and 8x1 (data x fsdp); and on 2 and 4 processes. All that their evaluators give, by noisy weights,
on 1, 2 and 4 processes. The suite checks these, and 4x2 and two processes for fewer steps;
docs/reliability.md has the tables.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from launch.engine import console
from launch.engine.circumstances import circumstances
from launch.engine.writers import curve, read_metrics
from launch.evaluation.sample_files import read_samples
from tests.conftest import start_job, write_pictures
from tests.survive import ended
from vavae_jax.common.files import write_json

STEPS = 20
LIMIT = 1800.0
# Name -> (devices of each process, processes, data, fsdp).
LAYOUTS = {
  "one device": (1, 1, 1, 1),
  "1x8": (8, 1, 1, 8),
  "2x4": (8, 1, 2, 4),
  "4x2": (8, 1, 4, 2),
  "8x1": (8, 1, 8, 1),
  "2 processes, 1x2": (1, 2, 1, 2),
  "4 processes, 2x2": (1, 4, 2, 2),
}


def sampled(pipeline: Path, folder: Path, variables: dict[str, str]) -> dict[str, list[int]]:
  """Of each number of devices and processes: how many samples, numbers and figures differ."""
  found: dict[str, tuple[np.ndarray, dict[str, float]]] = {}
  for layout, (devices, count, *_) in LAYOUTS.items():
    name = f"{devices} devices" if devices > 1 else layout.partition(",")[0]
    if name in found:
      continue
    flag = f"--xla_force_host_platform_device_count={devices}"
    drawn = (f"--workdir={pipeline / 'diffusion'}", "--num_samples=600", "--batch_size=32")
    measured = (f"--reference={pipeline / 'samples.npz'}", "--protocol=efficientnet_lite0")
    for words in (
      ("launch.sample", *drawn, f"--output={folder / name}.npz"),
      ("launch.evaluate", "generation", *drawn, *measured, f"--output={folder / name}_found"),
    ):
      for process in start_job(words, variables | {"XLA_FLAGS": flag}, count):
        code, printed = ended(process, LIMIT)
        assert code == 0, printed
    figures = json.loads((folder / f"{name}_found.json").read_text())["figures"]
    found[name] = read_samples(folder / f"{name}.npz")[0], figures
  pictures, figures = found["one device"]
  return {
    name: [
      int((drawn != pictures).any((1, 2, 3)).sum()),
      int((drawn != pictures).sum()),
      sum(told[key] != figures[key] for key in figures),
    ]
    for name, (drawn, told) in found.items()
  }


def main() -> None:
  """The command."""
  losses: dict[str, dict[str, np.ndarray]] = {}
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    (folder / "pictures").mkdir()
    write_pictures(folder / "pictures")
    pipeline = (
      *("launch.quickstart", "--config=configs/quickstart.py:pipeline,tiny"),
      f"--config.tokenizer.data.source=folder:{folder / 'pictures'}",
      f"--workdir={folder / 'pipeline'}",
    )
    code, printed = ended(start_job(pipeline, variables)[0], LIMIT)
    assert code == 0, printed
    drawn = sampled(folder / "pipeline", folder, variables)
    for layout, (devices, count, data, fsdp) in LAYOUTS.items():
      workdir = folder / layout
      flag = f"--xla_force_host_platform_device_count={devices}"
      words = ("tests.train_on_mesh", folder / "pictures", folder / "pipeline" / "latents")
      running = start_job(
        (*words, workdir, data, fsdp, STEPS), variables | {"XLA_FLAGS": flag}, count
      )
      for process in running:
        code, printed = ended(process, LIMIT)
        assert code == 0, printed
      losses[layout] = {
        task: np.array([value for _, value in curve(read_metrics(workdir / task), "loss")])
        for task in ("tokenizer", "diffusion")
      }
      console.say(f"{layout}: {losses[layout]['diffusion'][-1]:.6f}")
    evaluated = evaluations(folder / "pipeline", folder, variables)
  rows, results = [], {}
  for layout, found in losses.items():
    told = {}
    for task, values in found.items():
      apart = np.abs(values / losses["one device"][task] - 1)
      assert len(apart) == STEPS
      told[task] = {"first": float(apart[0]), "largest": float(apart.max())}
    results[layout] = told
    rows.append([layout, *(f"{x:.1e}" for one in told.values() for x in one.values())])
  header = ("layout", "tokenizer, step 1", "largest", "diffusion, step 1", "largest")
  console.table("Relative distance of losses to one device", header, rows)
  header = ("processes, data x fsdp", "figure or picture", "apart")
  console.table("Evaluations: relative distance, or of uint8", header, evaluated)
  header = ("layout", "samples that differ", "numbers in them", "figures that differ")
  rows = [[name, *map(str, counts)] for name, counts in drawn.items()]
  console.table("600 samples and their figures beside one device's", header, rows)
  if FLAGS.output:
    told = {"steps": STEPS, "apart": results, "evaluations": evaluated, "samples": drawn}
    write_json(Path(FLAGS.output), circumstances() | told)


def evaluations(pipeline: Path, output: Path, variables: dict[str, str]) -> list[list[str]]:
  """Of each layout and each kind of result: how far it is from one device's at most."""
  layouts = ["1:1:1", "2:1:2", "4:2:2"]
  words = ("tests.evaluators_everywhere", pipeline, output, ",".join(layouts))
  code, printed = ended(start_job(words, variables)[0], LIMIT)
  assert code == 0, printed
  one, *others = (dict(np.load(output / f"{layout}.npz")) for layout in layouts)
  rows = []
  for layout, found in zip(layouts[1:], others, strict=True):
    apart: dict[str, float] = {}
    for name, expected in one.items():
      scale = 1.0 if expected.ndim else abs(expected)
      distance = np.abs(found[name].astype(float) - expected).max() / scale
      kind = name.split("_t0")[0]
      apart[kind] = max(apart.get(kind, 0.0), float(distance))
    processes, *axes = layout.split(":")
    name = f"{processes}, {'x'.join(axes)}"
    rows += [[name, kind, f"{x:.1e}" if x else "0"] for kind, x in apart.items()]
  return rows


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("output", "", "A JSON file for the results.")
  console.run_command(main)
