"""Latents on disk: shards in the published layout, statistics, copies of remote ones."""
