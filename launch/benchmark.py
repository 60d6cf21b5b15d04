r"""Measures the diffusion training step: images a second, FLOP/s, and what share of the device.

  python -m launch.benchmark --config=configs/lightningdit.py:XL/1 --batch_sizes=32,64,128 \
    --attention=xla --attention=cudnn --output=benchmark.json
  python -m launch.benchmark --config=configs/lightningdit.py:B/1 --config.dtype=float32 \
    --batch_sizes=8 --reference=LIGHTNINGDIT --torch_python=PYTHON

On random latents, so that nothing but the step is measured. Shares are of the matrix product's rate
measured in the same run and, where the device is known, of its data sheet. --reference is a
checkout of hustvl/LightningDiT: its model takes steps in eager PyTorch, on the CPU, in turns with
ours. On CPUs set GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which spares page faults. A batch size that
does not fit is reported as such.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict

import configs.base
from launch.engine import configuration, console, hardware, loop, mesh
from launch.engine.circumstances import circumstances
from lightningdit_jax import training
from lightningdit_jax.model import ATTENTIONS
from vavae_jax.errors import InputError
from vavae_jax.files import write_json

ROUNDS = 2  # of ours and the reference's in turn
TORCH_SCRIPT = Path(__file__).parent / "benchmark_torch.py"
# What the reference's constructor knows.
TORCH_ARGUMENTS = (
  "input_size",
  "patch_size",
  "in_channels",
  "hidden_size",
  "depth",
  "num_heads",
  "mlp_ratio",
  "class_dropout_prob",
  "num_classes",
  "learn_sigma",
  "use_qknorm",
  "use_swiglu",
  "use_rope",
  "use_rmsnorm",
  "wo_shift",
)
Row = dict[str, Any]


def matmul_rate(dtype: str) -> float:
  """FLOP/s of a large square matrix product on one device: what there is to be had."""
  size = 2048 if jax.default_backend() == "cpu" else 8192
  a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.dtype(dtype)) for i in (0, 1))
  product = jax.jit(jnp.matmul)
  seconds = [timed(functools.partial(product, a, b)) for _ in range(10)]
  return 2 * size**3 / float(np.median(seconds[2:]))


def timed(work: Callable[[], Any]) -> float:
  """Seconds until the arrays that `work` returns are there."""
  began = time.perf_counter()
  jax.block_until_ready(work())
  return time.perf_counter() - began


def make_step(config: FrozenConfigDict) -> Callable[[], Any]:
  """A function that takes one compiled training step, each on the state that the last one left.

  Args:
    config: of a diffusion training.

  Returns:
    A function without arguments.
  """
  devices = loop.check(config)
  init = functools.partial(training.init_state, config)
  shardings = mesh.parameter_shardings(jax.eval_shape(init, jax.random.key(0)), devices)
  step = loop.jit_step(training.train_step, config, shardings)
  phase = training.phase(config, 1)
  size, channels = config.model.input_size, config.model.in_channels
  draw = np.random.default_rng(0)
  batch = {
    "latent": draw.normal(size=(config.batch_size, size, size, channels)).astype(np.float32),
    "label": draw.integers(config.model.num_classes, size=config.batch_size, dtype=np.int32),
  }
  with jax.set_mesh(devices):
    states = [loop.jit_init(init, shardings)(jax.random.key(0))]
    batch = mesh.to_global(batch, devices)

  def take() -> Any:
    with jax.set_mesh(devices):
      state, metrics = step(phase, states.pop(), {}, batch, jax.random.key(1))
    states.append(state)
    return state, metrics

  return take


class TorchTraining:
  """The reference's training in a process of its own, which waits while ours works."""

  def __init__(self, python: str, checkout: Path, config: FrozenConfigDict):
    try:
      self._process = subprocess.Popen(
        [python, str(TORCH_SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
      )
    except OSError as error:
      raise InputError(f"--torch_python is {python}, which does not start: {error}.") from error
    self._to, self._from = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
    arguments = {
      "checkout": str(checkout),
      "model": {name: config.model[name] for name in TORCH_ARGUMENTS},
      "batch_size": config.batch_size,
      "learning_rate": config.optimizer.learning_rate,
      "betas": [config.optimizer.b1, config.optimizer.b2],
      "decays": list(config.optimizer.ema_decays),
    }
    self.about = self._ask(json.dumps(arguments))

  def seconds(self) -> float:
    """The time of one step."""
    return self._ask("step")["seconds"]

  def _ask(self, line: str) -> dict[str, Any]:
    try:
      self._to.write(line + "\n")
      self._to.flush()
      answer = self._from.readline()
    except BrokenPipeError:
      answer = ""
    if not answer:
      raise InputError(
        "The reference in PyTorch has ended (its message is above); give --torch_python an "
        "interpreter with torch, numpy and einops, and --reference a checkout of the reference."
      )
    return json.loads(answer)

  def close(self) -> None:
    """Ends the process."""
    self._process.terminate()
    self._process.wait()


def measure(
  config: FrozenConfigDict, steps: int, rate: float, reference: TorchTraining | None = None
) -> Row:
  """Times steps of a configuration, in rounds with the reference's where it is given.

  Not step by step: each of the two would pay for memory that the other has just given back.

  Args:
    config: of a diffusion training.
    steps: how many are timed, each time after one that is not.
    rate: FLOP/s of a matrix product, from `matmul_rate`.
    reference: of the same model and batch size.

  Returns:
    A row of the table; medians of seconds.
  """
  row: Row = {"attention": config.model.attention, "batch_size": config.batch_size}
  try:
    take = make_step(config)
    timed(take)
    ours, theirs = [], []
    for _ in range(ROUNDS if reference else 1):
      ours += [timed(take) for _ in range(steps + 1)][1:]
      if reference:
        theirs += [reference.seconds() for _ in range(steps + 1)][1:]
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    return row | {"out_of_memory": True}
  seconds = float(np.median(ours))
  flops = training.flops_per_step(config) / seconds
  row |= {
    "seconds_per_step": seconds,
    "fastest": min(ours),
    "images_per_second": config.batch_size / seconds,
    "model_tflops_per_second": flops / 1e12,
    "share_of_matmul": flops / rate / jax.device_count(),
  }
  if peak := hardware.peak_flops(mesh.make_mesh()):
    row["mfu"] = flops / peak
  if theirs:
    row["torch_seconds_per_step"] = float(np.median(theirs))
    row["torch_fastest"] = min(theirs)
    row["times_torch"] = row["torch_seconds_per_step"] / seconds
  return row


def benchmark(
  config: ConfigDict,
  *,
  batch_sizes: list[int],
  attentions: list[str],
  steps: int,
  reference: Path | None,
  torch_python: str,
) -> dict[str, Any]:
  """All combinations; see the module's docstring."""
  if reference and not (reference / "models" / "lightningdit.py").is_file():
    raise InputError(
      f"--reference is {reference}, which has no models/lightningdit.py; give a checkout of "
      "hustvl/LightningDiT."
    )
  rows: list[Row] = []
  about: dict[str, Any] = {}
  rate = matmul_rate(config.dtype)
  for attention in attentions:
    for batch_size in batch_sizes:
      config.batch_size = batch_size
      config.model.attention = attention
      frozen = configuration.resolve(config, configs.base.diffusion())
      training.check_model(frozen)
      torch = TorchTraining(torch_python, reference, frozen) if reference else None
      try:
        rows.append(measure(frozen, steps, rate, torch))
        about |= torch.about if torch else {}
      finally:
        if torch:
          torch.close()
      console.say(json.dumps(rows[-1]))
      if rows[-1].get("out_of_memory"):
        break  # larger ones do not fit either
  return {
    **circumstances(),
    "dtype": config.dtype,
    "matmul_tflops_per_second": rate / 1e12,
    **about,
    "config": config.to_dict(),
    "rows": rows,
  }


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  try:
    batch_sizes = [int(x) for x in FLAGS.batch_sizes]
  except ValueError as error:
    raise InputError(f"--batch_sizes is {FLAGS.batch_sizes}; give numbers, as in 32,64.") from error
  result = benchmark(
    FLAGS.config,
    batch_sizes=sorted(batch_sizes) or [FLAGS.config.batch_size],
    attentions=FLAGS.attention,
    steps=FLAGS.steps,
    reference=Path(FLAGS.reference) if FLAGS.reference else None,
    torch_python=FLAGS.torch_python,
  )
  names = list(dict.fromkeys(name for row in result["rows"] for name in row))
  cells = [[_cell(row.get(name, "")) for name in names] for row in result["rows"]]
  title = (
    f"{result['device']}, {result['dtype']}: a matrix product at "
    f"{result['matmul_tflops_per_second']:.3g} TFLOP/s a device"
  )
  console.table(title, [name.replace("_", " ") for name in names], cells)
  if FLAGS.output:
    write_json(Path(FLAGS.output), result)
    console.say(f"written to {FLAGS.output}")


def _cell(value: Any) -> str:
  return f"{value:.3g}" if isinstance(value, float) else str(value)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("A diffusion training, such as configs/lightningdit.py:XL/1.")
  flags.mark_flag_as_required("config")
  flags.DEFINE_list("batch_sizes", [], "Over all devices, rising; the config's if not given.")
  flags.DEFINE_multi_enum("attention", ["xla"], ATTENTIONS, "May be given several times.")
  flags.DEFINE_integer("steps", 10, "How many steps are timed.", lower_bound=1)
  flags.DEFINE_string("reference", "", "A checkout of hustvl/LightningDiT to compare with.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has PyTorch.")
  flags.DEFINE_string("output", "", "A JSON file for the results.")
  console.run_command(main)
