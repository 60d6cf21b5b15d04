"""Prepares a tiny data set by tensorflow-datasets as ArrayRecord, without TensorFlow.

python -m tests.make_tfds FOLDER
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from tests.test_sources import CLASSES, FILES


class Tiny(tfds.core.GeneratorBasedBuilder):
  """The pictures of test_sources."""

  VERSION = tfds.core.Version("1.0.0")
  pkg_dir_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    label = tfds.features.ClassLabel(names=CLASSES)
    features = tfds.features.FeaturesDict(
      {"image": tfds.features.Image(shape=(None, None, 3)), "label": label}
    )
    return tfds.core.DatasetInfo(builder=self, features=features)

  def _split_generators(self, manager: Any) -> dict[str, Any]:
    return {"train": self._generate_examples()}

  def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, data in FILES.items():
      yield name, {"image": io.BytesIO(data), "label": name.partition("/")[0]}


if __name__ == "__main__":
  Tiny(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
  assert "tensorflow" not in sys.modules
