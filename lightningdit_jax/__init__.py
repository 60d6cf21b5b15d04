"""LightningDiT in JAX and Flax: latent -> velocity -> latent; shape letters as in `vavae_jax`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from lightningdit_jax.pipeline import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:
  if name != "Pipeline":
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  from lightningdit_jax.pipeline import Pipeline  # with all its networks, which few modules need

  return Pipeline
