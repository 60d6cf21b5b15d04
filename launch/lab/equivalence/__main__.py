r"""Runs the PyTorch reference beside this project on the same weights and inputs, layer by layer.

  python -m launch.lab.equivalence --reference=LIGHTNINGDIT --torch_python=PYTHON \
    --model=LightningDiT-XL/1 --output=runs/equivalence

--reference is a checkout of hustvl/LightningDiT; it is run by --torch_python, an interpreter with
torch, einops, numpy and pillow (teachers and training also need timm, trajectories torchdiffeq,
fid_inception torch-fidelity). What else the reference imports (fairscale, pytorch_lightning,
torchvision, requests) is not needed for these numbers, and empty modules stand in where it is not
installed or does not load. Weights are random, or those of --checkpoint. --model is a preset of
LightningDiT or of the tokenizer (f16d32), a tokenizer's training step (f16d32_training, which also
needs --taming), a teacher, lpips or fid_inception. Writes a table, OUTPUT.json and OUTPUT.html; the
exit status is 1 where a tolerance does not hold.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from launch.engine import console
from launch.engine.circumstances import circumstances
from launch.lab.equivalence.cases import (
  MODELS,
  TRAINED,
  Arrays,
  Case,
  Settings,
  check_weights,
  make_case,
)
from launch.lab.equivalence.differences import (
  BFLOAT16_TOLERANCE,
  HEADER,
  KINKED_GROUPS,
  KINKED_TOLERANCE,
  TOLERANCES,
  Row,
  page,
  summary,
)
from launch.weights.recognition import recognise
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, write_json
from vavae_jax.weights.state_dicts import read_content, read_state_dict
from vavae_jax.weights.torch_writer import write_torch_file

TORCH_SCRIPT = Path(__file__).parents[1] / "torch" / "layers.py"


def compare(settings: Settings) -> tuple[list[Row], dict[str, str]]:
  """Runs both sides.

  Args:
    settings: see the flags.

  Returns:
    (rows in the order of computation, what the other side says of itself).

  Raises:
    InputError: no checkout, no PyTorch, or weights of another model.
  """
  if not (settings.reference / "models" / "lightningdit.py").is_file():
    raise InputError(
      f"--reference is {settings.reference}, which has no models/lightningdit.py; give a checkout "
      "of hustvl/LightningDiT."
    )
  case = make_case(settings)
  if not set(case.dtypes) & set(settings.dtypes):
    raise InputError(
      f"{settings.model} is compared in {', '.join(case.dtypes)}, not in "
      f"{', '.join(settings.dtypes)}; leave --dtypes away."
    )
  rows: list[Row] = []
  about: dict[str, str] = {}
  with tempfile.TemporaryDirectory() as folder:
    paths = {name: f"{folder}/{name}" for name in ("inputs.npz", "outputs.npz", "weights.pt")}
    with Path(paths["inputs.npz"]).open("wb") as file:
      np.savez(file, **case.inputs)
    if settings.model in TRAINED and settings.checkpoint:  # with the loss and the teacher
      write_torch_file(paths["weights.pt"], read_state_dict(settings.checkpoint))
    elif settings.checkpoint:
      found = recognise(read_content(settings.checkpoint))
      check_weights(settings, found)
      write_torch_file(paths["weights.pt"], found.tensors)
      about["weights"] = f"{settings.checkpoint}: {found.kind} {found.name}".strip()
    for dtype in (dtype for dtype in case.dtypes if dtype in settings.dtypes):
      job = case.job | {
        "checkout": str(settings.reference.absolute()),
        "inputs": paths["inputs.npz"],
        "outputs": paths["outputs.npz"],
        "weights": paths["weights.pt"],
        "seed": settings.seed,
        "dtype": dtype,
      }
      console.say(f"the reference in PyTorch, {dtype}")
      about |= _run_torch(settings.torch_python, job)
      console.say(f"this project, {dtype}")
      ours = case.run(read_state_dict(paths["weights.pt"]), case.inputs, dtype)
      with np.load(paths["outputs.npz"]) as theirs:
        rows += _rows(ours, theirs, dtype, case)
  return rows, about


def _run_torch(python: str, job: dict[str, Any]) -> dict[str, str]:
  try:
    done = subprocess.run(
      [python, str(TORCH_SCRIPT)],
      input=json.dumps(job) + "\n",
      stdout=subprocess.PIPE,
      text=True,
      check=False,
    )
  except OSError as error:
    raise InputError(f"--torch_python is {python}, which does not start: {error}.") from error
  if done.returncode:
    raise InputError(
      "The reference in PyTorch has ended; its message is above. If it lacks a module: "
      "--torch_python must be an interpreter with torch, einops, numpy, pillow; for teachers and "
      "training also timm, for fid_inception torch-fidelity (pip install --no-deps)."
    )
  return json.loads(done.stdout.splitlines()[-1])


def _rows(ours: Arrays, theirs: Mapping[str, np.ndarray], dtype: str, case: Case) -> list[Row]:
  """Ours beside the reference's, whose layers also have a name behind their number."""
  rows = []
  keys = {"/".join(k.split("/")[:2]) if k.startswith("layer/") else k: k for k in theirs}
  if missing := sorted(ours.keys() ^ keys.keys()):
    raise InputError(
      f"The two sides do not compute the same: {', '.join(missing[:8])} is on one of them only. Is "
      "torchdiffeq installed on the other side? --trajectory=0 does without."
    )
  for key, full in keys.items():
    if full.endswith(case.rounding):
      continue
    expected = theirs[full]
    actual = np.asarray(ours[key], np.float32)
    if actual.shape != expected.shape:
      raise InputError(f"{full} has shape {expected.shape} there and {actual.shape} here.")
    difference = actual - expected
    max_abs = float(np.abs(difference).max())
    group, _, name = full.partition("/")
    relative = max_abs / max(float(np.abs(expected).max()), 1e-30)
    rms = float(np.linalg.norm(difference)) / max(float(np.linalg.norm(expected)), 1e-30)
    tolerance = TOLERANCES[group] if dtype == "float32" else BFLOAT16_TOLERANCE
    if case.kinked and group in KINKED_GROUPS:
      tolerance = KINKED_TOLERANCE
    rows.append(Row(group, name, dtype, max_abs, relative, rms, tolerance, case.kinked))
  return rows


def _told(row: Row) -> dict[str, Any]:
  """For JSON, which has no NaN."""
  fields = dataclasses.asdict(row) | {"holds": row.holds}
  odd = {k: str(v) for k, v in fields.items() if isinstance(v, float) and not math.isfinite(v)}
  return fields | odd


def main(argv: list[str]) -> None:
  """The command."""
  del argv
  names = [field.name for field in dataclasses.fields(Settings)]
  given: dict[str, Any] = {name: FLAGS[name].value for name in names}
  settings = Settings(**given | {"reference": Path(FLAGS.reference), "dtypes": FLAGS.dtypes})
  rows, other = compare(settings)
  lines = summary(rows)
  title = f"{other.get('weights', settings.model)} beside the reference"
  console.table(title, HEADER, lines)
  console.say(f"in place of other modules: {other['replaced']}")
  chosen = {name: getattr(settings, name) for name in ("batch_size", "image_size", "seed")}
  about = {**circumstances(), **other, **chosen}
  if FLAGS.output:
    path = Path(FLAGS.output)
    written = [path.with_name(f"{path.name}.{ending}") for ending in ("json", "html")]
    told = [_told(row) for row in rows]
    write_json(written[0], {**about, "model": settings.model, "rows": told})
    with atomic_file(written[1]) as file:
      file.write(page(title, rows, about).encode())
    console.say(f"written to {written[0]} and {written[1]}")
  if not all(row.holds for row in rows):
    console.say("not equivalent: a tolerance does not hold")
    sys.exit(1)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("reference", None, "A checkout of hustvl/LightningDiT.", required=True)
  flags.DEFINE_string("taming", "", "A checkout of CompVis/taming-transformers, for training.")
  flags.DEFINE_string("torch_python", sys.executable, "The interpreter that has PyTorch.")
  flags.DEFINE_enum("model", None, MODELS, "What to compare.", required=True)
  flags.DEFINE_string("checkpoint", "", "Weights of that model; random ones if not given.")
  flags.DEFINE_integer("batch_size", 2, "Samples.", lower_bound=1)
  flags.DEFINE_integer("image_size", 256, "Pixels, of all but LightningDiT.")
  flags.DEFINE_integer("steps", 2, "Of Adam, in training; 0: none.", lower_bound=0)
  flags.DEFINE_integer("trajectory", 5, "Grid points of a sampling; 0: none.", lower_bound=0)
  flags.DEFINE_multi_enum(
    "dtypes",
    ["float32", "bfloat16"],
    ["float32", "bfloat16"],
    "What matrices multiply in; bfloat16 of LightningDiT alone, which is trained in it.",
  )
  flags.DEFINE_integer("seed", 0, "Of weights and inputs.")
  flags.DEFINE_string("output", "", "Where to write OUTPUT.json and OUTPUT.html.")
  console.run_command(main)
