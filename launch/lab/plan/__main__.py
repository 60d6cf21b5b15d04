r"""Compiles a step ahead of time for TPUs or GPUs, on any CPU machine, and says what it would take.

  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py --topology=v5e:4x4 --search
  python -m launch.lab.plan --config=configs/vavae_f16d32.py --topology=v5p:2x2x4
  python -m launch.lab.plan --config=configs/lightningdit_xl_64ep.py \
    --topology=v5e:2x4 --what=sample
  python -m launch.lab.plan --config=configs/lightningdit.py:XL/1 --topology=h200:8 --kernels=20
  python -m launch.lab.plan --all --output=docs/lab/tpu.json

Needs the extra [tpu] (libtpu) or [cuda] (jax's CUDA plugin), and no TPU or GPU. The plan: whether
the program fits into the chips' memory and what of it the parts take; how much the devices tell
each other; FLOPs by count; hours at --mfu. --what=train takes the whole training step; sample the
sampling of latents, without the decoder; encode the encoding of pictures and their mirror images;
decode the decoding of latents. Where it does not fit, --search tries in turn to shard the state
over all chips (fsdp), to go through the batch in parts (accumulate_steps), and to compute
activations again (use_checkpoint), and gives the first that fits. --all makes the table of
docs/lab/tpu.md, and goes on with one that was begun.

Of a program for GPUs it also tells what its kernels read and write, how long that takes at the rate
of the data sheet, and with --kernels which of them move most: kernels tuned on the device may be
others, but not what they have to move.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from launch.engine import configuration, console
from launch.engine.circumstances import circumstances
from launch.lab.plan import hlo, slices
from launch.lab.plan.planning import IMAGENET, Plan, Settings, plans
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import write_json

SAMPLES = 50_000  # that a FID is of
# What --all compiles: every published recipe, and the sizes of LightningDiT.
PUBLISHED = (
  ("configs/lightningdit_xl_64ep.py", "train"),
  ("configs/lightningdit_xl_800ep.py", "train"),
  ("configs/lightningdit_sdvae.py", "train"),
  ("configs/lightningdit.py:B/1", "train"),
  ("configs/lightningdit.py:L/1", "train"),
  ("configs/lightningdit.py:1p0B/1", "train"),
  ("configs/lightningdit.py:1p6B/1", "train"),
  ("configs/lightningdit_xl_64ep.py", "sample"),
  ("configs/vavae_f16d32.py", "encode"),
  ("configs/vavae_f16d32.py", "train"),  # last: these take ten minutes each on two cores
)


def _gib(size: float) -> str:
  return f"{size / 2**30:.2f}" if size else ""


def _told(settings: Settings) -> str:
  return " ".join(f"--config.{key}={value}" for key, value in settings.items()) or "as given"


def show(topology: str, what: str, found: list[Plan], mfu: float, largest: int = 0) -> None:
  """Prints the plans of one configuration on one slice, and so many kernels."""
  chosen = found[-1]
  if len(found) > 1:
    tried = [
      (_told(p.settings), "yes" if p.fits else "no", _gib(p.needed), f"{p.compile_seconds:.0f}")
      for p in found
    ]
    console.table("Tried", ("settings", "fits", "GiB", "compiled in s"), tried)
  verdict = "fits" if chosen.fits else "DOES NOT FIT"
  rows: list[tuple[str, str]] = [
    (
      "verdict",
      f"{verdict}, says the compiler; all parts {_gib(chosen.needed) or '?'} GiB, a device has "
      f"{_gib(chosen.available)}",
    ),
    ("settings", _told(chosen.settings)),
    ("mesh, data x fsdp", chosen.mesh),
    *((f"  {name}", f"{_gib(size) or '0.00'} GiB") for name, size in chosen.parts.items()),
    *(
      (kind, f"{t.runs} of {t.ops} operations, {_gib(t.bytes)} GiB")
      for kind, t in chosen.traffic.items()
    ),
    (
      "work",
      f"{chosen.flops / 1e12:.2f} TFLOP a device and run, "
      f"{chosen.computed / 1e12:.2f} with what is computed again",
    ),
  ]
  if chosen.kernels:
    launched = sum(x.runs for x in chosen.kernels)
    milliseconds = 1e3 * chosen.moved / chosen.bandwidth
    rows.append(
      (
        "kernels",
        f"{launched:,} move {_gib(chosen.moved)} GiB: {milliseconds:.1f} ms at "
        f"{chosen.bandwidth / 1e12:g} TB/s",
      )
    )
  if chosen.fits:
    rows.append((f"at {mfu:.0%} of the peak", f"{chosen.images_per_second:,.0f} images/s"))
    rows.append(("all of it", f"{chosen.hours:,.1f} hours"))
  rows.append(("compiled in", f"{chosen.compile_seconds:.0f} s"))
  console.table(f"{what} on {topology}", ("", ""), rows)
  if largest:
    cells = [
      (x.name, f"{x.runs:,}", f"{x.bytes / 2**20:,.1f}", _gib(x.runs * x.bytes), x.operation)
      for x in chosen.kernels[:largest]
    ]
    console.table("The kernels that move most", ("kernel", "runs", "MiB", "GiB", "of"), cells)
  if not chosen.fits and len(found) == 1:
    console.say("--search looks for settings that fit.")


def make_table(output: Path, chips: list[str], mfu: float) -> list[dict[str, Any]]:
  """Plans of every published recipe on every slice; the file is written after each."""
  rows = json.loads(output.read_text())["rows"] if output.is_file() else []
  done = {(row["config"], row["what"], row["topology"]) for row in rows}
  wanted = [
    (spec, what, f"{chip}:{side}")
    for spec, what in PUBLISHED
    for chip in chips
    for side in slices.SLICES[chip]
  ]
  for spec, what, topology in console.tracked(wanted, "plans"):
    if (spec, what, topology) in done:
      continue
    rows.append(
      {"config": spec, "what": what, "topology": topology, **_apart(spec, what, topology, mfu)}
    )
    write_json(output, {**circumstances(), "mfu": mfu, "rows": rows})
  return rows


def _apart(spec: str, what: str, topology: str, mfu: float) -> dict[str, Any]:
  """The last plan of a search in a process of its own: the TPU compiler was seen to crash."""
  with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "plans.json"
    words = ["--search", f"--config={spec}", f"--what={what}", f"--topology={topology}"]
    words += [f"--mfu={mfu}", f"--output={file}"]
    done = subprocess.run(
      [sys.executable, "-m", "launch.lab.plan", *words], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
      return json.loads(file.read_text())["plans"][-1]
  if done.returncode < 0:
    return {"error": f"the compiler crashed (signal {-done.returncode})"}
  return {"error": done.stderr.strip().splitlines()[-1].removeprefix("error: ")}


def markdown(rows: list[dict[str, Any]]) -> str:
  """The table of docs/lab/tpu.md."""
  lines = [
    "| recipe | what | slice | settings | GiB a device | of | gathered, reduced GiB | hours |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in rows:
    name = row["config"].removeprefix("configs/").replace(".py", "")
    head = f"| {name} | {row['what']} | {row['topology']} |"
    if "error" in row:
      lines.append(f"{head} {row['error']} | | | | |")
      continue
    told = _told(row["settings"]).replace("--config.", "") if row["fits"] else "nothing tried fits"
    moved = [row["traffic"].get(kind, {}).get("bytes", 0) / 2**30 for kind in hlo.KINDS[:2]]
    hours = f"{row['hours']:,.1f}" if row["fits"] else ""
    lines.append(
      f"{head} {told} | {row['needed'] / 2**30:.1f} | {row['available'] / 2**30:.1f} | "
      f"{moved[0]:.1f}, {moved[1]:.1f} | {hours} |"
    )
  return "\n".join(lines) + "\n"


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  slices.prepare()
  if unknown := [chip for chip in FLAGS.chips if chip not in slices.SLICES]:
    raise InputError(f"--chips={unknown[0]} is none of {', '.join(slices.SLICES)}.")
  if FLAGS.kernels and FLAGS.topology.partition(":")[0] not in slices.GPUS:
    raise InputError(f"--kernels is of GPUs, and --topology is {FLAGS.topology}.")
  if FLAGS.all:
    if not FLAGS.output:
      raise InputError("--all needs --output=FILE.json, from which it also goes on.")
    output = Path(FLAGS.output)
    rows = make_table(output, FLAGS.chips, FLAGS.mfu)
    output.with_suffix(".md").write_text(markdown(rows))
    console.say(f"written to {output} and {output.with_suffix('.md')}")
    return
  if FLAGS.config is None:
    raise InputError("Give --config=configs/NAME.py and --topology=CHIP:SIDES, or --all.")
  found = []
  for one in plans(
    FLAGS.config,
    FLAGS.topology,
    FLAGS.what,
    search=FLAGS.search,
    num_images=FLAGS.num_images or (SAMPLES if FLAGS.what == "sample" else IMAGENET),
    mfu=FLAGS.mfu,
  ):
    found.append(one)
    console.say(f"{_told(one.settings)}: {'fits' if one.fits else 'does not fit'}")
  show(FLAGS.topology, FLAGS.what, found, FLAGS.mfu, FLAGS.kernels)
  if FLAGS.output:
    told = {**circumstances(), "mfu": FLAGS.mfu, "plans": [one.to_dict() for one in found]}
    write_json(Path(FLAGS.output), told)
    console.say(f"written to {FLAGS.output}")


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("A training, such as configs/lightningdit_xl_64ep.py.")
  flags.DEFINE_string("topology", "v5e:4x4", "The slice: chip and chips along each axis.")
  flags.DEFINE_enum("what", "train", ("train", "sample", "encode", "decode"), "Which program.")
  flags.DEFINE_boolean("search", False, "Look for settings that fit where it does not.")
  flags.DEFINE_integer("kernels", 0, "Of GPUs: show so many, those that move most.", 0)
  flags.DEFINE_float("mfu", 0.4, "Share of the chips' peak for the hours.", lower_bound=0.01)
  flags.DEFINE_integer(
    "num_images", 0, "Of an epoch or to encode, 0: ImageNet's; to sample, 0: 50,000.", 0
  )
  flags.DEFINE_boolean("all", False, "The table of all published recipes and slices.")
  flags.DEFINE_list("chips", list(slices.SLICES), "Of --all.")
  flags.DEFINE_string("output", "", "A JSON file for the plans.")
  console.run_command(main)
