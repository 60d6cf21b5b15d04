"""Time and memory of a number's stages, by the lab's plan, which compiles them for a slice."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from launch.engine import console
from launch.reproduce.given import Given
from launch.reproduce.recipes import config_of
from launch.reproduce.records import Record
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import read_note

_CHIPS = {"TPU v5 lite": "v5e", "TPU v6 lite": "v6e", "TPU v5": "v5p", "TPU v4": "v4"}
_CHIPS |= {"TPU7x": "tpu7x", "NVIDIA H100": "h100", "NVIDIA H200": "h200"}


def here() -> str:
  """This machine's devices as `launch.lab.plan` calls them; "" where it does not know such."""
  devices = jax.devices()
  kind = devices[0].device_kind
  name = next((chip for known, chip in _CHIPS.items() if kind.startswith(known)), "")
  if not name or name[0] == "h":
    return name and f"{name}:{len(devices)}"
  sides = [max(ends) + 1 for ends in zip(*(device.coords for device in devices), strict=True)]
  return f"{name}:{'x'.join(map(str, sides[: 2 if name in ('v5e', 'v6e') else 3]))}"


def _planned(record: Record, given: Given) -> Iterator[tuple[str, str, dict[str, Any], int]]:
  """(what, recipe, changes, number of pictures) of each program of a number, 0: ImageNet's."""
  if record.recipe:
    if given.train and not given.latents:
      yield "encode", record.tokenizer.recipe, {}, record.pictures.count
    if given.train:
      yield "train", record.recipe, dict(record.changes), record.pictures.count
    count = config_of(record.recipe, record.changes).published.num_samples
    yield "fid50k", record.recipe, dict(record.changes), count
    return
  if given.train:
    yield "train", record.tokenizer.recipe, {}, record.pictures.count
  for what in ("encode", "decode", "features"):
    yield what, record.tokenizer.recipe, {}, record.validation.count


def show(record: Record, given: Given, workdir: Path, asked: str = "") -> None:
  """Prints time and memory of the stages on the devices asked for, or on these, by the plan.

  It compiles them once, in the first process. InputError: it refuses the devices asked for.
  """
  if jax.process_index():
    return
  if not (topology := asked or here()):
    console.say("No TPU or GPU that the plan knows: no estimate. --topology=v6e:4x4 asks for one.")
    return
  rows = []
  for what, recipe, changes, count in _planned(record, given):
    flags = [f"--config.{name}={value}" for name, value in changes.items()]
    # The other programs are of no configuration that a person sets.
    flags += [f"--config.{word}" for word in given.set if what in ("train", "fid50k")]
    settings = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    path = workdir / f"plan_{what}_{topology.replace(':', '_')}_{settings}.json"
    words = [f"--config={recipe}", *flags, f"--topology={topology}", f"--what={what}", "--search"]
    words += [f"--num_images={count}", f"--output={path}"]
    if not path.exists():
      console.say(f"planning {what} for {topology}, once ...")
      done = subprocess.run(
        [sys.executable, "-m", "launch.lab.plan", *words], capture_output=True, text=True
      )
      if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        if asked:
          raise InputError(lines[-1].removeprefix("error: "))
        rows.append((what, "no estimate", lines[-1], ""))
        continue
    chosen = read_note(path, plans=list)["plans"][-1]
    needed = " ".join(f"--set={key}={value}" for key, value in chosen["settings"].items())
    memory = f"{chosen['needed'] / 2**30:.1f} of {chosen['available'] / 2**30:.1f} GiB"
    hours = f"{chosen['hours']:.1f} hours" if chosen["fits"] else "does not fit"
    rows.append((what, hours, memory, needed or "as given"))
  header = ("stage", "time", "memory of a device", "settings")
  console.table(f"Estimates for {topology}, by the compiler, not measured", header, rows)
