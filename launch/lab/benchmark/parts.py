r"""Measures what the parts of the tokenizer's training step cost, and encoding and decoding.

  python -m launch.lab.benchmark parts --config=configs/vavae_f16d32.py --batch_size=32 \
    --config.dtype=bfloat16 --config.teacher.dtype=bfloat16 --config.perceptual.dtype=bfloat16 \
    --output=benchmark.json

The step has the GAN on. A part (teacher, perceptual network, GAN) costs what the step saves without
it. Pictures and weights are random, so that no file is needed; encoding is of pictures and their
mirror images. TFLOP are counted in the traced programs, which take turns. On CPUs set
GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which spares page faults. `benchmark steps --reference
--taming` measures the step beside the reference's.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

from launch.engine import command_line, configuration, console
from launch.engine.circumstances import circumstances
from launch.lab import programs
from launch.lab.benchmark import rows
from launch.lab.benchmark.measuring import in_turns, keep, timed
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError

FLAGS = flags.FLAGS
# Part -> the key that has it, and the value without it.
PARTS: dict[str, tuple[str, Any]] = {
  "teacher": ("teacher.name", ""),
  "perceptual network": ("loss.perceptual_weight", 0.0),
  "GAN": ("loss.disc_weight", 0.0),
}


def benchmark(config: ConfigDict, steps: int) -> dict[str, Any]:
  """Seconds and FLOPs of the step with all parts and without each, of encoding and decoding."""
  if config.get("task") != "tokenizer":
    raise InputError("--config is not a tokenizer's, whose parts are measured.")
  frozen = rows.resolved(config, "train", config.batch_size)
  work = {"step": (frozen, "train")}
  for part, (key, without) in PARTS.items():
    reduced = ConfigDict(frozen.to_dict())
    reduced.update_from_flattened_dict({key: without})
    if FrozenConfigDict(reduced) != frozen:  # the step has this part
      work[f"without {part}"] = (FrozenConfigDict(reduced), "train")
  work |= {what: (frozen, what) for what in ("encode", "decode")}
  devices = mesh.make_mesh(frozen.mesh.data, frozen.mesh.fsdp)
  prepared = {}
  for name, (changed, what) in work.items():
    program = programs.of(changed, devices, what, 1, coded=frozen.batch_size)
    prepared[name] = rows.prepare(changed, devices, program, what)
    timed(prepared[name].run)  # the first is slower
    console.say(f"compiled {name} in {prepared[name].compile_cold:.0f} s")
  runs = {name: functools.partial(timed, each.run) for name, each in prepared.items()}
  seconds = in_turns(runs, steps)
  median = {name: float(np.median(values)) for name, values in seconds.items()}
  parts = [name.removeprefix("without ") for name in prepared if name.startswith("without")]
  return {
    **circumstances(),
    "batch_size": frozen.batch_size,
    "seconds": median,
    "fastest": {name: min(values) for name, values in seconds.items()},
    "tflops": {name: each.flops / 1e12 for name, each in prepared.items()},
    "shares": {name: 1 - median[f"without {name}"] / median["step"] for name in parts},
    "config": config.to_dict(),
  }


def define_flags() -> None:
  configuration.define_flag("A tokenizer training, such as configs/vavae_f16d32.py.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_integer("batch_size", 0, "Pictures of a batch; 0: the configuration's.", 0)
  flags.DEFINE_integer("steps", 5, "Timed runs of each program.", lower_bound=1)
  command_line.define_output("output", None, "A JSON file for the results.")


def main() -> None:
  if FLAGS.batch_size:
    FLAGS.config.batch_size = FLAGS.batch_size
  result = benchmark(FLAGS.config, FLAGS.steps)
  batch, step = result["batch_size"], result["seconds"]["step"]
  cells = []
  for name, x in result["seconds"].items():
    fastest, rate, tflop = (
      console.number(y) for y in (result["fastest"][name], batch / x, result["tflops"][name])
    )
    cells.append((name, console.number(x), fastest, rate, f"{x / step:.0%}", tflop))
  header = ("what", "seconds, median", "fastest", "images/s", "of the step", "TFLOP")
  console.table(f"{result['device']}, batch {batch}", header, cells)
  keep(result, FLAGS.output)
