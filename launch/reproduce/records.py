"""The published numbers, each with everything that it depends on.

A number's recipe (`configs/`) holds model, training, sampler, grid, guidance with its interval and
channels, count and labels; its record names the recipe and what no recipe knows: files with their
addresses and hashes, the protocol, the published log. A hash that nobody has published is "", and
what is computed is shown. Sources: arXiv 2501.01423, its tables; the reference's README and logs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import ablation
from launch.evaluation.features import INCEPTION_FILE, PUBLISHED
from launch.weights.released import RELEASED
from vavae_jax.common.addresses import HUB


@dataclasses.dataclass(frozen=True)
class File:
  """Something published: hf:OWNER/NAME/FILE or a URL, "" if it is not; how its sha256 begins, ""
  where that is not publicly known.
  """

  address: str = ""
  sha256: str = ""

  @property
  def name(self) -> str:
    return self.address.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """What makes the latents: the recipe of its training, its published weights, and the PSNR that is
  published of them, 0 if none.
  """

  name: str
  recipe: str
  file: File = File()
  psnr: float = 0.0


@dataclasses.dataclass(frozen=True)
class Pictures:
  """A set of pictures, the source where it is looked for, and how many there are; how many classes
  in which order, from the first to the last, 0 where they do not matter.
  """

  name: str
  address: str
  source: str
  count: int
  classes: int = 0
  ends: tuple[str, str] = ("", "")


_ADDRESS, _ENDS = "https://www.image-net.org", ("n01440764", "n15075141")
TRAIN = Pictures("ImageNet, train", _ADDRESS, "folder:data/imagenet/train", 1_281_167, 1_000, _ENDS)
VALIDATION = Pictures("ImageNet, validation", _ADDRESS, "folder:data/imagenet/val", 50_000)
INCEPTION = File(
  f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}",
  PUBLISHED,
)
ADM = File(
  "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
  "VIRTUAL_imagenet256_labeled.npz"
)
ADM_ARRAYS = {
  "arr_0": (10_000, 256, 256, 3),
  "mu": (2048,),
  "sigma": (2048, 2048),
  "mu_s": (2023,),
  "sigma_s": (2023, 2023),
}
# Mean squared error of the published training by step, each the mean of 100 steps.
LOG = {
  100: 1.2133,
  1_000: 0.3854,
  10_000: 0.3270,
  20_000: 0.3175,
  40_000: 0.3109,
  60_000: 0.3073,
  80_000: 0.3045,
}
# (until which step, how far a loss may be from the log's). The spread of seeds is not known: these
# are tolerances.
TOLERANCE = ((1_000, 0.05), (1_000_000, 0.02))


@dataclasses.dataclass(frozen=True)
class Record:
  """One published number, with those that were published beside it.

  Attributes:
    source: where it is published.
    figures: values by their names in our JSON, that of the record's name first.
    tokenizer: whose reconstructions, or whose latents, they are of.
    recipe: of the diffusion model; "": the figures are the tokenizer's.
    changes: to the recipe, by key.
    weights, statistics: of the diffusion model and its latents.
    protocol, network: of the Frechet distance.
    reference, arrays: the npz that samples are compared with; its arrays' shapes.
    pictures, validation: for training and for rFID.
    log: the published mean squared error by step; `tolerance` is as `TOLERANCE`.
    note: what is not known, or why the number should not be expected.
  """

  what: str
  source: str
  figures: Mapping[str, float]
  tokenizer: Tokenizer
  recipe: str = ""
  changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  weights: File = File()
  statistics: File = File()
  protocol: str = "adm"
  network: File = INCEPTION
  reference: File = ADM
  arrays: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=ADM_ARRAYS.copy)
  pictures: Pictures = TRAIN
  validation: Pictures = VALIDATION
  log: Mapping[int, float] = dataclasses.field(default_factory=dict)
  tolerance: tuple[tuple[int, float], ...] = TOLERANCE
  note: str = ""

  @property
  def files(self) -> tuple[File, ...]:
    """All that are published."""
    return (self.network, self.reference, self.tokenizer.file, self.weights, self.statistics)

  @property
  def figure(self) -> tuple[str, float]:
    """Name and value of the number."""
    return next(iter(self.figures.items()))

  def allowed(self, step: int) -> float:
    """How far the loss of a step may be from the log's, as a share of that."""
    return next(share for until, share in self.tolerance if step <= until)


def _released(name: str) -> File:
  return File(HUB + RELEASED[name].file)


VAVAE = Tokenizer(
  *("VA-VAE f16d32, DINOv2, 130 epochs", "configs/vavae_f16d32.py"),
  *(_released("vavae-f16d32-dinov2"), 27.96),
)
SD_VAE = Tokenizer(
  "SD-VAE f8d4",
  "configs/vavae_f16d32.py:sd_f8d4",
  File(f"{HUB}stabilityai/sd-vae-ft-ema/diffusion_pytorch_model.safetensors"),
)
_FIGURES = ("fid", "sfid", "inception_score", "precision", "recall")
_TABLE_3: dict[str, tuple[int, bool, tuple[float, ...]]] = {  # epochs, guidance, figures
  "fid2.11": (64, True, (2.11, 4.16, 252.3, 0.81, 0.58)),
  "fid5.14": (64, False, (5.14, 4.22, 130.2, 0.76, 0.62)),
  "fid1.35": (800, True, (1.35, 4.15, 295.3, 0.79, 0.65)),
  "fid2.17": (800, False, (2.17, 4.36, 205.6, 0.77, 0.65)),
}
_TABLE_1 = (19.50, 17.20, 16.59, 16.61, 13.99, 12.52, 10.10, 9.25, 7.13, 4.29)
_NOTES = {
  "fid1.35": "A user measured 1.4537 with the released weights.",
  "table1/dit": "DiT's learnt variance and DDPM sampler are left out: 19.50 is not to be expected.",
  "table1/rope": "A user of the 64-epoch recipe's normalisation and sampler measured 8.97.",
}
# The recipe's argument; the published file, if any; rFID, PSNR, LPIPS and SSIM; gFID-10K of B, L
# and XL.
_TABLE_2: dict[str, tuple[str, str, tuple[float, ...], tuple[float, ...]]] = {
  "f16d16-plain": ("d16,plain", "ldm", (0.49, 26.10, 0.132, 0.72), (16.24, 9.49, 8.28)),
  "f16d16-mae": ("d16,mae", "", (), (16.86, 10.93, 9.19)),
  "f16d16-dinov2": ("d16,dinov2", "", (0.55, 25.29, 0.147, 0.69), (15.79, 10.02, 8.71)),
  "f16d32-plain": ("d32,plain", "ldm", (0.26, 28.59, 0.089, 0.80), (22.62, 12.86, 10.92)),
  "f16d32-mae": ("d32,mae", "vavae", (), (19.89, 11.51, 9.92)),
  "f16d32-dinov2": ("d32,dinov2", "vavae", (0.28, 27.96, 0.096, 0.79), (15.82, 9.82, 8.22)),
  "f16d64-plain": ("d64,plain", "ldm", (0.17, 31.03, 0.055, 0.88), (36.83, 20.73, 17.24)),
  "f16d64-mae": ("d64,mae", "vavae", (), (23.58, 14.40, 11.69)),
  "f16d64-dinov2": ("d64,dinov2", "vavae", (0.14, 30.71, 0.055, 0.87), (24.00, 14.95, 11.98)),
}
# Tables 4 and 5 where they have other rows: the recipe's argument, FID-10K of B after 160 epochs.
_OTHERS = {
  "table4/clip": ("clip", 18.93),
  "table4/sam": ("sam", 19.80),
  "table5/no_cos": ("no_cos", 21.87),
  "table5/no_distmat": ("no_distmat", 17.74),
  "table5/no_margin": ("no_margin", 17.77),
}


def _sampled(name: str, epochs: int, guided: bool, values: tuple[float, ...]) -> Record:
  """A row of table 3."""
  unguided = "" if guided else "Its sampler is not stated; taken is that of the guided figure."
  return Record(
    f"XL/1, {epochs} epochs, {'guided' if guided else 'not guided'}",
    "table 3",
    dict(zip(_FIGURES, values, strict=True)),
    VAVAE,
    recipe=f"configs/lightningdit_xl_{epochs}ep.py",
    changes={} if guided else {"sample.cfg_scale": 1.0},
    weights=_released(f"lightningdit-xl-{epochs}ep"),
    statistics=_released("latents-stats"),
    log=LOG,
    note=_NOTES.get(name, unguided),
  )


def _rebuilt(values: tuple[float, ...], tokenizer: Tokenizer) -> Record:
  figures = dict(zip(("rfid", "psnr", "lpips", "ssim"), values, strict=True))
  return Record(tokenizer.name, "table 2", figures, tokenizer, protocol="pytorch-fid")


def _of_10_000(table: str, size: str, value: float, tokenizer: Tokenizer, channels: int) -> Record:
  return Record(
    f"{size}/1, 10,000 samples",
    f"table {table}",
    {"fid": value},
    tokenizer,
    recipe=f"configs/lightningdit.py:{size}/1,table2",
    changes={} if channels == 32 else {"model.in_channels": channels},
  )


def _records() -> dict[str, Record]:
  found = {name: _sampled(name, *row) for name, row in _TABLE_3.items()}
  found["rfid0.28"] = _rebuilt(_TABLE_2["f16d32-dinov2"][2], VAVAE)
  for row, value in zip(ablation.ROWS, _TABLE_1, strict=True):
    of, size = (VAVAE, "XL/1") if row == "vavae" else (SD_VAE, "XL/2")
    recipe, note = f"configs/ablation.py:{row}", _NOTES.get(f"table1/{row}", "")
    known = _released("latents-stats") if of is VAVAE else File()
    found[f"table1/{row}"] = Record(
      f"{size}, 80 epochs", "table 1", {"fid": value}, of, recipe, statistics=known, note=note
    )
  found["sdvae7.13"] = found["table1/rope"]
  for name, (argument, kind, rebuilt, generated) in _TABLE_2.items():
    file = _released(f"{kind}-{name.removesuffix('-plain')}-50ep") if kind else File()
    psnr = rebuilt[1] if rebuilt else 0.0
    tokenizer = Tokenizer(name, f"configs/vavae_f16d32.py:{argument},50ep", file, psnr)
    if rebuilt:
      found[f"table2/{name}/rfid"] = _rebuilt(rebuilt, tokenizer)
    for size, value in zip(("B", "L", "XL"), generated, strict=True):
      found[f"table2/{name}/{size}"] = _of_10_000("2", size, value, tokenizer, int(name[4:6]))
  for name, (argument, value) in _OTHERS.items():
    tokenizer = Tokenizer(f"f16d32 {argument}", f"configs/vavae_f16d32.py:{argument},50ep")
    found[name] = _of_10_000(name[5], "B", value, tokenizer, 32)
  return found


RECORDS = _records()
