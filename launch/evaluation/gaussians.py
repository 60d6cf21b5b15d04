"""Samples of one Gaussian for each class of a latent space: fitted and not trained, as a control.

A diffusion model that samples no better has learnt no more than means and covariances.
"""

from __future__ import annotations

import numpy as np

from launch import restore
from launch.engine import console
from launch.evaluation.pictures import decoder_of, side_of
from lightningdit_jax.store.latents import LatentStore
from lightningdit_jax.store.space import Space, labels_for
from vavae_jax.common.errors import InputError

_WEIGHTS, _NOISE = range(2)  # random streams


class Gaussians:
  """Pictures that a tokenizer makes of draws from the Gaussian of each class: a `PictureSet`.

  A Gaussian has the mean and the unbiased covariance of all h w Z numbers of a latent, over the
  class's pictures and their mirror images. A draw is the mean and a sum of the n centred latents,
  weighted by standard normal numbers / sqrt(n - 1): it has exactly that covariance, whatever its
  rank, without a factor of it. Nothing is regularised: where n is at most h w Z, draws stay in the
  span of the latents. Draw i is a function of the seed, i and its label, but for rounding.

  Attributes:
    latents: the draws, float32 [N, h, w, Z].
  """

  def __init__(
    self,
    store: LatentStore,
    tokenizer: restore.Trained,
    *,
    count: int,
    labels: str | np.ndarray,
    seed: int,
  ):
    """`labels` is as for `labels_for`, or has one for each of `count` draws.

    InputError where the latents have no classes, or one of those wanted has fewer than two.
    """
    known = np.bincount(store.labels) if len(store) else np.zeros(0, int)
    if len(known) < 2:
      raise InputError(
        f"{store.path} has latents of {len(known)} classes; a Gaussian for each needs two or more."
      )
    names = list(Space.of(store).class_names)
    self._labels = np.asarray(labels)
    if isinstance(labels, str):
      self._labels = labels_for(labels, count, len(names) or len(known), seed, names)
    known = np.pad(known, (0, max(len(names) - len(known), 0)))
    wanted = np.unique(self._labels)
    least = int(wanted[known[wanted].argmin()])
    if known[least] < 2:
      called = names[least] if names else least
      raise InputError(
        f"{store.path} has {known[least]} latents of the class {called}, and a covariance needs "
        "two: leave the class out of --labels."
      )
    numbers = int(np.prod(store.shape))
    if 2 * known[least] <= numbers:
      console.say(
        f"note: a class has {2 * known[least]} latents, mirrored ones among them, and a latent has "
        f"{numbers} numbers: its Gaussian's draws stay in the span of these latents"
      )
    self.size, self.classes = side_of(tokenizer, store), (self._labels, names)
    self.latents = _drawn(store, self._labels, seed)
    self._decode = decoder_of(tokenizer)
    self.about = {
      "kind": "gaussians",
      "latents": store.sha256,
      "fewest_of_a_class": 2 * int(known[least]),
      "numbers": numbers,
      "tokenizer": tokenizer.sha256,
      "pictures": count,
      "labels": labels if isinstance(labels, str) else labels.tolist(),
      "seed": seed,
    }

  def __len__(self) -> int:
    return len(self._labels)

  def read(self, start: int, stop: int) -> np.ndarray:
    return self._decode(self.latents[start:stop])


def _drawn(store: LatentStore, labels: np.ndarray, seed: int) -> np.ndarray:
  """A latent for each label, float32 [N, h, w, Z]."""
  drawn = np.empty((len(labels), int(np.prod(store.shape))), np.float32)
  for label in np.unique(labels):
    x_nD = _latents_of(store, int(label), seed)
    mean_D = x_nD.mean(0, dtype=np.float64)
    centred_nD = (x_nD - mean_D).astype(np.float32)
    rows = np.flatnonzero(labels == label)
    generators = [np.random.default_rng((seed, _WEIGHTS, int(row))) for row in rows]
    weights_Nn = np.stack([draw.standard_normal(len(x_nD), np.float32) for draw in generators])
    drawn[rows] = mean_D + weights_Nn @ centred_nD / np.sqrt(len(x_nD) - 1)
  return drawn.reshape(len(labels), *store.shape)


def _latents_of(store: LatentStore, label: int, seed: int) -> np.ndarray:
  """The latents of a class and their mirror images, float32 [n, D]; posteriors are sampled."""
  records = np.repeat(np.flatnonzero(store.labels == label), 2)
  flips = np.arange(len(records)) % 2 == 1
  x_nhwZ = np.empty((len(records), *store.shape), np.float32)
  draw = np.random.default_rng((seed, _NOISE, label))
  height, width, channels = store.shape

  def noise(_: int) -> np.ndarray:
    return draw.standard_normal((channels, height, width), np.float32)

  store.read(records, flips, out=x_nhwZ, noise=noise if store.has_posteriors else None)
  return x_nhwZ.reshape(len(records), -1)
