r"""Compiles a program ahead of time for TPUs or GPUs, on any CPU machine, and shows what it costs.

  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py --topology=v5e:4x4 --search
  python -m launch.lab.plan --config=configs/vavae_f16d32.py --topology=v5p:2x2x4
  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py \
    --topology=v5e:2x4 --what=sample
  python -m launch.lab.plan --config=configs/lightningdit.py:XL/1 --topology=h200:8 --operations=20
  python -m launch.lab.plan --all --output=docs/lab/tpu.json

Needs the extra [tpu] (libtpu) or [cuda] (jax's CUDA plugin), but no TPU or GPU. A plan shows
whether the program fits into the devices' memory, the size of its parts, the traffic between
devices, the FLOPs of the traced program, and where its time goes, by estimate. --what=train is the
whole training step; sample draws latents and does not decode them; encode encodes pictures and
their mirror images; decode decodes latents. If the program does not fit, --search shards the state
over all chips (fsdp), splits the batch (accumulate_steps) and recomputes activations
(use_checkpoint), in this order, until one fits. --all makes the table of docs/lab/tpu.md, or
continues one.

Three times stand side by side, none of them measured: the TPU compiler's, from the cycles that it
notes in each operation; the roofline, which lets each operation take as long as its products at the
data sheet's rate or its bytes at 0.8 of the data sheet's bandwidth; and the model's FLOPs at the
data sheet's rate. What the compiler gives no cycles for counts beside it: Pallas kernels by the
cost that they declare, collectives at the rate of the links. --operations lists the longest
operations. For GPUs there are no cycles, and what is shown is the least that a run can take; on the
device XLA may tune other kernels, but they have the same bytes to move.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from launch.engine import configuration, console
from launch.engine.circumstances import circumstances
from launch.lab import programs
from launch.lab.plan import slices, tables
from launch.lab.plan.planning import IMAGENET, plans
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json

SAMPLES = 50_000  # for FID


def main() -> None:
  slices.prepare()
  if FLAGS.all:
    if not FLAGS.output:
      raise InputError("--all needs --output=FILE.json, which also lets it continue.")
    output = Path(FLAGS.output)
    tables.make_table(output)
    console.say(f"written to {output} and {output.with_suffix('.md')}")
    return
  if FLAGS.config is None:
    raise InputError("Give --config=configs/NAME.py and --topology=CHIP:SIDES, or --all.")
  count = FLAGS.num_images or (SAMPLES if FLAGS.what == "sample" else IMAGENET)
  found = []
  for one in plans(FLAGS.config, FLAGS.topology, FLAGS.what, search=FLAGS.search, num_images=count):
    found.append(one)
    console.say(f"{tables.shown(one.settings)}: {'fits' if one.fits else 'does not fit'}")
  chip = slices.chip_of(FLAGS.topology, slices.make_mesh(FLAGS.topology))
  tables.show(FLAGS.topology, FLAGS.what, found, chip, FLAGS.operations)
  if FLAGS.output:
    content = {**circumstances(), "plans": [one.to_dict() for one in found]}
    write_json(Path(FLAGS.output), content)
    console.say(f"written to {FLAGS.output}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("A training, such as configs/lightningdit_xl_64ep.py.")
  flags.DEFINE_string("topology", "v5e:4x4", "The slice: a chip, and chips along each axis.")
  flags.DEFINE_enum("what", "train", programs.ALL, "The program.")
  flags.DEFINE_boolean("search", False, "Search for settings that fit if these do not.")
  flags.DEFINE_integer("operations", 0, "Number of operations to list, the longest first.", 0)
  flags.DEFINE_integer(
    "num_images", 0, "Pictures to train on or encode (0: ImageNet's), or to sample (0: 50,000).", 0
  )
  flags.DEFINE_boolean("all", False, "Plan every published recipe on every TPU slice.")
  flags.DEFINE_string("output", "", "A JSON file for the plans.")
  console.run_command(main)
