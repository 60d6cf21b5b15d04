"""A few pictures through all that a number is made with: what does not belong together shows.

The pictures are those in FID's reference, of which it also has the mean feature: spread evenly over
the file. For rFID they are of the validation set. Limits are wide, since no published file has been
here yet: they tell other files, not small faults.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import restore
from launch.evaluation.pictures import FromSource, stored_statistics, take
from launch.evaluation.reconstruction import reconstruct
from launch.evaluation.sample_files import Npz
from launch.reproduce.checked import Checked
from launch.reproduce.records import Record
from lightningdit_jax import training, transport
from lightningdit_jax.store.latents import LatentStore, Scaled, normalise, statistics
from vavae_jax.data import images
from vavae_jax.data.order import spread
from vavae_jax.metrics import pixels

COUNT, AT_ONCE = 64, 8  # pictures
SHIFT = 0.3  # of a channel's mean by its deviation, and of the deviation's logarithm
FEATURES = 4.0  # times the variance that a mean of so few pictures has
LOSS = 1.5  # times the last one of the published log
DECIBELS = 3.0
LEAST_DECIBELS = 20.0  # where no PSNR is published; of the published ones 25.29 is the least


def _run(function: Callable[..., Any], params: Any, *arrays: np.ndarray) -> np.ndarray:
  """A function of parameters and a batch, of few rows at a time."""
  run = jax.jit(function)
  starts = range(0, len(arrays[0]), AT_ONCE)
  batches = ((x[i : i + AT_ONCE] for x in arrays) for i in starts)
  return np.concatenate([np.asarray(run(params, *batch)) for batch in batches])


def compare_moments(
  checked: Checked, cause: str, what: str, z_BhwZ: np.ndarray, of: Scaled
) -> None:
  """Latents must have the mean and deviation by which they are normalised."""
  mean, std = z_BhwZ.mean((0, 1, 2)), z_BhwZ.std((0, 1, 2))
  shift = float(np.mean(np.abs(mean - of.mean) / of.std))
  scale = float(np.mean(np.abs(np.log(np.maximum(std, 1e-9) / of.std))))
  wrong = max(shift, scale) > SHIFT
  text = f"they are of others, or normalised already; at most {SHIFT} is expected" if wrong else ""
  found = f"means off by {shift:.2f} deviations, deviations by a factor of {np.exp(scale):.2f}"
  checked.tell(cause, what, found, text)


def stored(checked: Checked, store: LatentStore) -> None:
  """Latents by their own statistics."""
  index = spread(len(store), COUNT)
  z_BhwZ = np.empty((len(index), *store.shape), np.float32)
  store.read(index, np.zeros(len(index), bool), out=z_BhwZ)
  compare_moments(checked, "latents", "latents by their statistics", z_BhwZ, store)


def of_source(spec: str, tokenizer: restore.Trained) -> np.ndarray:
  """Some pictures of a source as the tokenizer takes them, uint8 [B, H, W, 3]."""
  pictures = FromSource(spec, tokenizer.config.data.image_size, crop="resize", limit=COUNT)
  return pictures.read(0, len(pictures))


def rebuilt(
  checked: Checked, tokenizer: restore.Trained, image_BHWC: np.ndarray, published: float
) -> None:
  """PSNR of pictures beside the published one, of which 0 says that there is none."""
  again = reconstruct(tokenizer, image_BHWC, AT_ONCE)
  both = (jnp.asarray(images.to_float(x)) for x in (image_BHWC, again))
  value, wrong = float(np.mean(pixels.psnr(*both))), ""
  if published and abs(value - published) > DECIBELS:
    wrong = f"{published} dB are published"
  elif not published and value < LEAST_DECIBELS:
    wrong = f"{LEAST_DECIBELS} dB at least are expected"
  checked.tell("tokenizer", f"PSNR of {len(image_BHWC)} pictures", f"{value:.2f} dB", wrong)


def together(
  checked: Checked, tokenizer: restore.Trained, space: Scaled | None, record: Record
) -> None:
  """The reference's pictures in the network, and there and back through the tokenizer; where there
  is a latent space, as its latents; where there are a model and a log, in the model's loss.
  """
  npz, network, known = Npz(Path(checked.reference)), checked.network, checked.reference
  picture_BHWC, stated = take(npz, spread(len(npz), COUNT).tolist()), stored_statistics(known)
  pool_BF = _run(lambda params, x: network.apply(params, x)["pool"], network.params, picture_BHWC)
  if len(stated.get("mu", ())) == pool_BF.shape[1]:  # else their shapes were told
    variance = np.trace(stated["sigma"]) / len(pool_BF)
    ratio = float(np.square(pool_BF.mean(0) - stated["mu"]).sum() / variance)
    wrong = "the statistics are of another network or other pictures" if ratio > FEATURES else ""
    found = f"off by {ratio:.2f} of the variance that is expected"
    checked.tell("inception", f"mean feature of {len(pool_BF)} pictures", found, wrong)
  rebuilt(checked, tokenizer, picture_BHWC, record.tokenizer.psnr)
  if space is None:
    return

  def encode(params: Any, x_BHWC: jax.Array) -> jax.Array:
    return restore.autoencoder(tokenizer.config, params).encode(images.to_float(x_BHWC)).mean

  z_BhwZ = _run(encode, tokenizer.params, picture_BHWC)
  compare_moments(checked, "tokenizer", "latents of these pictures", z_BhwZ, space)
  if checked.diffusion and record.log:
    loss, last = _loss(checked.diffusion, z_BhwZ, space), [*record.log.values()][-1]
    wrong = f"the published log ends with {last}" if loss > LOSS * last else ""
    checked.tell("model", "mean squared error of these", f"{loss:.4f}", wrong)


def _loss(model: restore.Trained, z_BhwZ: np.ndarray, space: Scaled) -> float:
  """The mean squared error of latents without their labels, of eight times and noises each."""
  config, draw = model.config, np.random.default_rng(0)
  mean, std = statistics(space, latent_norm=config.latents.latent_norm)
  z_BhwZ = normalise(z_BhwZ, mean, std, config.latents.latent_multiplier)
  t_B = np.asarray(transport.sample_time(jax.random.key(0), len(z_BhwZ), use_lognorm=True))
  noise = draw.standard_normal(z_BhwZ.shape, np.float32)
  label_B = np.full(len(z_BhwZ), config.model.num_classes, np.int32)

  def run(params: Any, *batch: jax.Array) -> jax.Array:
    return training.losses(config, params, *batch)["mse"]

  return float(_run(run, model.params, z_BhwZ.astype(np.float32), noise, t_B, label_B).mean())
