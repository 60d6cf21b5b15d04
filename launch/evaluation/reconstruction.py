"""Pictures through a tokenizer and back: rFID, PSNR, SSIM, LPIPS."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch import restore
from launch.evaluation import figures
from launch.evaluation.features import Network
from launch.evaluation.figures import Rebuilt, rank_warnings
from launch.evaluation.output import Output
from launch.evaluation.pictures import PictureSet, take
from launch.evaluation.sample_files import contact_sheet
from launch.evaluation.statistics import Part, compute
from launch.report.html import Section, picture_pairs
from vavae_jax.common import functional, mesh
from vavae_jax.common.batches import as_fits
from vavae_jax.common.errors import InputError
from vavae_jax.data import images
from vavae_jax.metrics import pixels
from vavae_jax.perceptual import Lpips

POSTERIORS = ("sample", "mode")
SHOWN = 8


def evaluate(
  tokenizer: restore.Trained,
  pictures: PictureSet,
  network: Network | None,
  output: Output,
  *,
  posterior: str = "sample",
  seed: int = 0,
  lpips: Lpips | None = None,
) -> dict[str, float]:
  """All figures of a tokenizer's reconstructions, with JSON, picture and page.

  Of several processes the first has the figures and writes.

  Args:
    pictures: of the tokenizer's size, or of another multiple of its cells.
    network: in whose features reconstructions and pictures are compared; None: no rFID.
    posterior: "sample", as the reference's protocol has it, or "mode".
    seed: of the posterior's noise, drawn for each picture by its place.

  Raises:
    InputError: pictures that the tokenizer cannot take, or too few.
  """
  least = 2 if network else 1
  if len(pictures) < least:
    raise InputError(f"There are {len(pictures)} pictures; at least {least} are needed.")
  run, params = _compiled(tokenizer, network, lpips, posterior, seed)
  about = {
    "tokenizer": {"step": tokenizer.step, "sha256": tokenizer.sha256},
    "posterior": posterior,
    "seed": seed,
    "network": network.about if network else None,
    "lpips": functional.fingerprint(nnx.to_pure_dict(nnx.state(lpips))) if lpips else None,
  }
  found = compute(
    pictures,
    lambda params, batch: run(params, batch)[0],
    params,
    name="pictures",
    about=about,
    progress=output.progress,
  )
  if jax.process_index():
    return {}
  psnr_N = found.column("psnr")
  if (broken := np.isnan(psnr_N)).any():
    raise InputError(
      f"The tokenizer rebuilds {broken.sum()} of {len(psnr_N)} pictures as NaN; the first is "
      f"number {broken.argmax()}."
    )
  gathered = Rebuilt(found, network)
  values = figures.compute("reconstruction", gathered)
  order, middle = np.argsort(psnr_N), max(len(psnr_N) // 2 - SHOWN // 2, 0)
  chosen = {"Worst": order[:SHOWN], "Median": order[middle : middle + SHOWN]}
  pairs = {name: _rebuild(pictures, run, params, indices) for name, indices in chosen.items()}
  output.write(
    {
      "figures": values,
      **_more(psnr_N, gathered),
      "pictures": pictures.about,
      **about,
      "protocol": "PSNR of 8-bit pictures; SSIM (borders mirrored, as torchmetrics 1.9 has it) and "
      "LPIPS of unrounded ones; each averaged over pictures",
    },
    title=f"Reconstruction: {values.get('psnr', np.inf):.2f} dB",
    summary=f"{len(psnr_N)} pictures through the tokenizer and back.",
    figures=figures.shown(
      "reconstruction", values, network, f"{len(psnr_N)} pictures, posterior's {posterior}"
    ),
    sections=[
      Section(
        name,
        f"{name} by PSNR: {', '.join(f'{psnr_N[i]:.1f}' for i in chosen[name])} dB. Left the "
        "original, right its reconstruction.",
        [picture_pairs(*pair, ("original", "reconstruction"))],
      )
      for name, pair in pairs.items()
    ],
    picture=contact_sheet(
      np.concatenate([side for pair in pairs.values() for side in pair]), len(psnr_N[:SHOWN])
    ),
  )
  return values


def _more(psnr_N: np.ndarray, gathered: Rebuilt) -> dict[str, Any]:
  """What the JSON file says beside the figures."""
  exact = int(np.isinf(psnr_N).sum())
  more: dict[str, Any] = {"exact": exact, "warnings": []}
  if exact:
    more["warnings"].append(f"{exact} pictures are rebuilt exactly and are not in PSNR's mean")
  if gathered.network and gathered.distance:
    more["negative_eigenvalue"] = gathered.distance.negative
    more["warnings"] += rank_warnings({"pictures": len(psnr_N)}, gathered.network)
  if not gathered.statistics.has("lpips"):
    more["warnings"].append("no LPIPS, whose weights were not given")
  return more


def _compiled(
  tokenizer: restore.Trained,
  network: Network | None,
  lpips: Lpips | None,
  posterior: str,
  seed: int,
) -> tuple[Any, Any]:
  """(a jitted function to a `Part` and the reconstructions, its parameters)."""
  tokenizer = tokenizer.on(mesh.local_mesh())
  judge, judged = nnx.split(lpips) if lpips else (None, None)
  params = {
    "tokenizer": tokenizer.params,
    "network": network.params if network else None,
    "lpips": judged,
  }

  @jax.jit
  def run(params: Any, batch: dict[str, jax.Array]) -> tuple[Part, jax.Array]:
    model = restore.autoencoder(tokenizer.config, params["tokenizer"])
    image = images.to_float(batch["image"])
    encoded = model.encode(image)
    z = encoded.mode()
    if posterior == "sample":

      def one(index: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), index)
        return jax.random.normal(key, z.shape[1:])

      z = encoded.sample(jax.vmap(one)(batch["index"]))
    decoded = model.decode(z).astype(jnp.float32)
    rebuilt = images.to_uint8(decoded)
    columns = {"psnr": pixels.psnr(image, decoded), "ssim": pixels.ssim(image, decoded)}
    if judge is not None:
      columns["lpips"] = nnx.merge(judge, params["lpips"])(image, decoded)
    moments = {}
    if network:
      for name, picture in (("original", batch["image"]), ("rebuilt", rebuilt)):
        moments[name] = network.apply(params["network"], picture)["pool"]
    return Part(moments, None, columns), rebuilt

  return run, params


def _rebuild(
  pictures: PictureSet, run: Any, params: Any, indices: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Some pictures and their reconstructions, uint8 [n,H,W,3] each."""
  original = take(pictures, indices.tolist())
  batch = {"image": original, "index": indices.astype(np.int32)}
  return original, np.asarray(run(params, batch)[1])


def reconstruct(
  tokenizer: restore.Trained, image_BHWC: np.ndarray, batch_size: int = 64
) -> np.ndarray:
  """uint8 pictures through the autoencoder and back, by the posterior's mode."""

  @jax.jit
  def run(params: Any, batch: jax.Array) -> jax.Array:
    model = restore.autoencoder(tokenizer.config, params)
    return model.decode_uint8(model.encode(images.to_float(batch)).mode())

  devices = mesh.local_mesh()
  rebuild = functools.partial(run, tokenizer.on(devices).params)
  return as_fits(rebuild, image_BHWC, batch_size, devices)
