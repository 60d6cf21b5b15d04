r"""VA-VAE on ImageNet 256 as published: f16, three stages in one run, aligned with DINOv2-L.

  python -m launch.train --config=configs/vavae_f16d32.py --workdir=runs/vavae \
    --config.data.source=folder:data/imagenet/train --config.teacher.weights=FILE

Needed beside the pictures: the teacher's file and the two of LPIPS (`config.perceptual`); a missing
one is named, with where it is published. 130 epochs are 650,593 batches of 256; the authors took
32 GPUs.

Arguments, joined by commas in any order, each changing one thing (tables 2, 4 and 5 of the paper):

  f16d16 | f16d32 | f16d64     latent channels; d16, d32, d64 for short
  sd_f8d4 | mar_f16d16         the SD-VAE's and MAR-VAE's architecture; the former has no teacher
                               unless one is named, which then sees pictures twice as large
  dinov2 | mae | clip | sam    the teacher, its large size
  plain                        none: an LDM tokenizer
  130ep | 50ep                 three stages, or one of 50 epochs with margins, as in the tables
  no_cos | no_distmat          without that part of the alignment
  no_margin                    without margins
  decoder                      train the decoder alone, of `config.init_from`

A released tokenizer on other pictures: `--config.init_from=FILE --config.data.source=folder:DIR`.

Paper, table 2 (rFID, PSNR, LPIPS, SSIM): d16 .55 25.29 .147 .69; d32 .28 27.96 .096 .79; d64 .14
30.71 .055 .87. Not reproduced here yet.
"""

from ml_collections import ConfigDict

from configs import base
from vavae_jax.autoencoder import PRESETS, downsampling, preset

SHORT = {"d16": "f16d16", "d32": "f16d32", "d64": "f16d64"}
TEACHERS = {
  "dinov2": "dinov2_vitl14",
  "mae": "mae_vitl16",
  "clip": "clip_vitl14",
  "sam": "sam_vitl16",
  "plain": "",
}
STAGES = {
  "130ep": {},
  "50ep": {
    "epochs": (50.0,),
    "vf_weight": (0.1,),
    "cos_margin": (0.5,),
    "distmat_margin": (0.25,),
    "disc_start": (2_500,),
  },
}
PLAIN = ("sd_f8d4",)  # published without a teacher
REMOVED = ("no_cos", "no_distmat", "no_margin")
# Of each only one can be meant.
GROUPS = ((*PRESETS, *SHORT), tuple(TEACHERS), tuple(STAGES))
WORDS = (*PRESETS, *SHORT, *TEACHERS, *STAGES, *REMOVED, "decoder")


def get_config(argument: str = "") -> ConfigDict:
  """The published recipe, changed by the words of the argument."""
  words = [word for word in argument.split(",") if word]
  if unknown := [word for word in words if word not in WORDS]:
    raise ValueError(f"{unknown[0]!r} is none of: {', '.join(WORDS)}.")
  chosen = [[word for word in words if word in group] for group in GROUPS]
  for given in chosen:
    if len(given) > 1:
      raise ValueError(f"{' and '.join(given)} exclude each other; give one of them.")
  architecture, teacher, stages = ("".join(given) for given in chosen)
  config = base.tokenizer()
  if architecture:
    config.model.update(preset(SHORT.get(architecture, architecture)))
    config.model.z_channels = config.model.embed_dim
  config.teacher.name = TEACHERS[teacher or ("plain" if architecture in PLAIN else "dinov2")]
  if config.teacher.name:
    # Teachers look at cells of 16 pixels; where the latents' are smaller, they see larger pictures.
    config.teacher.scale = max(16 // downsampling(config.model.ch_mult, config.model.patch_size), 1)
  config.stages.update(STAGES[stages or "130ep"])
  config.train = "decoder" if "decoder" in words else "all"
  if "no_cos" in words:
    config.loss.cos_weight = 0.0
  if "no_distmat" in words:
    config.loss.distmat_weight = 0.0
  if "no_margin" in words:
    none = (0.0,) * len(config.stages.epochs)
    config.stages.update(cos_margin=none, distmat_margin=none)
  return config
