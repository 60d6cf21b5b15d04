r"""Measures reconstructions of a tokenizer, or samples against real pictures.

  python -m launch.evaluate reconstruction --workdir=RUNS/tokenizer --output=RUNS/reconstruction
  python -m launch.evaluate generation --samples=RUNS/samples.npz --reference=embedded:emoji \
    --image_size=64 --output=RUNS/generation

reconstruction: PSNR and SSIM of the pictures that training left out (of all, where none were), by
the posterior's mode, with the worst and the median ones as a picture. generation: the Frechet
distance in features of EfficientNet-Lite0, FD-EfficientNet. It is not FID and compares with no
published number. Results go to OUTPUT.json, pictures to OUTPUT.png.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from PIL import Image

import vavae_jax.training
from launch import trained
from launch.engine import console, mesh
from launch.engine.batches import in_batches
from launch.sample_files import contact_sheet, read_samples
from vavae_jax import images, sources
from vavae_jax.errors import InputError
from vavae_jax.files import atomic_file, write_json
from vavae_jax.metrics import distribution, pixels
from vavae_jax.teachers import load_teacher
from vavae_jax.teachers.efficientnet import EfficientNetLite0

BATCH_SIZE = 64
SHOWN = 8
FEATURE_NETWORK = "efficientnet_lite0"


def reconstruction(tokenizer: trained.Trained, output: Path) -> dict[str, Any]:
  """PSNR and SSIM of held-out pictures; writes OUTPUT.json and OUTPUT.png.

  Args:
    tokenizer: from `trained.load`.
    output: path without suffix.

  Returns:
    What the JSON holds: {"psnr": mean in dB, "ssim": mean, "pictures": count, ...}.
  """
  original = held_out_pictures(tokenizer)
  rebuilt = trained.reconstruct(tokenizer, original, BATCH_SIZE)
  psnr, ssim = [], []
  for start in console.tracked(range(0, len(original), BATCH_SIZE), "evaluate"):
    batch = slice(start, start + BATCH_SIZE)
    a, b = (images.to_float(jnp.asarray(x[batch])) for x in (original, rebuilt))
    psnr.append(pixels.psnr(a, b))
    ssim.append(pixels.ssim(a, b))
  psnr_B = np.concatenate(psnr)
  result = {
    "psnr": float(psnr_B.mean()),
    "ssim": float(np.concatenate(ssim).mean()),
    "pictures": len(original),
    "tokenizer": {"step": tokenizer.step, "sha256": tokenizer.sha256},
    "protocol": "centre crop, posterior mode, 8-bit pictures; PSNR and SSIM averaged over pictures",
  }
  order = np.argsort(psnr_B)
  middle = max(len(order) // 2 - SHOWN // 2, 0)
  chosen = np.concatenate([order[:SHOWN], order[middle : middle + SHOWN]])
  rows = [
    x[chosen[i : i + SHOWN]] for i in range(0, len(chosen), SHOWN) for x in (original, rebuilt)
  ]
  _write(output, result, contact_sheet(np.concatenate(rows), min(SHOWN, len(original))))
  return result


def held_out_pictures(tokenizer: trained.Trained) -> np.ndarray:
  """uint8 [N, H, W, 3]: what a tokenizer's training left out, or all where it left none."""
  return vavae_jax.training.load_share(tokenizer.config.data, held_out=True)


def generation(
  samples_NHWC: np.ndarray, reference: distribution.Moments, output: Path
) -> dict[str, Any]:
  """FD-EfficientNet of samples to reference pictures; writes OUTPUT.json and OUTPUT.png.

  Args:
    samples_NHWC: uint8.
    reference: feature moments of real pictures.
    output: path without suffix.

  Returns:
    What the JSON holds: {"fd_efficientnet": ..., "samples": N, "reference": M, ...}.
  """
  result = {
    "fd_efficientnet": feature_distance(feature_moments(samples_NHWC, "samples"), reference),
    "samples": len(samples_NHWC),
    "reference": reference.count,
    "protocol": "Frechet distance of the 1,280 pooled features of EfficientNet-Lite0 at "
    f"{samples_NHWC.shape[1]} px; not FID",
  }
  _write(output, result, contact_sheet(samples_NHWC[: SHOWN * SHOWN], SHOWN))
  return result


def feature_distance(a: distribution.Moments, b: distribution.Moments) -> float:
  """Frechet distance of two sets of pictures by their feature moments."""
  return distribution.frechet_distance(a.mean, a.cov, b.mean, b.cov)


def feature_moments(pictures_NHWC: np.ndarray, name: str) -> distribution.Moments:
  """Mean and covariance of the pooled features of EfficientNet-Lite0.

  Args:
    pictures_NHWC: uint8.
    name: what they are, for the progress bar.

  Returns:
    The moments of 1,280 features.
  """
  network = cast(EfficientNetLite0, load_teacher(FEATURE_NETWORK))
  run = jax.jit(lambda image_BHWC: network.endpoints(images.to_float(image_BHWC))["pool"])
  moments = distribution.Moments()
  with console.Bar(f"features: {name}", len(pictures_NHWC)) as bar:
    for features in in_batches(run, pictures_NHWC, BATCH_SIZE, mesh.make_mesh()):
      moments.update(features)
      bar.update(moments.count)
  return moments


def _files(output: Path) -> tuple[Path, Path]:
  """Where numbers and picture go; a dot in the name, as in cfg3.5, is not a suffix."""
  return output.with_name(f"{output.name}.json"), output.with_name(f"{output.name}.png")


def _check_output(output: Path) -> None:
  """Raises InputError before any work if the results would replace a file of another kind."""
  numbers, picture = _files(output)
  for path in (numbers, picture):
    if path.exists() and not (numbers.is_file() and "protocol" in json.loads(numbers.read_text())):
      raise InputError(f"{path} exists and is no evaluation; give another --output.")


def _write(output: Path, result: dict[str, Any], picture: np.ndarray) -> None:
  numbers_path, picture_path = _files(output)
  with atomic_file(picture_path) as file:
    Image.fromarray(picture).save(file, "PNG")
  write_json(numbers_path, result)


def main(argv: list[str]) -> None:
  """The command."""
  what, output = argv[1] if len(argv) > 1 else "", Path(FLAGS.output)
  _check_output(output)
  if what == "reconstruction" and FLAGS.workdir:
    result = reconstruction(trained.load(Path(FLAGS.workdir), "tokenizer", FLAGS.step), output)
  elif what == "generation" and FLAGS.samples and FLAGS.reference:
    samples, _ = read_samples(Path(FLAGS.samples))
    source = sources.open_source(FLAGS.reference)
    size = FLAGS.image_size or samples.shape[1]
    pictures = images.load_crops(source, np.arange(len(source)), size)
    result = generation(samples, feature_moments(pictures, "reference"), output)
  else:
    raise InputError(
      f"What to evaluate is {what!r}; give reconstruction with --workdir, or generation with "
      "--samples and --reference."
    )
  rows = [(name, f"{value:.4g}") for name, value in result.items() if isinstance(value, float)]
  files = [(k, str(path)) for k, path in zip(("numbers", "picture"), _files(output), strict=True)]
  console.table(f"Evaluation: {what}", ("what", "value"), [*rows, *files])


FLAGS = flags.FLAGS

if __name__ == "__main__":
  flags.DEFINE_string("workdir", "", "The tokenizer's workdir, for reconstruction.")
  flags.DEFINE_integer("step", None, "Which checkpoint; the newest if not given.")
  flags.DEFINE_string("samples", "", "The npz of launch.sample, for generation.")
  flags.DEFINE_string("reference", "", "Real pictures, such as folder:DIR, for generation.")
  flags.DEFINE_integer("image_size", 0, "Crop of the reference; the samples' size if not given.")
  flags.DEFINE_string("output", None, "Path of the results without suffix.", required=True)
  console.run_command(main, arguments=1)
