r"""Compiles a step ahead of time for TPUs or GPUs, on any CPU machine, and says what it would take.

  python -m launch.compile --config=configs/lightningdit_xl_64ep.py --topology=v5e:4x4 --search
  python -m launch.compile --config=configs/vavae_f16d32.py --topology=v5p:2x2x4
  python -m launch.compile --config=configs/lightningdit_xl_64ep.py --topology=v5e:2x4 --what=sample
  python -m launch.compile --config=configs/lightningdit.py:XL/1 --topology=h200:8 --kernels=20
  python -m launch.compile --all --output=docs/tpu.json

Needs the extra [tpu] (libtpu) or [cuda] (jax's CUDA plugin), and no TPU or GPU. The plan: whether
the program fits into the chips' memory and what of it the parts take; how much the devices tell
each other; FLOPs by count; hours at --mfu. --what=train takes the whole training step; sample the
sampling of latents, without the decoder; encode the encoding of pictures and their mirror images.
Where it does not fit, --search tries in turn to shard the state over all chips (fsdp), to go
through the batch in parts (accumulate_steps), and to compute activations again (use_checkpoint),
and gives the first that fits. --all makes the table of docs/tpu.md, and goes on with one that was
begun.

Of a program for GPUs it also tells what its kernels read and write, how long that takes at the rate
of the data sheet, and with --kernels which of them move most: kernels tuned on the device may be
others, but not what they have to move.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
import vavae_jax.training
from launch import programs, trained
from launch.engine import configuration, console, flops, hardware, hlo, kernels, slices
from launch.engine.circumstances import circumstances
from vavae_jax import functional, stages
from vavae_jax.errors import InputError
from vavae_jax.files import write_json

IMAGENET = 1_281_167
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
Settings = dict[str, Any]


@dataclasses.dataclass
class Plan:
  """What a program would take on a slice.

  Attributes:
    settings: the changes of the configuration that it is with.
    mesh: "data x fsdp".
    fits: whether the compiler found room.
    needed: bytes of a device, all parts together, of which not all need be there at one time (so
      that it can exceed `available` where the compiler finds room); 0 where it did not say.
    available: bytes of a device.
    parts: bytes of a device by kind; they sum up to `needed`.
    traffic: of the devices, by kind of collective.
    flops: of the model in one run, a device's share; what is computed again does not count.
    computed: of a device in one run, with what is computed again.
    hours: for all runs, at the stated share of the chips' peak; 0 where it does not fit.
    images_per_second: likewise.
    compile_seconds: here.
    kernels: of a GPU, alike ones together, those that move most first.
    bandwidth: of a GPU's memory, bytes/s.
  """

  settings: Settings
  mesh: str
  fits: bool
  needed: float
  available: float
  parts: dict[str, int]
  traffic: dict[str, hlo.Traffic]
  flops: float
  computed: float
  hours: float
  images_per_second: float
  compile_seconds: float
  kernels: list[kernels.Kernel]
  bandwidth: float = 0.0

  @property
  def moved(self) -> int:
    """Bytes that a device's kernels read and write in one run."""
    return kernels.moved(self.kernels)

  def to_dict(self) -> dict[str, Any]:
    """For a JSON file."""
    return dataclasses.asdict(self) | {
      "traffic": {kind: t._asdict() for kind, t in self.traffic.items()},
      "kernels": [x._asdict() for x in self.kernels],
      "moved": self.moved,
    }


def _bytes_of_one_device(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def plan(
  config: FrozenConfigDict,
  topology: str,
  what: str = "train",
  *,
  mfu: float = 0.4,
  num_images: int = IMAGENET,
  settings: Settings | None = None,
) -> Plan:
  """Compiles one program for a slice.

  Args:
    config: of a training, resolved.
    topology: as of `slices.make_mesh`.
    what: one of `programs.WHAT[config.task]`.
    mfu: the share of the chips' peak that the hours are told for.
    num_images: to encode, or to sample.
    settings: which changes led to this configuration.

  Returns:
    The plan; of a program that does not fit, without traffic.

  Raises:
    InputError: no such slice, or a mesh or batch that does not fit it.
  """
  programs.check(config, what)
  devices = slices.make_mesh(topology, config.mesh.data, config.mesh.fsdp)
  program = programs.of(config, devices, what, num_images)
  began = time.perf_counter()
  with jax.set_mesh(devices):
    traced = program.function.trace(*program.arguments)
    computed = flops.count(traced.jaxpr) / devices.size
    refused, compiled = "", None
    try:
      compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
      refused = str(error)
      if "RESOURCE_EXHAUSTED" not in refused:
        raise
  one_run = _model_flops(config, devices, what, num_images) or computed
  seconds = program.runs * one_run / (hardware.peak_flops(devices) / devices.size * mfu)
  result = Plan(
    settings=settings or {},
    mesh=f"{devices.shape['data']} x {devices.shape['fsdp']}",
    fits=compiled is not None,
    needed=_told_bytes(refused),
    available=hardware.memory(devices),
    parts={name: _bytes_of_one_device(tree) for name, tree in program.parts.items()},
    traffic={},
    flops=one_run,
    computed=computed,
    hours=0.0,
    images_per_second=0.0,
    compile_seconds=time.perf_counter() - began,
    kernels=[],
  )
  if compiled is None:
    return result
  memory = compiled.memory_analysis()
  result.parts["temporary"] = memory.temp_size_in_bytes
  result.parts["program"] = memory.generated_code_size_in_bytes
  returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
  result.needed = (
    memory.argument_size_in_bytes
    + returned
    + sum(result.parts[name] for name in ("temporary", "program"))
  )
  result.parts["other"] = int(result.needed) - sum(result.parts.values())
  text = compiled.as_text()
  result.traffic = hlo.collectives(text)
  if topology.partition(":")[0] in slices.GPUS:
    # Its compiler makes programs that do not fit, too.
    result.fits = result.needed <= result.available
    result.kernels = kernels.grouped(kernels.kernels(text))
    result.bandwidth = hardware.bandwidth(devices)
  if not result.fits:
    return result
  result.hours = seconds / 3600
  result.images_per_second = program.runs * program.images / seconds
  return result


def _model_flops(config: FrozenConfigDict, devices: Mesh, what: str, num_images: int) -> float:
  """A device's share of one run where nothing is computed again; 0 where nothing is anyhow."""
  if not config.model.use_checkpoint or what != "train":
    return 0.0
  plain = ConfigDict(config.to_dict())
  plain.model.use_checkpoint = False
  program = programs.of(FrozenConfigDict(plain), devices, what, num_images)
  with jax.set_mesh(devices):
    traced = program.function.trace(*program.arguments)
  return flops.count(traced.jaxpr) / devices.size


def _told_bytes(message: str) -> float:
  """How much memory a program would have needed, where the compiler says so."""
  found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)", message)
  if not found:
    return 0.0
  number, unit = (word for word in found.groups() if word)
  return float(number) * 2 ** (10 * (1 + "KMGT".index(unit)))


def remedies(config: FrozenConfigDict, what: str, devices: int) -> Iterator[Settings]:
  """Changes that save memory, cheapest first; each says what is set."""
  if what != "train":
    sizes = {"sample": config.sample.batch_size} if what == "sample" else {}
    for size in sizes.values():
      while size > devices and size % 2 == 0:
        size //= 2
        yield {"sample.batch_size": size}
    return
  sharded = {"mesh.data": 1, "mesh.fsdp": -1}
  yield sharded
  if config.task == "tokenizer":
    yield sharded | {"model.use_checkpoint": True}
    return
  share = config.batch_size // devices
  parts = [n for n in (2, 4, 8, 16, 32) if share % n == 0 and share // n >= 4]
  policies = ("dots", "dense", "full")
  for count in parts:
    yield sharded | {"accumulate_steps": count}
  for policy in policies:
    again = sharded | {"model.use_checkpoint": True, "model.remat_policy": policy}
    yield again
  for count in parts:
    yield again | {"accumulate_steps": count}


def plans(
  config: ConfigDict,
  topology: str,
  what: str,
  *,
  search: bool = False,
  num_images: int = IMAGENET,
  **options: Any,
) -> Iterator[Plan]:
  """The plan of a configuration and, with `search`, of remedies until one fits."""
  first = plan(_resolved(config, num_images), topology, what, num_images=num_images, **options)
  yield first
  if first.fits or not search:
    return
  count = slices.make_mesh(topology).size
  for settings in remedies(FrozenConfigDict(config.copy_and_resolve_references()), what, count):
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict(settings)
    tried = plan(
      _resolved(changed, num_images),
      topology,
      what,
      num_images=num_images,
      settings=settings,
      **options,
    )
    yield tried
    if tried.fits:
      return


def _resolved(config: ConfigDict, num_images: int) -> FrozenConfigDict:
  task = config.get("task")
  if task not in trained.TASKS:
    raise InputError(f"config.task is {task!r}; choose one of {sorted(trained.TASKS)}.")
  resolved = configuration.resolve(config, getattr(configs.base, task)())
  if task == "tokenizer":
    functional.outline(vavae_jax.training.build_autoencoder(resolved), "config.model")
    return stages.with_steps(resolved, num_images)
  return resolved


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
      [sys.executable, "-m", "launch.compile", *words], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
      return json.loads(file.read_text())["plans"][-1]
  if done.returncode < 0:
    return {"error": f"the compiler crashed (signal {-done.returncode})"}
  return {"error": done.stderr.strip().splitlines()[-1].removeprefix("error: ")}


def markdown(rows: list[dict[str, Any]]) -> str:
  """The table of docs/tpu.md."""
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
  flags.DEFINE_enum("what", "train", ("train", "sample", "encode"), "Which program.")
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
