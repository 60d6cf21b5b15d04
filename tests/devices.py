"""Counts the devices: python -m tests.devices."""

import jax

if __name__ == "__main__":
  print(jax.device_count())
