"""Image sources: labelled pictures by index, chosen by one string.

A new kind is a class in a file beside this one and an entry in `_KINDS`. The order of the records
is a function of the data alone, the same on every machine.
"""

from __future__ import annotations

import concurrent.futures
import sys
from collections.abc import Callable
from pathlib import Path

from vavae_jax.common.errors import InputError, printable
from vavae_jax.common.files import at_home
from vavae_jax.data.order import spread
from vavae_jax.data.sources.archives import open_tar, open_zip
from vavae_jax.data.sources.base import Source, Unreadable
from vavae_jax.data.sources.datasets import HuggingFace, TensorFlowDatasets
from vavae_jax.data.sources.files import Embedded, Folder
from vavae_jax.data.sources.records import Records
from vavae_jax.data.sources.tolerant import Tolerant

__all__ = ("Source", "Tolerant", "Unreadable", "check_readable", "open_source")

# What stands before the colon -> (how it is opened, how the whole is written).
_KINDS: dict[str, tuple[Callable[[str], Source], str]] = {
  "embedded": (Embedded, "embedded:emoji"),
  "folder": (lambda rest: Folder(Path(rest)), "folder:DIR"),
  "zip": (open_zip, "zip:FILE"),
  "tar": (open_tar, "tar:FILES"),
  "tfds": (TensorFlowDatasets, "tfds:NAME/SPLIT"),
  "arrayrecord": (Records, "arrayrecord:DIR"),
  "hf": (HuggingFace, "hf:PATH"),
}


def open_source(spec: str) -> Source:
  """The source that a configuration names; InputError if there is nothing usable.

  There are "embedded:emoji", the pictures of the package; "folder:DIR" with class folders;
  "zip:FILE" or "tar:FILES", one or more archives by a pattern, read in place; "tfds:NAME/SPLIT",
  prepared by tensorflow-datasets as ArrayRecord; "arrayrecord:DIR", prepared by `launch.prepare`;
  "hf:PATH", parquet files of a Hugging Face data set, or of OWNER/NAME on the hub.
  """
  kind, _, rest = spec.partition(":")
  if kind not in _KINDS or not rest:
    known = ", ".join(form for _, form in _KINDS.values())
    raise InputError(f"The image source is {spec!r}; choose one of {known}.")
  source = _KINDS[kind][0](at_home(rest))
  if source.beside and spec not in _noted:
    _noted.add(spec)
    print(printable(f"note: beside the pictures of {spec}: {source.beside}"), file=sys.stderr)
  return source


_noted: set[str] = set()  # the sources whose notes this process has said


def check_readable(source: Source, limit: int = 2_000) -> None:
  """Decodes a source's pictures, or `limit` of them spread over it; InputError if one is damaged.

  A damaged one beyond those is reported when its turn comes.
  """
  chosen = spread(len(source), limit)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for _ in pool.map(lambda index: source.picture(int(index)) and None, chosen):
      pass
