"""The commands of VA-VAE and LightningDiT, and what they share."""

from pathlib import Path

# The names that commands had before the lab had its own room; they go with the next release.
__path__.append(str(Path(__file__).parent / "lab" / "moved"))
