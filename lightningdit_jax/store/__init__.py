"""Latents on disk: shards in the published layout, statistics, copies of remote ones."""

from lightningdit_jax.store.latents import LatentStore as LatentStore
