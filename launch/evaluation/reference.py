"""Pictures in the features of a network; real ones as the reference of a distance."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from launch.engine import console, processes
from launch.evaluation.features import SECOND, Network
from launch.evaluation.pictures import PictureSet, has_pictures, open_pictures, stored_statistics
from launch.evaluation.statistics import Part, Statistics, compute
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import atomic_file, remove_folder
from vavae_jax.metrics.distribution import Gaussian

CLASS = "class"  # the column of what a classifier finds each picture to be
MOST_KEPT = 100_000  # pictures a side of which precision and recall are computed, on the host


@dataclasses.dataclass
class Reference:
  """Real pictures, or what was computed of them before."""

  about: dict[str, Any]  # what they are, for a JSON file
  # Of their features "pool" and, of Inception, "spatial"; of several processes only the first has
  # them, and `features`.
  gaussians: dict[str, Gaussian]
  count: int | None = None  # of pictures, where the file of the statistics notes it
  features: np.ndarray | None = None  # [N,F]
  size: int | None = None  # of the pictures, as `PictureSet.size`; None: nobody noted it
  pictures: PictureSet | None = None

  @property
  def gaussian(self) -> Gaussian:
    """Of their features."""
    return self.gaussians["pool"]

  @property
  def spatial(self) -> Gaussian | None:
    """Of sFID's features."""
    return self.gaussians.get("spatial")


def feature_options() -> dict[str, str]:
  """Compiler options for feature networks."""
  # XLA's newer kernels for a CPU take 1.5 times as long for Inception's convolutions.
  return {"xla_cpu_experimental_ynn_fusion_type": ""} if jax.default_backend() == "cpu" else {}


@functools.cache
def compiled(network: Network, keep: bool) -> Callable[[Any, dict[str, jax.Array]], Part]:
  """A jitted function for `compute`, which keeps the features "pool" as a column if `keep`.

  A classifier's `CLASS` [B] is one, too.
  """

  @functools.partial(jax.jit, compiler_options=feature_options())
  def run(params: Any, batch: dict[str, jax.Array]) -> Part:
    found = dict(network.apply(params, batch["image"]))
    columns = {"pool": found["pool"]} if keep else {}
    for before in ("", SECOND):
      if before + "scores" in found:
        columns[before + CLASS] = found.pop(before + "scores").argmax(-1)
    return Part(
      {k: x for k, x in found.items() if k != "probabilities"}, found.get("probabilities"), columns
    )

  return run


def statistics_of(
  pictures: PictureSet,
  network: Network,
  name: str,
  *,
  keep: bool = False,
  progress: Path | None = None,
) -> Statistics:
  """Moments "pool" and, of Inception, "spatial" and probabilities; see `compiled` and `compute`.

  Raises:
    InputError: fewer than two pictures.
  """
  if len(pictures) < 2:
    raise InputError(f"There are {len(pictures)} pictures ({name}); a covariance needs at least 2.")
  return compute(
    pictures,
    compiled(network, keep),
    network.params,
    name=name,
    about=[network.about, keep],
    progress=progress,
  )


def gaussian_of(statistics: Statistics, name: str = "pool") -> Gaussian:
  """The Gaussian of one of the features; InputError where they have none."""
  moments = statistics.moments[name]
  try:
    return Gaussian(moments.mean, moments.cov)
  except ValueError as error:
    raise InputError(f"The features {name} have no Gaussian: {error}") from error


def store(pictures: PictureSet, network: Network, path: Path) -> bool:
  """Writes an npz of pictures' statistics, which `open_reference` reads; by all processes together.

  False if it is there already; InputError if `path` holds something else.
  """
  about = _about_of(pictures, network)

  def there() -> bool:
    if not path.exists():
      return False
    if str(stored_statistics(str(path)).get("about")) != about:
      raise InputError(f"{path} holds something else; give --output the name of a new file.")
    return True

  if processes.first_does(there):
    return False
  progress = path.with_suffix(".progress")
  found = statistics_of(pictures, network, "reference", progress=progress)
  if not jax.process_index():
    _write(found, about, pictures.size, path)
    remove_folder(progress)
  return True


def kept_gaussian(pictures: PictureSet, network: Network, path: Path) -> Gaussian | None:
  """The Gaussian of pictures' features "pool", in the first process; in the others None.

  It is computed where the npz `path`, which the first process alone needs to see, has not the same
  pictures and network.
  """
  about = _about_of(pictures, network)

  def there() -> bool:
    try:
      return str(stored_statistics(str(path)).get("about")) == about
    except InputError as error:
      console.say(f"{error} It is made again.")
      return False

  if not processes.first_does(there):
    found = statistics_of(pictures, network, "reference")
    if not jax.process_index():
      gaussian_of(found)  # which may be impossible
      _write(found, about, pictures.size, path)
  if jax.process_index():
    return None
  stored = stored_statistics(str(path))
  return Gaussian(stored["mu"], stored["sigma"])


def _about_of(pictures: PictureSet, network: Network) -> str:
  """What statistics depend on, as an npz of them notes it."""
  return json.dumps({"network": network.about, "pictures": pictures.about})


def _write(found: Statistics, about: str, size: int, path: Path) -> None:
  arrays: dict[str, Any] = {"about": np.array(about), "size": np.array(size)}
  for name, ending in (("pool", ""), ("spatial", "_s")):
    if name in found.moments:
      arrays[f"mu{ending}"] = found.moments[name].mean
      arrays[f"sigma{ending}"] = found.moments[name].cov
  with atomic_file(path) as file:
    np.savez(file, **arrays)


def check_sizes(samples: int | None, real: int | None, network: Network) -> str:
  """What the network does to samples and real pictures of two sizes; "" if they have one.

  A size is `PictureSet.size`, or None where it is not known, which fits any. InputError where they
  do not compare.
  """
  if samples == real or None in (samples, real):
    return ""
  told = (f"of {size} px" if size else "that are no squares" for size in (samples, real))
  sizes = "samples {} and a reference {}, which".format(*told)
  if network.distance != "FID":
    raise InputError(f"Given are {sizes} {network.protocol} does not resize.")
  return f"{sizes} {network.protocol} both resizes to 299"


def reference_of(
  pictures: PictureSet, network: Network, *, keep: bool = False, progress: Path | None = None
) -> Reference:
  """Pictures as a reference, whose features are kept if `keep` and there are not too many."""
  keep = keep and len(pictures) <= MOST_KEPT
  found = statistics_of(pictures, network, "reference", keep=keep, progress=progress)
  features = found.column("pool") if found.has("pool") else None
  gaussians = {name: gaussian_of(found, name) for name in found.moments}
  count, size = len(pictures), pictures.size
  return Reference(pictures.about, gaussians, count, features, size, pictures)


def open_reference(
  spec: str,
  network: Network,
  *,
  size: int | None = None,
  image_size: int = 0,
  tokenizer: str = "",
  keep: bool = False,
  progress: Path | None = None,
) -> Reference:
  """Real pictures for samples of a size, as for `check_sizes`, their statistics stored or computed
  now; with `keep` the features, too.

  `spec` is an npz with mu and sigma, as ADM, pytorch-fid and `launch.evaluate statistics` write it,
  or pictures, as `open_pictures` takes them with `image_size` and `tokenizer`.

  Raises:
    InputError: the statistics are of another network or protocol, or of a size that does not
      compare, or there is nothing usable.
  """
  stored = stored_statistics(spec)
  if not stored:
    pictures = open_pictures(spec, image_size=image_size or size or 0, tokenizer=tokenizer)
    check_sizes(size, pictures.size, network)
    return reference_of(pictures, network, keep=keep, progress=progress)
  reference = _of_stored(stored, spec, network)
  if has_pictures(spec):
    reference.pictures = open_pictures(spec)
    reference.size = reference.pictures.size
  check_sizes(size, reference.size, network)
  if keep and reference.pictures is not None and len(reference.pictures) <= MOST_KEPT:
    found = statistics_of(reference.pictures, network, "reference", keep=True, progress=progress)
    reference.features = found.column("pool") if found.has("pool") else None
  return reference


def _of_stored(stored: dict[str, np.ndarray], spec: str, network: Network) -> Reference:
  """A reference from the arrays of the file `spec`."""
  sizes = network.sizes
  for name, what in (("mu", "pool"), ("mu_s", "spatial")):
    if name in stored and what in sizes and stored[name].shape != (sizes[what],):
      raise InputError(
        f"{spec} has a mean {name} of shape {stored[name].shape}, but the features of "
        f"{network.protocol} are {sizes[what]}: it is of another network."
      )
  own = {name: network.about[name] for name in ("protocol", "weights_sha256")}
  try:
    about = json.loads(str(stored["about"])) if "about" in stored else {}
    size = int(stored["size"]) if "size" in stored else None
    same = not about or own.items() <= about["network"].items()
  except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
    raise InputError(f"{spec} does not say what it is of ({error}); make it again.") from error
  if not same:
    raise InputError(
      f"{spec} was computed by {json.dumps(about['network'])}; now it is "
      f"{json.dumps(network.about)}."
    )
  try:
    gaussians = {"pool": Gaussian(stored["mu"], stored["sigma"])}
    if "mu_s" in stored and "spatial" in sizes:
      gaussians["spatial"] = Gaussian(stored["mu_s"], stored["sigma_s"])
  except (ValueError, KeyError) as error:
    raise InputError(f"The statistics in {spec} are not mean and covariance: {error}") from error
  pictures = about.get("pictures") or {
    "kind": "statistics",
    "note": "their protocol is not noted in the file",
    "mu_sum": float(stored["mu"].sum()),
  }
  return Reference(pictures, gaussians, pictures.get("pictures"), size=size)
