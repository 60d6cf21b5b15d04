"""Makes a teacher's features of all pictures, which launch.train does too where they are missing.

  python -m launch.cached_features --config=RECIPE --config.teacher.cache=FOLDER

Several trainings that begin together need them before.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from absl import flags
from ml_collections import FrozenConfigDict

import vavae_jax.training
from launch import tasks
from launch.engine import configuration, console, processes
from launch.engine.ownership import owned
from launch.engine.parts import ROWS, Parts, make_rows, rows_of
from vavae_jax.common.errors import InputError
from vavae_jax.common.files import check_free, remove_folder, remove_partial
from vavae_jax.data import feature_cache, images, selection, sources
from vavae_jax.frozen import uses_teacher


def make(config: FrozenConfigDict) -> None:
  """Runs the teacher over all pictures, once and for all; processes share them."""
  vavae_jax.training.check(config)
  source, indices = selection.training_pictures(config)
  path = feature_cache.place_of(config, source, indices)
  if not processes.first_does(path.is_file):
    with owned(path, beside=True):
      _make(config, source, indices, path)
  processes.check_seen([path])
  console.say(f"the teacher's features are in {path}")


def _make(
  config: FrozenConfigDict, source: sources.Source, indices: np.ndarray, path: Path
) -> None:
  run, size = feature_cache.teacher_of(config)
  parts = Parts(path.with_suffix(".parts"), len(indices), feature_cache.BATCH, ROWS)

  def begin() -> None:
    needed = size * (2 * len(indices) - sum(map(len, parts.there())))
    what = "for the features in parts and as one file; give another config.teacher.cache, or "
    check_free(path.parent, needed, f"{what}leave it empty")
    parts.folder.mkdir(parents=True, exist_ok=True)
    remove_partial(path.parent, path.name)  # left by a run that was killed

  def finish() -> None:
    parts.check_complete()
    feature_cache.write(config, source, indices, rows_of(parts, len(indices)))
    remove_folder(parts.folder)

  def compute(items: np.ndarray) -> np.ndarray:
    return run(images.load_crops(source, indices[items], config.data.image_size))

  processes.first_does(begin)
  make_rows(parts, compute, jax.local_device_count(), "teacher's features")
  processes.wait_for_all()
  processes.first_does(finish)


def main() -> None:
  config = tasks.frozen(FLAGS.config)
  if config.task != "tokenizer" or not uses_teacher(config) or not config.teacher.cache:
    raise InputError("Give --config of a tokenizer with a teacher, and --config.teacher.cache.")
  make(config)


FLAGS = flags.FLAGS

if __name__ == "__main__":
  configuration.define_flag("configs/NAME.py or configs/NAME.py:ARGUMENT, of a tokenizer")
  flags.mark_flag_as_required("config")
  console.run_command(main, several=True)
