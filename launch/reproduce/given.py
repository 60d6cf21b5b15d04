"""What a person gives, by the flags of `launch.reproduce`."""

from __future__ import annotations

import dataclasses
from typing import Any

from vavae_jax import folder


def _flag(text: str, default: Any = "") -> Any:
  """A field of `Given`, and its flag."""
  return dataclasses.field(default=default, metadata={"text": text})


_EITHER = f"{folder.TAKEN}, or a file of weights, also hf:OWNER/NAME/FILE; the published one if not"


@dataclasses.dataclass(frozen=True)
class Given:
  """What a person gave, by the flags of the command; "" where nothing."""

  tokenizer: str = _flag(f"The tokenizer: {_EITHER} given.")
  diffusion: str = _flag(f"The diffusion model: {_EITHER} given.")
  latents: str = _flag("Latents to train on.")
  statistics: str = _flag("Statistics of the latents, a file, or latents that have them.")
  reference: str = _flag("FID's reference, ADM's npz.")
  inception: str = _flag("FID's Inception, as pytorch-fid publishes it.")
  pictures: str = _flag("ImageNet's training pictures, any source of docs/data.md.")
  validation: str = _flag("ImageNet's validation pictures, for rFID.")
  teacher: str = _flag("The teacher's file, to train a tokenizer.")
  lpips_vgg: str = _flag("LPIPS' VGG16, config.perceptual.vgg if not given.")
  lpips_heads: str = _flag("LPIPS' heads, config.perceptual.heads if not given.")
  train: bool = _flag("Train the model, whatever weights are published.", False)
  seed: int = _flag("Of training, noise and labels.", 0)
  set: tuple[str, ...] = _flag("KEY=VALUE of a key that changes no number.", ())
  allow: tuple[str, ...] = _flag("A cause of docs/reproduce.md to go on in spite of.", ())
