"""Draws docs/method.svg, the method in one picture: `python -m docs.draw_method`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from vavae_jax.assets import load_emoji

BLUE, GREEN, GREY = "#dbe7fb", "#dcf1df", "#ececec"
SIZE = 9.0  # of a picture or a grid of cells


def box(axes: Axes, x: float, y: float, title: str, source: str, color: str) -> None:
  """A network, with the file that it is in, around (x, y)."""
  style = "round,pad=0,rounding_size=1.2"
  axes.add_patch(FancyBboxPatch((x - 9, y - 4), 18, 8, boxstyle=style, fc=color, ec="#555555"))
  axes.text(x, y + 1.2, title, ha="center", va="center", fontsize=10, weight="bold")
  axes.text(x, y - 1.9, source, ha="center", va="center", fontsize=7, family="monospace")


def grid(axes: Axes, x: float, y: float, pixels: np.ndarray, label: str) -> None:
  """A picture or a grid of cells around (x, y), with a label below."""
  half = SIZE / 2
  axes.imshow(pixels, extent=(x - half, x + half, y - half, y + half), interpolation="nearest")
  axes.text(x, y - half - 1.6, label, ha="center", va="center", fontsize=8)


def arrow(axes: Axes, x: float, y: float, length: float, style: str = "-|>") -> None:
  """To the right from (x, y); with the style "<|-|>" downwards, and to both ends."""
  end = (x + length, y) if style == "-|>" else (x, y - length)
  line = {"arrowstyle": style, "lw": 1.4, "color": "#333333", "shrinkA": 0, "shrinkB": 0}
  axes.annotate("", end, (x, y), arrowprops=line)


def draw(path: str) -> None:
  """Three rows: the tokenizer's training, the diffusion model's, and sampling."""
  plt.rcParams.update({"svg.hashsalt": "method", "font.family": "DejaVu Sans"})
  figure, axes = plt.subplots(figsize=(11, 7.9), facecolor="white", layout="constrained")
  draws = np.random.default_rng(3)
  pictures = load_emoji()[0]
  before, after = pictures[0], pictures[40]
  latent, features, noise = (draws.uniform(0.15, 0.95, (4, 4, 3)) for _ in range(3))
  latent = 0.6 * latent + 0.4 * features

  def heading(y: float, text: str) -> None:
    axes.text(1, y, text, fontsize=11, weight="bold", va="center")

  def note(x: float, y: float, *lines: str) -> None:
    axes.text(x, y, "\n".join(lines), fontsize=8, va="center", linespacing=1.5)

  heading(70, "1  VA-VAE learns latents that resemble the features of a vision model")
  for x, y in ((13, 60), (13, 42)):
    arrow(axes, x, y, 6)
  axes.plot([7, 7, 13], [54.5 - 1.5, 42, 42], color="#333333", lw=1.4)
  grid(axes, 7, 60, before, "image")
  box(axes, 29, 60, "encoder", "autoencoder.py", BLUE)
  arrow(axes, 39, 60, 6)
  grid(axes, 51, 60, latent, "")
  axes.text(51, 66, "latent", ha="center", fontsize=8)
  arrow(axes, 57, 60, 6)
  box(axes, 73, 60, "decoder", "autoencoder.py", BLUE)
  arrow(axes, 83, 60, 6)
  grid(axes, 95, 60, before, "reconstruction")
  note(101, 60, "L1 + LPIPS", "+ GAN + KL", "update.py")
  box(axes, 29, 42, "frozen teacher", "teachers/", GREY)
  arrow(axes, 39, 42, 6)
  grid(axes, 51, 42, features, "features, such as DINOv2's")
  arrow(axes, 51, 55, 8, "<|-|>")
  note(53, 51, "alignment: marginal cosine + marginal distance matrix    losses.py")

  heading(31, "2  LightningDiT learns the way from noise to these latents")
  grid(axes, 7, 21, latent, "latent, normalised")
  axes.text(14.5, 21, "+", fontsize=16, ha="center", va="center")
  grid(axes, 22, 21, noise, "noise")
  arrow(axes, 28, 21, 11)
  note(29, 23.5, "mix at time t")
  grid(axes, 46, 21, (latent + noise) / 2, "transport.py")
  arrow(axes, 52, 21, 11)
  box(axes, 73, 21, "LightningDiT", "model.py", GREEN)
  note(53, 23.5, "+ t, class")
  arrow(axes, 83, 21, 6)
  note(90, 21, "velocity: squared error and", "direction loss against", "latent - noise")

  heading(10, "3  Sampling: from noise to a new picture")
  grid(axes, 7, -2, noise, "noise")
  arrow(axes, 13, -2, 6)
  box(axes, 29, -2, "LightningDiT", "sampling.py", GREEN)
  note(21, 4.2, "again and again: solver, guidance")
  arrow(axes, 39, -2, 6)
  grid(axes, 51, -2, latent[::-1], "new latent")
  arrow(axes, 57, -2, 6)
  box(axes, 73, -2, "decoder", "autoencoder.py", BLUE)
  arrow(axes, 83, -2, 6)
  grid(axes, 95, -2, after, "new image")
  axes.set(xlim=(0, 114), ylim=(-10, 73), aspect="equal")
  axes.axis("off")
  figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
  draw("docs/method.svg")
