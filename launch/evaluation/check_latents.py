"""Verifies that a latent store holds what it says: `launch.encode --check=STORE`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from launch.engine import console
from launch.report import plots
from lightningdit_jax.store import latents
from lightningdit_jax.store.shards import LABELS, Shard
from vavae_jax.common.errors import InputError
from vavae_jax.data.order import spread

SHOWN_RECORDS = 2_000
BINS = 120


def check(path: Path) -> None:
  """Reads every shard of a store, prints a summary, draws a picture beside the store.

  Raises:
    InputError: something is wrong; all of it is listed.
  """
  path = path.resolve()
  files = latents.shard_files(path)
  if not files:
    raise InputError(
      f"{path} holds no latent shards; give a folder that python -m launch.encode wrote."
    )
  problems, classes = [], 0
  try:
    store = latents.LatentStore(path)
    classes = len(store.manifest.get("class_names", ()))
  except InputError as error:
    problems.append(str(error))
  with console.Bar("check", len(files)) as bar:
    for done, file in enumerate(files, 1):
      try:
        problems += [f"{file.name} {problem}" for problem in _problems(Shard(file), classes)]
      except InputError as error:
        problems.append(str(error))
      bar.update(done)
  if problems:
    raise InputError(
      f"{path} is not sound: {'; '.join(x.rstrip('.') for x in problems[:20])}"
      f"{' and more' if len(problems) > 20 else ''}. Delete the shards that are named and run the "
      "same python -m launch.encode again."
    )
  labels, counts = np.unique(store.labels, return_counts=True)
  picture = path.with_name(f"{path.name}_check.png")
  values = _draw(store, picture)
  rows = [
    ("records", f"{len(store):,} in {len(files)} shards"),
    ("left out", str(len(store.manifest.get("skipped", ())))),
    ("latents", f"{store.shape[0]} x {store.shape[1]}, {store.shape[2]} channels"),
    ("labels", f"{labels[0]} to {labels[-1]}, {counts.min():,} to {counts.max():,} records each"),
    (
      "normalised",
      f"mean {values.mean():.4f}, std {values.std():.4f}, |x| <= {abs(values).max():.1f}",
    ),
    ("checksums", "all agree" if "shards" in store.manifest else "none noted"),
    ("picture", str(picture)),
  ]
  console.table(f"{path} is sound", ("what", "value"), rows)


def _problems(shard: Shard, classes: int) -> Iterator[str]:
  """The problems of one shard; `classes` is 0 where their number is unknown."""
  for name, tensor in shard.tensors.items():
    if name == LABELS:
      continue
    pieces = (tensor[i : i + 256] for i in range(0, len(tensor), 256))
    bad = sum(int((~np.isfinite(piece.astype(np.float32))).sum()) for piece in pieces)
    if bad:
      yield f"has {bad} numbers in {name} that are not finite"
  if len(shard) and int(shard.labels.min()) < 0:
    yield f"has label {int(shard.labels.min())}"
  if classes and int(shard.labels.max(initial=0)) >= classes:
    yield f"has label {int(shard.labels.max())} of {classes} classes"
  if shard.note and shard.note.sha256 != shard.compute_sha256():
    yield "does not hold what was written: its checksum differs"
  elif shard.note:
    noted, found = shard.note.moments, shard.compute_moments()
    pairs = ((noted.count, found.count), (noted.mean, found.mean), (noted.m2, found.m2))
    if not all(np.allclose(a, b, rtol=1e-6) for a, b in pairs):
      yield "has other means and deviations than it notes"


def _draw(store: latents.LatentStore, path: Path) -> np.ndarray:
  """Draws what normalised latents and labels look like; returns the latents."""
  chosen = spread(len(store), SHOWN_RECORDS)
  values = np.empty((len(chosen), *store.shape), np.float32)
  store.read(chosen, np.zeros(len(chosen), bool), out=values, mean=store.mean, scale=1 / store.std)
  figure, ((left, middle, right),) = plots.panels(1, 3, size=(11, 3.6))
  edges = np.linspace(-5, 5, BINS)
  left.hist(values.ravel(), edges, density=True, color="tab:blue")
  left.plot(edges, np.exp(-(edges**2) / 2) / np.sqrt(2 * np.pi), color="black", linewidth=0.8)
  left.set(title="normalised latents", xlabel="line: standard normal")
  left.set(yscale="log", ylim=(1e-5, 1))
  middle.bar(np.arange(len(store.std)), store.std, color="tab:blue")
  middle.set(title="standard deviation of each channel", xlabel="channel")
  right.bar(*np.unique(store.labels, return_counts=True), width=1.0, color="tab:blue")
  right.set(title="records of each label", xlabel="label")
  right.xaxis.get_major_locator().set_params(integer=True)
  plots.save(figure, path, dpi=110)
  return values
