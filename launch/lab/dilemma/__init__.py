"""Reconstruction against generation, with and without alignment, on CIFAR-10."""
