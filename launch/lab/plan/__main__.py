r"""Compiles a program ahead of time for TPUs or GPUs, on any CPU machine, and shows what it costs.

  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py --topology=v5e:4x4 --search
  python -m launch.lab.plan --config=configs/vavae_f16d32.py --topology=v5p:2x2x4
  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py \
    --topology=v5e:2x4 --what=sample
  python -m launch.lab.plan --config=configs/lightningdit.py:XL/1 --topology=h200:8 --operations=20
  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py \
    --topology=v6e:4x4 --what=fid50k
  python -m launch.lab.plan --all --output=docs/lab/tpu.json --page=docs/lab/tpu.md

Needs the extra [tpu] (libtpu) or [cuda] (jax's CUDA plugin), but no TPU or GPU. A plan shows
whether the program fits into the devices' memory, the size of its parts, the traffic between
devices, the FLOPs of the traced program, and where its time goes, by estimate. --what=train is the
whole training step; sample draws latents and does not decode them; encode encodes pictures and
their mirror images; decode decodes latents; features are Inception's; fid50k is 50,000 samples
drawn, decoded and looked at, one program after the other. If the program does not fit, --search
shards the state over all chips (fsdp), splits the batch (accumulate_steps) and recomputes
activations (use_checkpoint), in this order, until one fits; of sampling it halves the batch, for
fid50k unasked. --all makes the tables of docs/lab/tpu.md, or continues those of --output;
--published estimates a run whose speed on TPUs others have published.

Three times stand side by side, none of them measured: the TPU compiler's, from the cycles that it
notes in each operation; the roofline, which lets each operation take as long as its products at the
data sheet's rate or its bytes at 0.8 of the data sheet's bandwidth; and the model's FLOPs at the
data sheet's rate. What the compiler notes no cycles for counts beside it: Pallas kernels by their
schedules, or by the cost that they declare if that is more; collectives at the links' rate.
--operations lists the longest operations. For GPUs there are no cycles, and what is shown is the
least that a run can take; on the device XLA may tune other kernels, but they have the same bytes to
move.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import flags

from launch.engine import command_line, configuration, console
from launch.engine.circumstances import circumstances
from launch.lab import programs
from launch.lab.plan import calibration, fid, page, planning, slices, tables
from launch.lab.plan.planning import IMAGENET
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json

SAMPLES = 50_000  # for FID


def main() -> None:
  slices.prepare()
  if FLAGS.all:
    if not FLAGS.output:
      raise InputError("--all needs --output=FILE.json, which also lets it continue.")
    page.make(FLAGS.output, FLAGS.page, FLAGS.workers)
    console.say(f"written to {FLAGS.output}" + (f" and {FLAGS.page}" if FLAGS.page else ""))
    return
  found = _published() if FLAGS.published else _plans()
  if FLAGS.output:
    write_json(FLAGS.output, {**circumstances(), "plans": found})
    console.say(f"written to {FLAGS.output}")


def _published() -> list[dict[str, Any]]:
  held = calibration.hold(calibration.RUNS[FLAGS.published])
  tables.show_held(held)
  return [dataclasses.asdict(held)]


def _plans() -> list[dict[str, Any]]:
  """The plans that were made, those of --what=fid50k with their own names, as they are shown."""
  if FLAGS.config is None:
    raise InputError(
      "Give --config=configs/NAME.py and --topology=CHIP:SIDES, or --published, or --all."
    )
  sampled = FLAGS.what in ("sample", "fid50k")
  count = FLAGS.num_images or (SAMPLES if sampled else IMAGENET)
  if FLAGS.what == "fid50k":
    tried = fid.plans_of(FLAGS.config, FLAGS.topology, count)
    found = {what: plans[-1] for what, plans in tried.items()}
    tried["fid50k"] = [fid.together(found)]
    _show(tried)
    return [{"what": what, **plans[-1].to_dict()} for what, plans in tried.items()]
  made = []
  for one in planning.plans(
    FLAGS.config, FLAGS.topology, FLAGS.what, search=FLAGS.search, num_images=count
  ):
    made.append(one)
    console.say(f"{tables.shown(one.settings)}: {'fits' if one.fits else 'does not fit'}")
  _show({FLAGS.what: made})
  return [one.to_dict() for one in made]


def _show(tried: dict[str, list[planning.Plan]]) -> None:
  chip = slices.chip_of(FLAGS.topology, slices.make_mesh(FLAGS.topology))
  for what, plans in tried.items():
    tables.show(FLAGS.topology, what, plans, chip, FLAGS.operations)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("A training, such as configs/lightningdit_xl_64ep.py.")
  flags.DEFINE_string("topology", "v5e:4x4", "The slice: a chip, and chips along each axis.")
  flags.DEFINE_enum("what", "train", [*programs.ALL, "fid50k"], "The program.")
  flags.DEFINE_boolean("search", False, "Search for settings that fit if these do not.")
  flags.DEFINE_integer("operations", 0, "Number of operations to list, the longest first.", 0)
  flags.DEFINE_integer(
    "num_images", 0, "Pictures to train on or encode (0: ImageNet's), or to sample (0: 50,000).", 0
  )
  flags.DEFINE_enum(
    "published", None, list(calibration.RUNS), "A run of others, to hold estimates against."
  )
  flags.DEFINE_boolean("all", False, "Plan the recipes of docs/lab/tpu.md on its slices.")
  command_line.define_output(
    "page", None, "A Markdown page that --all writes, such as docs/lab/tpu.md."
  )
  flags.DEFINE_integer(
    "workers", 1, "Plans that --all makes at once; each takes 3 GB, a tokenizer 11.", 1
  )
  command_line.define_output("output", None, "A JSON file for the plans.")
  console.run_command(main)
