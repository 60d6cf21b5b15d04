"""LightningDiT in JAX and Flax: latent -> velocity -> latent; shape letters as in `vavae_jax`."""
