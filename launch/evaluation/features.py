"""Feature networks by the name of a protocol."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from launch import restore
from launch.weights import recognition
from vavae_jax import classification
from vavae_jax.common import functional, mesh
from vavae_jax.common.addresses import local_file
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import at_home, place, sha256_of
from vavae_jax.data import images
from vavae_jax.metrics import inception
from vavae_jax.teachers import NAMES, load_teacher
from vavae_jax.teachers.efficientnet import EfficientNetLite
from vavae_jax.weights.state_dicts import read_content

EFFICIENTNET = "efficientnet_lite0"
SECOND = "second_"
CLASSIFIER = "classifier"  # a network of one's own, by launch.train
PROTOCOLS = (*inception.PROTOCOLS, *NAMES, CLASSIFIER)
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"  # how the sha256 of that file begins
# Where pytorch-fid and torch-fidelity put it.
CACHES = (
  f"~/.cache/torch/hub/checkpoints/{INCEPTION_FILE}",
  "~/.cache/torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth",
)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A frozen network and how pictures come to it.

  Attributes:
    distance: name of the Frechet distance in its features; only Inception's is FID.
    about: protocol and weights, for a JSON file.
    apply: (params, uint8 [B,H,W,3]) -> "pool" [B,F]; of Inception also "spatial" [B,2023] and
      "probabilities" [B,1008], of a classifier "scores" [B,classes]. A jitted function can call it.
  """

  protocol: str
  distance: str
  about: dict[str, str]
  params: Any
  apply: Callable[[Any, jax.Array], dict[str, jax.Array]]

  @property
  def key(self) -> str:
    """The Frechet distance's name in JSON and logs: "fid", "fd_efficientnet", ..."""
    return self.distance.lower().replace("-", "_")

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """Numbers of each output per picture."""
    picture = jax.ShapeDtypeStruct((1, 64, 64, 3), np.uint8)
    found = jax.eval_shape(self.apply, self.params, picture)
    return {name: x.shape[-1] for name, x in found.items()}


@functools.cache  # so that it compiles once
def both(first: Network, second: Network | None) -> Network:
  """A network that gives what two give; before names of the second's stands `SECOND`."""
  if not second:
    return first

  def apply(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    others = second.apply(params[1], image_BHWC)
    return first.apply(params[0], image_BHWC) | {SECOND + name: x for name, x in others.items()}

  about = first.about | {"second": json.dumps(second.about)}
  params = first.params, second.params
  return dataclasses.replace(first, about=about, params=params, apply=apply)


def load_network(protocol: str, path: str = "") -> Network:
  """The feature network of a protocol; InputError if the protocol or its weights are unknown.

  `path` is its weights, as published or from `launch.convert`; "": Inception's where pytorch-fid or
  torch-fidelity put them, EfficientNet's of the package that has them. Of "classifier" it is the
  workdir where it was trained.
  """
  if protocol not in PROTOCOLS:
    raise InputError(f"The protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}.")
  if protocol in inception.PROTOCOLS:
    return _inception(protocol, path)
  if protocol == CLASSIFIER:
    return _classifier(path)
  # By the mean and deviation of their publishers.
  teacher = load_teacher(protocol, path or None, normalize=True)
  graph, state = nnx.split(teacher)
  pooled = isinstance(teacher, EfficientNetLite)

  def apply(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    network: Any = nnx.merge(graph, params)
    x_BHWC = images.to_float(image_BHWC)
    if pooled:
      return {"pool": network.endpoints(x_BHWC)["pool"]}
    return {"pool": network(x_BHWC).mean((1, 2))}

  params = nnx.to_pure_dict(state)
  about = {
    "protocol": protocol,
    "features": "pooled" if pooled else "mean over the patches",
    "weights_sha256": functional.fingerprint(params),
    "note": "not FID; it compares with nothing of another network or another number of pictures",
  }
  name = "FD-EfficientNet" if protocol == EFFICIENTNET else f"FD-{protocol}"
  return Network(protocol, name, about, params, apply)


def _classifier(path: str) -> Network:
  if not path:
    raise InputError(
      "Give --weights=WORKDIR of a classifier: python -m launch.train "
      "--config=configs/lab/dilemma.py:judge --workdir=WORKDIR trains one."
    )
  judge = restore.load(place(path), "classifier").on(mesh.local_mesh())
  graph = functional.graph_of(classification.build(judge.config))

  def apply(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    features_BF, scores_BC = nnx.merge(graph, params)(images.to_float(image_BHWC))
    return {"pool": features_BF, "scores": scores_BC}

  name = f"FD-{judge.config.name}"
  about = {
    "protocol": CLASSIFIER,
    "features": "before the last layer",
    "trained_on": judge.config.data.source,
    "step": str(judge.step),
    "weights_sha256": judge.sha256,
    "note": "not FID; it compares with nothing of another network or another number of pictures",
  }
  return Network(CLASSIFIER, name, about, judge.params, apply)


def _inception(protocol: str, path: str) -> Network:
  if path and not local_file(path).is_file():
    raise InputError(f"There is no file {path}; --weights is the path of {INCEPTION_FILE}.")
  files = [local_file(path)] if path else [Path(at_home(name)) for name in CACHES]
  file = next((file for file in files if file.is_file()), None)
  if file is None:
    raise InputError(
      f"FID's Inception is missing: give --weights=PATH of {INCEPTION_FILE} (of pytorch-fid's "
      "release fid_weights on GitHub), or of what python -m launch.convert made of it. Without it, "
      f"--protocol={EFFICIENTNET} gives a Frechet distance in other features, under its own name."
    )
  found = recognition.recognise(read_content(file))
  if not isinstance(found.module, inception.InceptionV3):
    raise InputError(f"{file} holds {found.kind}; the weights of FID's Inception are needed.")
  graph, state = nnx.split(found.module)
  prepare = inception.PROTOCOLS[protocol]

  def apply(params: Any, image_BHWC: jax.Array) -> dict[str, jax.Array]:
    out = nnx.merge(graph, params)(prepare(image_BHWC))
    return {
      "pool": out["pool3"],
      "spatial": out["spatial"].reshape(len(image_BHWC), -1),  # as stored statistics have it
      "probabilities": jax.nn.softmax(out["logits_unbiased"]),
    }

  sha256 = sha256_of(file)
  params = nnx.to_pure_dict(state)
  about = {
    "protocol": protocol,
    "weights": "as published" if sha256.startswith(PUBLISHED) else "NOT the file that is published",
    "weights_sha256": functional.fingerprint(params),
  }
  return Network(protocol, "FID", about, params, apply)
