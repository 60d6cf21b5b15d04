"""The reference's training step in PyTorch, timed in turns with ours by `launch.benchmark`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import IO, Any, cast

from ml_collections import FrozenConfigDict

from vavae_jax.errors import InputError

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
