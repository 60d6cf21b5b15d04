r"""Measures what a configuration costs here: steps, sampling, encoding, loading, FID.

  python -m launch.benchmark --config=configs/lightningdit.py:XL/1 --batch_sizes=32,64,128 \
    --attention=xla --attention=cudnn --output=benchmark.json
  python -m launch.benchmark --config=configs/lightningdit.py:B/1 --what=train,sample,loader,fid
  python -m launch.benchmark --config=configs/vavae_f16d32.py --what=train,encode --profile=trace
  python -m launch.benchmark --config=configs/lightningdit.py:B/1 --compare=docs/baseline.json

--what: train (a whole training step), sample (latents, of a diffusion model) or encode (of a
tokenizer), loader (batches on the host), checkpoint (--steps steps with one saved while they run,
beside as many without), fid (Inception's features, and a distance's arithmetic). Of each: images/s,
FLOP/s by count, its share of a matrix product's rate measured in the same run and, where the device
is known, of its data sheet, memory, and seconds to compile without and with the compilation cache.
Everything is of random weights and data. --profile writes a trace and names the ten largest
operations. --compare shows what changed against a stored baseline of ratios (share of a matrix
product's rate, times the reference's speed, memory), and ends with exit code 2 where one is worse
by more than --tolerance; --update puts this run's into a baseline. --reference is a checkout of
hustvl/LightningDiT: its model takes training steps in eager PyTorch, on the CPU, in turns with
ours. On CPUs set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which spares page faults. A batch size that
does not fit is reported as such.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
from launch import baseline, benchmark_data, programs, trained
from launch.benchmark_reference import TorchTraining
from launch.engine import configuration, console, flops, hardware, loop, mesh
from launch.engine.checkpoint import Checkpoints, survey
from launch.engine.circumstances import circumstances
from launch.evaluation.generation import feature_options
from launch.measuring import Prepared, copy_rate, matmul_rate, peak_memory, profile, timed
from lightningdit_jax.model import ATTENTIONS
from vavae_jax import stages
from vavae_jax.errors import InputError
from vavae_jax.files import write_json
from vavae_jax.metrics import inception
from vavae_jax.metrics.distribution import frechet_distance

WHAT = ("train", "sample", "encode", "loader", "checkpoint", "fid")
ROUNDS = 2  # of ours and the reference's in turn
FID_BATCH = 50
RECORDS = 5_000
LOADED = 80  # batches; few would be those that lay ready
# What the table shows of a row, and how it is called there.
COLUMNS = {
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
  "share_of_matmul": "of matmul",
  "mfu": "MFU",
  "program_gib": "GiB",
  "peak_gib": "peak GiB",
  "compile_cold": "cold, s",
  "compile_warm": "warm, s",
  "arithmetic_seconds": "distance, s",
  "times_torch": "times torch",
  "checkpoint_gib": "saved GiB",
  "blocked_seconds": "blocked, s",
  "cost": "cost of saving",
}
Row = dict[str, Any]


def measure(
  config: FrozenConfigDict,
  what: str,
  steps: int,
  reference: TorchTraining | None = None,
  trace: Path | None = None,
) -> Row:
  """Times runs of a program, in rounds with the reference's where it is given.

  Not run by run: each of the two would pay for memory that the other has just given back.

  Args:
    config: of a training, resolved.
    what: as of `programs.of`, or "fid".
    steps: how many are timed, each round after one that is not.
    reference: of the same model and batch size.
    trace: a folder for a profile.

  Returns:
    A row of the table; medians of seconds.
  """
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  program = _fid_program(devices) if what == "fid" else programs.of(config, devices, what, 1)
  dtype = config.sample.dtype if what == "sample" else config.dtype
  dtype = "float32" if what == "fid" else dtype
  row: Row = {"what": what, "dtype": dtype, "batch_size": program.images}
  if what == "train" and config.task == "diffusion":
    row["attention"] = config.model.attention
  before = peak_memory()
  try:
    prepared = Prepared(
      program, devices, _fresh_state(config, devices) if what == "train" else None
    )
    timed(prepared.run)
    ours, theirs = [], []
    for _ in range(ROUNDS if reference else 1):
      ours += [timed(prepared.run) for _ in range(steps + 1)][1:]
      if reference:
        theirs += [reference.seconds() for _ in range(steps + 1)][1:]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return row | {"out_of_memory": True}
  seconds = float(np.median(ours))
  # What is computed again (remat) is work of the devices, but none of the model.
  counted = trained.TASKS[config.task].flops_per_step(config) if what == "train" else 0.0
  work = (counted or prepared.flops) / seconds
  row |= {
    "seconds": seconds,
    "fastest": min(ours),
    "images_per_second": program.images / seconds,
    "model_tflops_per_second": work / 1e12,
    "share_of_matmul": work / matmul_rate(dtype) / devices.size,
    "program_gib": prepared.memory / 2**30,
    "compile_cold": prepared.compile_cold,
    "compile_warm": prepared.compile_warm,
  }
  if peak := hardware.peak_flops(devices):
    row["mfu"] = work / peak
  # The device's count is of the whole process: it tells of this row where the row raised it.
  if (most := peak_memory()) > before:
    row["peak_gib"] = most / 2**30
  if theirs:
    row["torch_seconds"] = float(np.median(theirs))
    row["torch_fastest"] = min(theirs)
    row["times_torch"] = row["torch_seconds"] / seconds
  if what == "fid":
    row["arithmetic_seconds"] = _arithmetic_seconds()
  if trace:
    row["operations"] = profile(prepared.run, trace / what)
  return row


def count(config: FrozenConfigDict, what: str) -> Row:
  """The two numbers of a program before it is measured: its FLOPs, and the bytes it cannot avoid.

  Args:
    config: of a training, resolved.
    what: as of `programs.of`, or "fid".

  Returns:
    A row of the table. Bytes are those of arguments and results, each once: what is between them
    may stay on the chip, and weights that a loop reads in each round are more.
  """
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  program = _fid_program(devices) if what == "fid" else programs.of(config, devices, what, 1)
  with jax.set_mesh(devices):
    traced = program.function.trace(*program.arguments)
  arrays = jax.tree.leaves((program.arrays, traced.out_info))
  sizes = [math.prod(x.shape) * x.dtype.itemsize for x in arrays]
  tflop, gib = flops.count(traced.jaxpr) / 1e12, sum(sizes) / 2**30
  return {
    "what": what,
    "batch_size": program.images,
    "tflop_per_image": tflop / program.images,
    "least_gib": gib,
    "flop_per_byte": tflop * 1e12 / sum(sizes),
  }


def _fresh_state(config: FrozenConfigDict, devices: jax.sharding.Mesh) -> Any:
  init = functools.partial(trained.TASKS[config.task].init_state, config)
  shardings = mesh.parameter_shardings(jax.eval_shape(init, jax.random.key(0)), devices)
  with jax.set_mesh(devices):
    return loop.jit_init(init, shardings)(jax.random.key(0))


def _fid_program(devices: jax.sharding.Mesh) -> programs.Program:
  """FID's Inception by ADM's protocol on pictures of 256 pixels, with random weights."""
  graph, weights = nnx.split(nnx.eval_shape(lambda: inception.InceptionV3(rngs=nnx.Rngs(0))))
  prepare = inception.PROTOCOLS["adm"]

  def features(params: Any, image_BHWC: jax.Array) -> jax.Array:
    return nnx.merge(graph, params)(prepare(image_BHWC))["pool3"]

  size = mesh.round_up(FID_BATCH, devices)
  params = programs.everywhere(nnx.to_pure_dict(weights), devices)
  image = programs.rows((size, 256, 256, 3), jnp.uint8, devices)
  return programs.Program(
    jax.jit(features, compiler_options=feature_options()), (params, image), {}, 1, size
  )


def _arithmetic_seconds() -> float:
  """Of one Frechet distance of 2,048 features."""
  draw = np.random.default_rng(0)
  halves = [np.cov(draw.standard_normal((2 * 2048, 2048)), rowvar=False) for _ in range(2)]
  began = time.perf_counter()
  frechet_distance(np.zeros(2048), halves[0], np.ones(2048), halves[1])
  return time.perf_counter() - began


def measure_loader(config: FrozenConfigDict, batches: int) -> Row:
  """Times batches on the host as training loads them, out of a store or photographs made here."""
  with tempfile.TemporaryDirectory() as folder:
    if config.task == "diffusion":
      side, channels = config.model.input_size, config.model.in_channels
      shape = (side, side, channels)
      store = benchmark_data.make_store(Path(folder), RECORDS, shape)
      begin = benchmark_data.latent_batches(store, config.batch_size, config.loader)
    else:
      size = config.data.image_size
      begin = benchmark_data.picture_batches(config.batch_size, config.loader, size)
    seconds = benchmark_data.timed_batches(begin, 2)(batches)
  return {
    "what": "loader",
    "batch_size": config.batch_size,
    "seconds": seconds / batches,
    "images_per_second": batches * config.batch_size / seconds,
  }


def measure_checkpoint(config: FrozenConfigDict, steps: int) -> Row:
  """Times steps during which one checkpoint is written, in turns with as many without one."""
  devices = mesh.make_mesh(config.mesh.data, config.mesh.fsdp)
  program = programs.of(config, devices, "train", 1)
  prepared = Prepared(program, devices, _fresh_state(config, devices))
  timed(prepared.run)
  plain, saving, blocked, written = [], [], [], []
  for _ in range(ROUNDS):
    began = time.perf_counter()
    for _ in range(steps):
      jax.block_until_ready(prepared.run())
    plain.append(time.perf_counter() - began)
    with tempfile.TemporaryDirectory() as folder:
      checkpoints = Checkpoints(Path(folder))
      state, _ = jax.block_until_ready(prepared.run())
      began = time.perf_counter()
      checkpoints.save(state, config.to_dict())
      blocked.append(time.perf_counter() - began)
      for _ in range(steps):
        jax.block_until_ready(prepared.run())
      saving.append(time.perf_counter() - began)
      checkpoints.close()
      written.append(time.perf_counter() - began)
      size = sum(found.size for found in survey(Path(folder)))
  return {
    "what": "checkpoint",
    "batch_size": config.batch_size,
    "steps": steps,
    "seconds": float(np.median(plain)) / steps,
    "checkpoint_gib": size / 2**30,
    "blocked_seconds": float(np.median(blocked)),
    "written_after_seconds": float(np.median(written)),
    "cost": float(np.median(saving) / np.median(plain)) - 1,
  }


def benchmark(
  config: ConfigDict,
  *,
  what: list[str],
  batch_sizes: list[int],
  attentions: list[str],
  steps: int,
  reference: Path | None = None,
  torch_python: str = sys.executable,
  trace: Path | None = None,
  count_only: bool = False,
) -> dict[str, Any]:
  """All combinations; see the module's docstring."""
  if reference and not (reference / "models" / "lightningdit.py").is_file():
    raise InputError(
      f"--reference is {reference}, which has no models/lightningdit.py; give a checkout of "
      "hustvl/LightningDiT."
    )
  task = config.get("task")
  if task not in trained.TASKS:
    raise InputError(f"config.task is {task!r}; choose one of {sorted(trained.TASKS)}.")
  attentions = attentions if task == "diffusion" else attentions[:1]
  rows: list[Row] = []
  about: dict[str, Any] = {}
  for kind in what:
    for attention in attentions if kind == "train" else attentions[:1]:
      for batch_size in batch_sizes:
        frozen = _resolved(config, kind, batch_size, attention)
        if count_only:
          rows.append(count(frozen, kind))
          continue
        torch = None
        if reference and kind == "train" and task == "diffusion":
          torch = TorchTraining(torch_python, reference, frozen)
        try:
          if kind == "loader":
            rows.append(measure_loader(frozen, max(steps, LOADED)))
          elif kind == "checkpoint":
            rows.append(measure_checkpoint(frozen, steps))
          else:
            rows.append(measure(frozen, kind, steps, torch, trace))
          about |= torch.about if torch else {}
        finally:
          if torch:
            torch.close()
        console.say(json.dumps(rows[-1]))
        if rows[-1].get("out_of_memory"):
          break  # larger ones do not fit either
        if kind in ("encode", "fid"):
          break  # these have batches of their own
  return {
    **circumstances(),
    "matmul_tflops_per_second": {
      row["dtype"]: matmul_rate(row["dtype"]) / 1e12 for row in rows if "dtype" in row
    },
    "copy_gib_per_second": None if count_only else copy_rate() / 2**30,
    **about,
    "config": config.to_dict(),
    "rows": rows,
  }


def _resolved(config: ConfigDict, what: str, batch_size: int, attention: str) -> FrozenConfigDict:
  changed = config.copy_and_resolve_references()
  if what == "sample":
    changed.sample.batch_size = batch_size
  else:
    changed.batch_size = batch_size
  if config.task == "diffusion":
    changed.model.attention = attention
  frozen = configuration.resolve(changed, getattr(configs.base, config.task)())
  if config.task == "tokenizer":
    return stages.with_steps(frozen, 10**6)
  trained.TASKS["diffusion"].check_model(frozen)
  return frozen


def _compared(rows: list[Row], path: Path, tolerance: float) -> None:
  """Shows what has changed against a baseline; InputError where something is worse."""
  found = baseline.changes(rows, baseline.read(path))
  if not found:
    raise InputError(f"{path} has nothing of what was measured; --update={path} puts it there.")
  cells = [
    (change.name, change.ratio, _cell(change.before), _cell(change.now), f"{-change.loss:+.1%}")
    for change in found
  ]
  console.table(f"against {path}", ("what", "ratio", "before", "now", "better by"), cells)
  worse = [change for change in found if change.loss > tolerance]
  if worse:
    told = "; ".join(f"{x.ratio} of {x.name} by {x.loss:.1%}" for x in worse)
    raise InputError(f"Worse than {path} by more than {tolerance:.0%}: {told}.")


def _asked() -> str:
  """The configuration as it was given, with what was changed of it."""
  words = [word.removeprefix("--config=") for word in sys.argv if word.startswith("--config")]
  return " ".join([words[0], *sorted(words[1:])]) if words else ""


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  if unknown := [word for word in FLAGS.what if word not in WHAT]:
    raise InputError(f"--what={unknown[0]} is none of {', '.join(WHAT)}.")
  if FLAGS.count_only and (wrong := {"loader", "checkpoint"} & {*FLAGS.what}):
    raise InputError(f"--count_only is of programs, and {' and '.join(wrong)} is none.")
  try:
    batch_sizes = [int(x) for x in FLAGS.batch_sizes]
  except ValueError as error:
    raise InputError(f"--batch_sizes is {FLAGS.batch_sizes}; give numbers, as in 32,64.") from error
  if FLAGS.compare:
    baseline.read(Path(FLAGS.compare))  # before anything is measured
  result = benchmark(
    FLAGS.config,
    what=FLAGS.what,
    batch_sizes=sorted(batch_sizes) or [FLAGS.config.batch_size],
    attentions=FLAGS.attention,
    steps=FLAGS.steps,
    reference=Path(FLAGS.reference) if FLAGS.reference else None,
    torch_python=FLAGS.torch_python,
    trace=Path(FLAGS.profile) if FLAGS.profile else None,
    count_only=FLAGS.count_only,
  )
  names = [name for name in COLUMNS if any(name in row for row in result["rows"])]
  cells = [[_cell(row.get(name, "")) for name in names] for row in result["rows"]]
  told = ", ".join(f"{x:.3g} in {n}" for n, x in result["matmul_tflops_per_second"].items())
  title = f"{result['device']}; a matrix product in TFLOP/s a device: {told}"
  if FLAGS.count_only:
    title = "counted, not measured"
  else:
    title += f"; a copy in GiB/s: {result['copy_gib_per_second']:.3g}"
  console.table(title, [COLUMNS[name] for name in names], cells)
  for row in result["rows"]:
    if row.get("operations"):
      largest = [(name, f"{share:.1%}") for name, share in row["operations"]]
      console.table(f"{row['what']}: the largest operations", ("operation", "share"), largest)
  if FLAGS.profile:
    console.say(f"trace: {FLAGS.profile} (tensorboard --logdir, with its profile plugin)")
  if FLAGS.output:
    write_json(Path(FLAGS.output), result)
    console.say(f"written to {FLAGS.output}")
  ratios = baseline.ratios_of(result, _asked())
  if FLAGS.compare:
    _compared(ratios, Path(FLAGS.compare), FLAGS.tolerance)
  if FLAGS.update:
    baseline.update(Path(FLAGS.update), ratios)
    console.say(f"ratios kept in {FLAGS.update}")


def _cell(value: Any) -> str:
  if not isinstance(value, float):
    return str(value)
  return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("A training, such as configs/lightningdit.py:XL/1.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_list("what", ["train"], f"Some of {', '.join(WHAT)}.")
  flags.DEFINE_list("batch_sizes", [], "Over all devices, rising; the config's if not given.")
  flags.DEFINE_multi_enum("attention", ["xla"], ATTENTIONS, "May be given several times.")
  flags.DEFINE_integer("steps", 10, "How many are timed.", lower_bound=1)
  flags.DEFINE_string("reference", "", "A checkout of hustvl/LightningDiT to compare with.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has PyTorch.")
  flags.DEFINE_boolean("count_only", False, "Run nothing: FLOPs, and bytes that must be moved.")
  flags.DEFINE_string("profile", "", "A folder for a trace.")
  flags.DEFINE_string("compare", "", "A baseline of ratios, such as docs/baseline.json.")
  flags.DEFINE_float("tolerance", 0.15, "How much worse than the baseline a ratio may be.")
  flags.DEFINE_string("update", "", "A baseline to put these ratios into.")
  flags.DEFINE_string("output", "", "A JSON file for the results.")
  console.run_command(main)
