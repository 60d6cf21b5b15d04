"""Runs a model on both sides and compares their arrays."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

import numpy as np

from launch.engine import console
from launch.lab.equivalence.cases import TRAINED, Arrays, Case, Settings, make_case
from launch.lab.equivalence.differences import Row, row_of
from launch.lab.torch_process import SCRIPTS, TorchProcess
from launch.weights.recognition import recognise
from vavae_jax.common.errors import InputError
from vavae_jax.weights.state_dicts import read_content, read_state_dict
from vavae_jax.weights.torch_writer import write_torch_file

NEEDS = (
  "torch, einops, numpy, pillow; for teachers and training also timm, for fid_inception "
  "torch-fidelity (pip install --no-deps)"
)


def compare(settings: Settings) -> tuple[list[Row], dict[str, str]]:
  """Runs both sides.

  Returns:
    (rows in the order of computation, facts about the PyTorch side).

  Raises:
    InputError: no checkout, no PyTorch, or weights of another model.
  """
  settings.checkouts.check()
  case = make_case(settings)
  dtypes = [dtype for dtype in case.dtypes if dtype in settings.dtypes]
  if not dtypes:
    raise InputError(
      f"{settings.model} is compared in {', '.join(case.dtypes)}, not in "
      f"{', '.join(settings.dtypes)}; leave --dtypes away."
    )
  rows: list[Row] = []
  about: dict[str, str] = {}
  with tempfile.TemporaryDirectory() as folder:
    files = {"inputs": "inputs.npz", "outputs": "outputs.npz", "weights": "weights.pt"}
    paths = {name: f"{folder}/{file}" for name, file in files.items()}
    np.savez(paths["inputs"], **case.inputs)
    if settings.checkpoint:
      about |= _write_weights(settings, case, paths["weights"])
    for dtype in dtypes:
      checkout = str(settings.reference.absolute())
      job = case.job | paths | {"checkout": checkout, "seed": settings.seed, "dtype": dtype}
      console.say(f"the reference in PyTorch, {dtype}")
      with TorchProcess(settings.torch_python, SCRIPTS / "layers.py", job, NEEDS) as process:
        about |= process.about
      console.say(f"this project, {dtype}")
      ours = case.run(read_state_dict(paths["weights"]), dtype)
      with np.load(paths["outputs"]) as theirs:
        rows += _rows(ours, theirs, dtype, case)
  return rows, about


def _write_weights(settings: Settings, case: Case, path: str) -> dict[str, str]:
  """Writes the weights of --checkpoint for the PyTorch side; returns what they are.

  Raises:
    InputError: they are of another model.
  """
  if settings.model in TRAINED:  # together with the loss and the teacher, which none recognises
    write_torch_file(path, read_state_dict(settings.checkpoint))
    return {}
  found = recognise(read_content(settings.checkpoint))
  what = f"{found.kind} {found.name}".strip()
  if case.weights not in (what, found.kind):
    raise InputError(
      f"{settings.checkpoint} is a {what}, and --model={settings.model} needs a {case.weights}."
    )
  write_torch_file(path, found.tensors)
  return {"weights": f"{settings.checkpoint}: {what}"}


def _rows(ours: Arrays, theirs: Mapping[str, np.ndarray], dtype: str, case: Case) -> list[Row]:
  """Pairs the arrays; a layer of the reference also has a name behind its number."""
  keys = {"/".join(k.split("/")[:2]) if k.startswith("layer/") else k: k for k in theirs}
  if missing := sorted(ours.keys() ^ keys.keys()):
    raise InputError(
      f"The two sides compute different things: {', '.join(missing[:8])} is on one of them only. "
      "If the other side has no torchdiffeq, give --trajectory=0."
    )
  rows = []
  for key, full in keys.items():
    if not full.endswith(case.rounding):
      actual, expected = np.asarray(ours[key], np.float32), theirs[full]
      if actual.shape != expected.shape:
        raise InputError(f"{full} has shape {expected.shape} there and {actual.shape} here.")
      rows.append(row_of(full, dtype, actual, expected, case.kinked))
  return rows
