"""PyTorch state dicts <-> weights of our modules; what all converters share.

A converter is a table of the names that differ; the rest follows from the module's own parameters.
Layouts: a convolution is OIHW there and HWIO here, a matrix [out, in] there and [in, out] here, and
a stack of blocks is one tensor per block there and one leading axis here.

Reading is strict. Another model's file must not load and then yield noise: all that is unknown,
missing, misshapen or not finite is listed, and nothing is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import ml_dtypes
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from vavae_jax.common.errors import InputError

StateDict = dict[str, np.ndarray]
Path = tuple[Any, ...]
M = TypeVar("M", bound=nnx.Module)
T = TypeVar("T")

STACKED = "blocks"
LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "embedding": "weight",
  "mean": "running_mean",
  "var": "running_var",
}
KERNEL_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
NOTHING: Mapping[str, Any] = MappingProxyType({})


# What PyTorch's wrappers of modules put into names: DataParallel, compile, FSDP, checkpointing.
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:module|_\w*mod(?:ule)?)\.")


class Slot(NamedTuple):
  """The place of one PyTorch tensor among our weights."""

  name: str  # PyTorch's
  path: Path  # of our array, as `nnx.to_pure_dict` nests it
  block: int | None  # index on our array's leading axis where it is a stack of blocks
  axes: tuple[int, ...]  # of ours in PyTorch's order
  shape: tuple[int, ...]  # PyTorch's


def load(
  model: M,
  state_dict: Mapping[str, Any],
  *,
  renamed: Mapping[str, str] = NOTHING,
  fixed: Mapping[str, np.ndarray] = NOTHING,
) -> M:
  """A module like `model`, which may be abstract, with the float32 weights of a state dict.

  Args:
    model: abstract as `nnx.eval_shape` gives it, or any whose weights may go.
    state_dict: name -> array, with or without what `without_wrappers` drops.
    renamed: parts of names, ours -> PyTorch's, each ending in a dot.
    fixed: tensors that PyTorch stores although the architecture determines them. They may be
      absent; where present they are compared, not used.

  InputError if the state dict is not that of this module; the message lists how.
  """
  state_dict = without_wrappers(state_dict)
  graph, abstract = nnx.split(model)
  leaves = flatten_dict(nnx.to_pure_dict(abstract))
  slots = {path: list(_slots(path, leaf.shape, renamed)) for path, leaf in leaves.items()}
  _check(state_dict, [slot for group in slots.values() for slot in group], fixed)

  weights = {}
  for path, group in slots.items():
    arrays = [np.transpose(_float32(state_dict[s.name]), np.argsort(s.axes)) for s in group]
    # NumPy's, so that a trace that is under way where weights are loaded has no part in them.
    weights[path] = arrays[0] if group[0].block is None else np.stack(arrays)
  return nnx.merge(graph, unflatten_dict(weights))


def without_wrappers(state_dict: Mapping[str, T]) -> dict[str, T]:
  """The same tensors without parts of names such as "module." and "_orig_mod.", wherever they are.

  All names stay where two would become one.
  """
  short = {_WRAPPER.sub("", name): value for name, value in state_dict.items()}
  return short if len(short) == len(state_dict) else dict(state_dict)


def dump(model: nnx.Module, *, renamed: Mapping[str, str] = NOTHING) -> StateDict:
  """A module's weights under PyTorch's names and in its layouts, float32; undoes `load`."""
  state_dict = {}
  for path, leaf in flatten_dict(nnx.to_pure_dict(nnx.state(model))).items():
    array = np.asarray(leaf, np.float32)
    for slot in _slots(path, array.shape, renamed):
      own = array if slot.block is None else array[slot.block]
      state_dict[slot.name] = np.ascontiguousarray(own.transpose(slot.axes))
  return state_dict


def names_of(model: nnx.Module, renamed: Mapping[str, str] = NOTHING) -> list[str]:
  """PyTorch's names of all weights of a module, which may be abstract."""
  leaves = flatten_dict(nnx.to_pure_dict(nnx.state(model)))
  return [s.name for path, leaf in leaves.items() for s in _slots(path, leaf.shape, renamed)]


def _slots(path: Path, shape: tuple[int, ...], renamed: Mapping[str, str]) -> Iterator[Slot]:
  """The tensors that make up one of our arrays, in the order of its leading axis."""
  *modules, kind = path
  blocks: list[int | None] = [None]
  if modules[0] == STACKED:
    blocks = list(range(shape[0]))
    shape = shape[1:]
  axes = KERNEL_AXES[len(shape)] if kind == "kernel" else tuple(range(len(shape)))
  for block in blocks:
    parts = [modules[0], *([] if block is None else [block]), *modules[1:], LEAVES.get(kind, kind)]
    name = ".".join(map(str, parts))
    for ours, theirs in renamed.items():
      name = name.replace(ours, theirs)
    yield Slot(name, path, block, axes, tuple(shape[axis] for axis in axes))


def _check(
  state_dict: Mapping[str, Any], slots: list[Slot], fixed: Mapping[str, np.ndarray]
) -> None:
  """Raises InputError with all that keeps the state dict from filling the slots."""
  expected = {slot.name: slot.shape for slot in slots}
  shapes = expected | {name: value.shape for name, value in fixed.items()}
  found = {name: np.shape(value) for name, value in state_dict.items()}
  present = [name for name in shapes if found.get(name) == shapes[name]]
  real = [name for name in present if _is_floating(state_dict[name])]
  problems = {
    "unknown": [name for name in found if name not in shapes],
    "missing": [name for name in expected if name not in found],
    "of another shape": [
      f"{name} {found[name]} instead of {shapes[name]}"
      for name in shapes
      if name in found and name not in present
    ],
    "not of floating-point numbers of 16 bits or more": [
      f"{name} ({np.asarray(state_dict[name]).dtype})" for name in present if name not in real
    ],
    "not finite": [n for n in real if not np.isfinite(_float32(state_dict[n])).all()],
    # As loose as bfloat16, in which some files are stored; another grid is off by far more.
    "of another value than the architecture fixes": [
      name
      for name in real
      if name in fixed and not np.allclose(_float32(state_dict[name]), fixed[name], atol=5e-3)
    ],
  }
  if any(problems.values()):
    lists = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    raise InputError(
      f"The state dict does not fit this model. {'; '.join(lists)}. Give the weights themselves "
      "(not the checkpoint around them), and the arguments that the model was trained with."
    )


def _is_floating(value: Any) -> bool:
  dtype = np.asarray(value).dtype
  return dtype == ml_dtypes.bfloat16 or (dtype.kind == "f" and dtype.itemsize > 1)


def _float32(value: Any) -> np.ndarray:
  return np.asarray(value, np.float32)
