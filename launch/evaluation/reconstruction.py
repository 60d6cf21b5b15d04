"""Pictures through a tokenizer and back: rFID, PSNR, SSIM, LPIPS."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from launch import restore
from launch.engine import console, mesh
from launch.evaluation.features import Network
from launch.evaluation.generation import gaussian_of, key_of, rank_warnings
from launch.evaluation.output import Output
from launch.evaluation.pictures import PictureSet, take
from launch.evaluation.sample_files import contact_sheet
from launch.evaluation.statistics import Part, compute
from launch.report.html import Figure, Section, details, figures_table, picture_pairs
from vavae_jax.common import functional
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

  Args:
    tokenizer: from `trained.load`.
    pictures: of its size, or another multiple of its cells.
    network: in whose features reconstructions and pictures are compared; None: in none.
    output: where to.
    posterior: "sample", as the reference's protocol has it, or "mode".
    seed: of the posterior's noise, drawn for each picture by its place.
    lpips: the distance, or None.

  Returns:
    The figures.

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
  psnr_N = found.column("psnr")
  if np.isnan(psnr_N).any():
    raise InputError(
      f"The tokenizer rebuilds {np.isnan(psnr_N).sum()} of {len(psnr_N)} pictures as NaN; the "
      f"first is number {np.isnan(psnr_N).argmax()}."
    )
  exact = int(np.isinf(psnr_N).sum())  # of which PSNR is infinite
  finite = {name: x[np.isfinite(x)] for name in found.columns for x in [found.column(name)]}
  figures = {name: float(x.mean(dtype=np.float64)) for name, x in finite.items() if len(x)}
  more: dict[str, Any] = {"exact": exact, "warnings": []}
  if exact:
    more["warnings"].append(f"{exact} pictures are rebuilt exactly and are not in PSNR's mean")
  note = f"{len(psnr_N)} pictures, posterior's {posterior}"
  units = {"psnr": ("PSNR", "dB", "higher"), "ssim": ("SSIM", "", "higher")}
  units["lpips"] = ("LPIPS", "", "lower")
  shown = [
    Figure(units[n][0], value, units[n][1], note, units[n][2]) for n, value in figures.items()
  ]
  if network:
    rebuilt = found.moments["rebuilt"]
    distance = gaussian_of(found, "original").distance(rebuilt.mean, rebuilt.cov)
    figures[f"r{key_of(network)}"] = distance.distance
    more["negative_eigenvalue"] = distance.negative
    more["warnings"] += rank_warnings({"pictures": len(psnr_N)}, network)
    shown.insert(0, Figure(f"r{network.distance}", distance.distance, "", note, "lower"))
  if lpips is None:
    more["warnings"].append("no LPIPS, whose weights were not given")
  for warning in more["warnings"]:
    console.say(f"note: {warning}")
  order = np.argsort(psnr_N)
  middle = max(len(order) // 2 - SHOWN // 2, 0)
  chosen = {"Worst": order[:SHOWN], "Median": order[middle : middle + SHOWN]}
  pairs = {name: _rebuild(pictures, run, params, indices) for name, indices in chosen.items()}
  result = {
    "figures": figures,
    **more,
    "pictures": pictures.about,
    **about,
    "protocol": "PSNR of 8-bit pictures; SSIM (borders mirrored, as torchmetrics 1.9 has it) and "
    "LPIPS of unrounded ones; each averaged over pictures",
  }
  sections = [
    Section(
      name,
      f"{name} by PSNR: {', '.join(f'{psnr_N[i]:.1f}' for i in chosen[name])} dB. Left the "
      "original, right its reconstruction.",
      [picture_pairs(*pairs[name], ("original", "reconstruction"))],
    )
    for name in chosen
  ]
  sections.append(Section("Figures", "", [figures_table(shown, more["warnings"])]))
  sections.append(Section("Protocol", "", [details("JSON", json.dumps(result, indent=2))]))
  rows = [picture for pair in pairs.values() for picture in pair]
  output.write(
    result,
    title=f"Reconstruction: {figures.get('psnr', np.inf):.2f} dB",
    summary=f"{len(psnr_N)} pictures through the tokenizer and back.",
    figures=shown,
    sections=sections,
    picture=contact_sheet(np.concatenate(rows), len(rows[0])),
  )
  output.show(shown)
  return figures


def _compiled(
  tokenizer: restore.Trained,
  network: Network | None,
  lpips: Lpips | None,
  posterior: str,
  seed: int,
) -> tuple[Any, Any]:
  """(a jitted function to what is computed and the pictures rebuilt, its parameters)."""
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
  """Some pictures and what becomes of them, uint8 [n,H,W,3] each."""
  original = take(pictures, indices.tolist())
  batch = {"image": original, "index": indices.astype(np.int32)}
  return original, np.asarray(run(params, batch)[1])
