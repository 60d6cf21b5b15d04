r"""Measures what a configuration costs here: steps, sampling, encoding, loading, FID.

  python -m launch.lab.benchmark steps --config=configs/lightningdit.py:XL/1 \
    --batch_sizes=32,64,128 --attention=xla --attention=cudnn --output=benchmark.json
  python -m launch.lab.benchmark steps --config=configs/lightningdit.py:B/1 \
    --what=train,sample,loader,fid
  python -m launch.lab.benchmark steps --config=configs/vavae_f16d32.py \
    --what=train,encode --trace=trace
  python -m launch.lab.benchmark steps --config=configs/lightningdit.py:B/1 \
    --compare=docs/lab/baseline.json

--what names programs: train (a whole training step), sample (latents), encode or decode (of a
tokenizer), loader (batches on the host), checkpoint (--steps steps while one is saved, beside as
many without), fid (Inception's features, and a distance's arithmetic). The table shows images/s,
FLOP/s by count, their share of a matrix product's rate in the same run and of the data sheet's
where the device is known, memory, and seconds to compile without and with the compilation cache.
"of the ceiling" is the share of the most that the device could do: products at that rate, or every
argument and result moved once at the rate of a copy, whichever takes longer. Weights and data are
random. A batch size that does not fit is reported as such.

--compare shows changes against a stored baseline of ratios (share of a matrix product's rate, times
the reference's speed, memory) and ends with exit code 2 where one is worse by more than
--tolerance; --update stores this run's. --reference is a checkout of hustvl/LightningDiT, whose
PyTorch takes turns with ours on the same device (train, sample, encode, decode; a tokenizer's
training also needs --taming): on GPUs with its torch.compile, and under autocast where ours is
bfloat16; on CPUs eagerly. On CPUs set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which spares page
faults.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from launch.engine import command_line, configuration, console
from launch.engine.circumstances import circumstances, processor
from launch.lab import programs, reference
from launch.lab.benchmark import baseline, rows
from launch.lab.benchmark.measuring import copy_rate, keep, matmul_rate
from launch.lab.reference import Checkouts
from lightningdit_jax.options import ATTENTIONS
from vavae_jax.common import mesh
from vavae_jax.common.errors import InputError

FLAGS = flags.FLAGS
WHAT = (*programs.ALL, "loader", "checkpoint", "fid")
LOADED = 80  # batches; most of a few would have been prefetched
# Figures of a row -> their names in tables.
SHOWN = {
  "what": "what",
  "dtype": "dtype",
  "attention": "attention",
  "batch_size": "batch",
  "out_of_memory": "out of memory",
  "tflop_per_image": "TFLOP an image",
  "least_gib": "GiB at least",
  "flop_per_byte": "FLOP a byte",
  "images_per_second": "images/s",
  "model_tflops_per_second": "TFLOP/s",
  "share_of_matmul": "of a product's rate",
  "share_of_ceiling": "of the ceiling",
  "gap": "gap",
  "mfu": "MFU",
  "program_gib": "GiB of memory",
  "peak_gib": "peak GiB",
  "compile_cold": "cold, s",
  "compile_warm": "warm, s",
  "arithmetic_seconds": "distance, s",
  "torch_images_per_second": "reference, images/s",
  "times_torch": "times the reference",
  "torch_out_of_memory": "reference out of memory",
  "checkpoint_gib": "saved GiB",
  "blocked_seconds": "blocked, s",
  "cost": "cost of saving",
}


def benchmark(
  config: ConfigDict,
  *,
  what: list[str],
  batch_sizes: list[int],
  attentions: list[str],
  steps: int,
  checkouts: Checkouts | None = None,
  count_only: bool = False,
  asked: str = "",
) -> dict[str, Any]:
  """All combinations; see the module's docstring."""
  if checkouts:
    checkouts.check()
  attentions = attentions if config.task == "diffusion" else attentions[:1]
  found: list[rows.Row] = []
  for kind in what:
    for attention in attentions if kind == "train" else attentions[:1]:
      for batch_size in batch_sizes or [_usual_batch_size(config, kind)]:
        frozen = rows.resolved(config, kind, batch_size, attention)
        if count_only:
          row = rows.count(frozen, kind)
        elif kind == "loader":
          row = rows.measure_loader(frozen, max(steps, LOADED))
        elif kind == "checkpoint":
          row = rows.measure_checkpoint(frozen, steps)
        else:
          row = rows.measure(frozen, kind, steps, checkouts)
        found.append(row)
        if not count_only:
          console.say(json.dumps(row))
        if row.get("out_of_memory"):
          if checkouts:
            console.say("did not fit into memory together with the reference; alone it may")
          break  # larger ones do not fit either
        if kind == "fid":
          break  # it has a batch of its own
  return {
    **circumstances(),
    "matmul_tflops_per_second": {
      row["dtype"]: matmul_rate(row["dtype"]) / 1e12 for row in found if "dtype" in row
    },
    "copy_gib_per_second": None if count_only else copy_rate() / 2**30,
    "asked": asked,
    "processor": processor(),
    "config": config.to_dict(),
    "rows": found,
  }


def _usual_batch_size(config: ConfigDict, what: str) -> int:
  if what in ("encode", "decode"):
    return programs.CODED_PER_DEVICE * jax.device_count()
  return config.sample.batch_size * jax.device_count() if what == "sample" else config.batch_size


def _asked() -> str:
  """--config of the command line, and the keys that it changes."""
  words = [word.removeprefix("--config=") for word in sys.argv if word.startswith("--config")]
  return " ".join([words[0], *sorted(words[1:])]) if words else ""


def define_flags() -> None:
  configuration.define_flag("A training, such as configs/lightningdit.py:XL/1.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_list("what", ["train"], f"What to measure: some of {', '.join(WHAT)}.")
  flags.DEFINE_list("batch_sizes", [], "Sizes over all devices; by default the configuration's.")
  flags.DEFINE_multi_enum("attention", ["xla"], ATTENTIONS, "Give it once for each to compare.")
  flags.DEFINE_integer("devices", 0, "Number of devices, on a CPU virtual ones; 0: all.", 0)
  flags.DEFINE_integer("steps", 10, "Timed runs.", lower_bound=1)
  flags.DEFINE_boolean("count_only", False, "Only count FLOPs and bytes that must be moved.")
  command_line.define_output("output", None, "A JSON file for the results.")
  reference.define_flags()
  baseline.define_flags()


def main() -> None:
  if unknown := [word for word in FLAGS.what if word not in WHAT]:
    raise InputError(f"--what={unknown[0]} is none of {', '.join(WHAT)}.")
  if FLAGS.count_only and (wrong := {"loader", "checkpoint"} & {*FLAGS.what}):
    raise InputError(f"--count_only does not apply to {' and '.join(wrong)}, which run no program.")
  try:
    batch_sizes = [int(x) for x in FLAGS.batch_sizes]
  except ValueError as error:
    raise InputError(f"--batch_sizes is {FLAGS.batch_sizes}; give numbers, as in 32,64.") from error
  baseline.check_flags()
  if FLAGS.reference:
    # So that both fit on one device; jax reads it when it starts.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if FLAGS.devices:
    mesh.use(FLAGS.devices)
  result = benchmark(
    FLAGS.config,
    what=FLAGS.what,
    batch_sizes=sorted(batch_sizes),
    attentions=FLAGS.attention,
    steps=FLAGS.steps,
    checkouts=reference.checkouts(compiled=jax.default_backend() != "cpu"),
    count_only=FLAGS.count_only,
    asked=_asked(),
  )
  title = "counted, not measured"
  if not FLAGS.count_only:
    rates = ", ".join(f"{x:.3g} in {n}" for n, x in result["matmul_tflops_per_second"].items())
    title = (
      f"{result['device']}; a matrix product in TFLOP/s a device: {rates}; a copy in GiB/s: "
      f"{result['copy_gib_per_second']:.3g}"
    )
  names = [name for name in SHOWN if any(name in row for row in result["rows"])]
  # Many figures of few measurements: each of these has a column.
  cells = [[SHOWN[n], *(_cell(row.get(n, "")) for row in result["rows"])] for n in names[1:]]
  console.table(title, ["", *(row["what"] for row in result["rows"])], cells)
  keep(result, FLAGS.output)
  baseline.settle(baseline.ratios_of(result))


def _cell(value: Any) -> str:
  return console.number(value) if isinstance(value, float) else str(value)
