"""FID of 50,000 samples on a slice: sampling, decoding and Inception's features, one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from ml_collections import ConfigDict

import configs.base
from launch.lab.plan.planning import Plan, plans
from launch.lab.plan.times import Times
from vavae_jax.autoencoder import downsampling


def plans_of(config: ConfigDict, topology: str, num_images: int) -> dict[str, list[Plan]]:
  """What was tried for each program, the chosen last.

  A device draws and decodes `config.sample.batch_size` images at once, or fewer if sampling does
  not fit. VA-VAE f16 decodes, with as many channels as the model has.
  """
  tokenizer = configs.base.tokenizer()
  model = tokenizer.model
  model.embed_dim = model.z_channels = config.model.in_channels
  side = config.model.input_size * downsampling(model.ch_mult, model.patch_size)
  tokenizer.data.image_size = side
  found = {"sample": list(plans(config, topology, "sample", search=True, num_images=num_images))}
  for what, coded in (("decode", found["sample"][-1].images), ("features", 0)):
    found[what] = list(plans(tokenizer, topology, what, num_images=num_images, coded=coded))
  return found


def together(found: Mapping[str, Plan]) -> Plan:
  """The programs as one that runs them in turn, for a batch of `found["sample"]`."""
  first = found["sample"]
  whole = dataclasses.replace(
    first,
    fits=all(one.fits for one in found.values()),
    needed=max(one.needed for one in found.values()),
    parts={name: int(one.needed) for name, one in found.items()},
    flops=sum(one.flops * first.images / one.images for one in found.values()),
    computed=sum(one.computed * first.images / one.images for one in found.values()),
    compile_seconds=sum(one.compile_seconds for one in found.values()),
    traffic={},
    operations=[],
    sources=[],
  )
  if not whole.fits:
    return dataclasses.replace(whole, seconds=None, hours=0.0, images_per_second=0.0)
  shares = [(x.seconds, first.images / x.images) for x in found.values() if x.seconds]
  seconds = Times(
    *(
      sum(getattr(one, field.name) * share for one, share in shares)
      for field in dataclasses.fields(Times)
    )
  )
  return dataclasses.replace(
    whole,
    seconds=seconds,
    hours=sum(one.hours for one in found.values()),
    images_per_second=first.images / seconds.estimate,
  )
