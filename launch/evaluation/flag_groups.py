"""The flags of `launch.evaluate`, in groups that its evaluations share."""

from __future__ import annotations

from absl import flags

import launch.sample
from launch.evaluation import probe as probes
from launch.evaluation import reconstruction as reconstructions
from launch.evaluation.cells import LEAST
from launch.evaluation.features import PROTOCOLS
from lightningdit_jax import transport
from vavae_jax import folder
from vavae_jax.common.keys import LAST_SEED
from vavae_jax.data import images

# Flags that are defined here are those of the command that asks for them.
flags.disclaim_key_flags()


def reference() -> None:
  flags.DEFINE_enum("protocol", "adm", PROTOCOLS, "Feature network and how pictures come to it.")
  flags.DEFINE_string("weights", "", "Weights of the protocol's network.")
  text = "Real pictures, or an npz of their mu and sigma."
  flags.DEFINE_string("reference", None, text, required=True)
  text = "ADM's crop of folders and sources; 0: the size of the samples."
  flags.DEFINE_integer("image_size", 0, text, lower_bound=0)
  flags.DEFINE_string(
    "tokenizer", "", f"The tokenizer, if the latents do not name it: {folder.TAKEN}"
  )


def drawn() -> None:
  launch.sample.define_flags(50_000, least=2)
  flags.DEFINE_boolean("precision_recall", True, "Keeps all features in memory.")
  text = "Workdir of a second classifier, which judges the same samples."
  flags.DEFINE_string("second_weights", "", text)
  text = "Real pictures, or their statistics by the second classifier; --reference if none."
  flags.DEFINE_string("second_reference", "", text)


def grid() -> None:
  flags.DEFINE_string("workdir", None, f"The diffusion model: {folder.TAKEN}", required=True)
  flags.DEFINE_multi_string("grid", [], "SETTING=VALUE,VALUE; once for each setting.")


def generation() -> None:
  flags.DEFINE_string("samples", "", "An npz, a folder, a latent store or an image source.")
  flags.DEFINE_string("workdir", "", f"A diffusion model that draws the samples: {folder.TAKEN}")
  text = "A latent store; samples are of one Gaussian for each class, fitted to its latents."
  flags.DEFINE_string("gaussians", "", text)
  flags.DEFINE_integer(
    "bootstrap", 0, "Resamples for a confidence interval; 0: none, 20 will do.", lower_bound=0
  )
  flags.DEFINE_boolean("fid_infinity", False, "Extrapolate to infinitely many samples.")


def reconstruction() -> None:
  none = ("none", *PROTOCOLS)
  flags.DEFINE_enum("protocol", "adm", none, "Feature network of the rFID; none: no rFID.")
  flags.DEFINE_string("weights", "", "Weights of the protocol's network.")
  flags.DEFINE_string("workdir", None, f"The tokenizer: {folder.TAKEN}", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not given.")
  flags.DEFINE_string("source", "", "Pictures to rebuild; the tokenizer's held-out ones if none.")
  flags.DEFINE_enum("crop", "resize", tuple(images.FIXED_CROPS), "resize: the reference's.")
  text = "Side of the pictures; 0: as in training."
  flags.DEFINE_integer("image_size", 0, text, lower_bound=0)
  flags.DEFINE_integer("limit", 0, "Number of pictures, by a seeded choice; 0: all.", lower_bound=0)
  flags.DEFINE_enum("posterior", "sample", reconstructions.POSTERIORS, "sample: the reference's.")
  flags.DEFINE_integer(
    "seed", 0, "Seed of the posterior's noise.", lower_bound=0, upper_bound=LAST_SEED
  )
  flags.DEFINE_string("lpips_vgg", "", "LPIPS' VGG16; by default the training's file.")
  flags.DEFINE_string("lpips_heads", "", "LPIPS' heads, if they are in another file.")


def probe() -> None:
  flags.DEFINE_enum("protocol", "none", ("none", *PROTOCOLS), "Who judges samples; none: nobody.")
  flags.DEFINE_string("weights", "", "Weights of the protocol's network.")
  flags.DEFINE_string("reference", "", "Real pictures, or an npz of their mu and sigma.")
  flags.DEFINE_string("workdir", None, f"The tokenizer: {folder.TAKEN}", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint; the newest if not given.")
  flags.DEFINE_string("source", "", "Pictures; those of the tokenizer's training if none.")
  flags.DEFINE_integer("num_pictures", probes.COUNT, "How many of them.", lower_bound=probes.LEAST)
  text = "JSON of another probe, or a folder of such, for the table; more than once."
  flags.DEFINE_multi_string("among", [], text)


def latents() -> None:
  flags.DEFINE_string("latents", None, "A latent store, or a file of cells.", required=True)
  flags.DEFINE_integer("runs", 10, "Runs of t-SNE, over which figures are averaged.", lower_bound=1)
  flags.DEFINE_integer("cells", 10_000, "Latent cells in each run.", lower_bound=LEAST)
  flags.DEFINE_integer("seed", 0, "Seed of the first run.", lower_bound=0, upper_bound=LAST_SEED)
  flags.DEFINE_enum("path", "Linear", tuple(transport.PATHS), "Path for signal to noise.")


def frontier() -> None:
  flags.DEFINE_multi_string("point", [], "NAME:RECONSTRUCTION.json:GENERATION.json of a tokenizer.")
  flags.DEFINE_string("x", "psnr", "Figure of reconstruction for the frontier.")
  flags.DEFINE_string("y", "fid", "Figure of generation for the frontier.")
