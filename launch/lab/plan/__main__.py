r"""Compiles a program ahead of time for TPUs or GPUs, on any CPU machine, and shows what it costs.

  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py --topology=v5e:4x4 --search
  python -m launch.lab.plan --config=configs/vavae_f16d32.py --topology=v5p:2x2x4
  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py \
    --topology=v5e:2x4 --what=sample
  python -m launch.lab.plan --config=configs/lightningdit.py:XL/1 --topology=h200:8 --kernels=20
  python -m launch.lab.plan --all --output=docs/lab/tpu.json

Needs the extra [tpu] (libtpu) or [cuda] (jax's CUDA plugin), but no TPU or GPU. A plan shows
whether the program fits into the devices' memory, the size of its parts, the traffic between
devices, the FLOPs of the traced program, and the hours at --mfu. --what=train is the whole training
step; sample draws latents and does not decode them; encode encodes pictures and their mirror
images; decode decodes latents. If the program does not fit, --search shards the state over all
chips (fsdp), splits the batch (accumulate_steps) and recomputes activations (use_checkpoint), in
this order, until one fits. --all makes the table of docs/lab/tpu.md, or continues one.

For GPUs the plan adds the bytes that kernels read and write, and their time at the memory rate of
the data sheet; --kernels lists the largest. On the device XLA may tune other kernels, but they
have the same bytes to move.
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
  if FLAGS.kernels and FLAGS.topology.partition(":")[0] not in slices.GPUS:
    raise InputError(f"--kernels is for GPUs, and --topology is {FLAGS.topology}.")
  if FLAGS.all:
    if not FLAGS.output:
      raise InputError("--all needs --output=FILE.json, which also lets it continue.")
    output = Path(FLAGS.output)
    tables.make_table(output, FLAGS.mfu)
    console.say(f"written to {output} and {output.with_suffix('.md')}")
    return
  if FLAGS.config is None:
    raise InputError("Give --config=configs/NAME.py and --topology=CHIP:SIDES, or --all.")
  count = FLAGS.num_images or (SAMPLES if FLAGS.what == "sample" else IMAGENET)
  options = {"search": FLAGS.search, "num_images": count, "mfu": FLAGS.mfu}
  found = []
  for one in plans(FLAGS.config, FLAGS.topology, FLAGS.what, **options):
    found.append(one)
    console.say(f"{tables.shown(one.settings)}: {'fits' if one.fits else 'does not fit'}")
  tables.show(FLAGS.topology, FLAGS.what, found, FLAGS.mfu, FLAGS.kernels)
  if FLAGS.output:
    content = {**circumstances(), "mfu": FLAGS.mfu, "plans": [one.to_dict() for one in found]}
    write_json(Path(FLAGS.output), content)
    console.say(f"written to {FLAGS.output}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("A training, such as configs/lightningdit_xl_64ep.py.")
  flags.DEFINE_string("topology", "v5e:4x4", "The slice: a chip, and chips along each axis.")
  flags.DEFINE_enum("what", "train", programs.ALL, "The program.")
  flags.DEFINE_boolean("search", False, "Search for settings that fit if these do not.")
  flags.DEFINE_integer("kernels", 0, "Number of kernels to list, the largest first; for GPUs.", 0)
  flags.DEFINE_float("mfu", 0.4, "Share of the chips' peak by which hours are estimated.", 0.01)
  flags.DEFINE_integer(
    "num_images", 0, "Pictures to train on or encode (0: ImageNet's), or to sample (0: 50,000).", 0
  )
  flags.DEFINE_boolean("all", False, "Plan every published recipe on every TPU slice.")
  flags.DEFINE_string("output", "", "A JSON file for the plans.")
  console.run_command(main)
