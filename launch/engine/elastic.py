"""A run goes on with another number of devices: the batch stays, and so does a device's part of it.

What memory holds shows where a run begins: so many records at once on each device. With fewer
devices the batch goes through in more parts (`accumulate_steps`), with more in fewer, and the
update is the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from launch.engine import console, processes
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import read_note

NOTE = "devices.json"  # in the workdir: of the start from which on `accumulate_steps` was given so


def adapted(config: ConfigDict, workdir: Path) -> tuple[ConfigDict, dict[str, int]]:
  """(the configuration for the devices that there are, a note for the workdir).

  Raises:
    InputError: the workdir has a run whose batch these devices cannot share.
  """
  count, batch = jax.device_count(), config.batch_size
  given = config.get("accumulate_steps", 1)
  own = {"devices": count, "accumulate_steps": given, "batch_size": batch}
  path = workdir / NOTE

  def noted() -> dict[str, Any]:
    kinds: dict[str, Any] = dict.fromkeys(own, int)
    return read_note(path, **kinds) if path.exists() else {}

  note = processes.first_does(noted)
  if {**note, "devices": count} != own:
    return config, own
  if batch % count:
    fitting = [x for x in range(1, batch + 1) if not batch % x]
    near = [max(x for x in fitting if x < count), min((x for x in fitting if x > count), default=1)]
    raise InputError(
      f"{workdir} has a run with config.batch_size={batch}, which the {count} devices here do not "
      f"divide; it keeps its batch, so go on with another number of devices, such as {near[0]} or "
      f"{near[1]}, or begin a new --workdir."
    )
  before, share = note["devices"], batch // count
  if count == before or "accumulate_steps" not in config:
    return config, note
  rows = max(batch // before // given, 1)
  parts = next(x for x in range(1, share + 1) if share % x == 0 and share // x <= rows)
  console.say(
    f"devices: {count}, {before} before; config.accumulate_steps is {parts}, so that each has "
    f"{share // parts} of a batch's {batch} records at once, {rows} before"
  )
  if parts == given:
    return config, note
  config = config.copy_and_resolve_references()
  config.accumulate_steps = parts
  return config, note
