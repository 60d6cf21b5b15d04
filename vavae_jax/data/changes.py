"""Which pictures a training uses: noted in its workdir, and compared when it goes on or is judged.

One hash of all names and sizes decides whether two listings are equal. To count what differs, the
note has eight bytes for each picture: a hash of its name, and a few bits of its size and share.
"""

from __future__ import annotations

import base64
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import FrozenConfigDict

from vavae_jax.common.errors import InputError, printable
from vavae_jax.common.files import read_note
from vavae_jax.data import selection
from vavae_jax.data.sources import Source
from vavae_jax.data.sources.base import hash_names

NOTE = "pictures.json"
# The bits of a picture's eight bytes.
_NAME, _SIZE, _HELD_OUT = (np.uint64(x) for x in (2**64 - 2**16, 2**16 - 2, 1))


def check(workdir: Path, data: FrozenConfigDict, *, with_changes: bool = False) -> dict[str, Any]:
  """What the workdir of a training on `config.data` has to note in `NOTE`.

  `with_changes`: its source and its rule for held-out ones may be others; what moved is counted.

  Raises:
    InputError: the workdir has noted other pictures, and `data.changed` is not "allow".
  """
  path = workdir / NOTE
  noted = read_note(path, source=dict, valid_source=dict | None) if path.exists() else {}
  specs = {name: data[name] for name in ("source", "valid_source") if data[name]}
  notes = {}
  for name, spec in specs.items():
    source, before = selection.opened(spec), noted.get(name) or {}
    same = {"spec": spec, "listing": source.listing(), "pictures": len(source)}
    if name == "source":
      same["rule"] = [data.split, data.split_seed, data.held_out]
    if same.items() <= before.items():
      notes[name] = before
      continue
    held_out = selection.split(source, data)[1] if name == "source" else np.zeros(0, np.int64)
    notes[name] = {
      **same,
      "held_out": len(held_out),
      # An epoch stays as long as it was, so that stages of so many epochs end where they did.
      "epoch": before.get("epoch", len(source) - len(held_out)),
      "each": _pack(source, held_out),
      "named": source.has_names,
    }
    what = f"{spec} has other pictures than {path} notes"
    if before.get("spec") == spec and not _same_records(before, same):
      _report(what, before, notes[name], allowed=data.get("changed") == "allow")
    elif before and with_changes:
      _report(what, before, notes[name], allowed=True)
  return notes


def _pack(source: Source, held_out: np.ndarray) -> str:
  each = hash_names(source.keys()) & _NAME
  each |= (source.sizes().astype(np.uint64) << np.uint64(1)) & _SIZE
  each[held_out] |= _HELD_OUT
  return base64.b64encode(each.astype("<u8").tobytes()).decode()


def _report(what: str, before: Mapping[str, Any], now: Mapping[str, Any], *, allowed: bool) -> None:
  """Says what differs, if anything does, where that is allowed, or raises InputError."""
  try:
    difference = _difference(before, now)
  except (ValueError, LookupError, TypeError) as error:
    raise InputError(f"{what}, and how cannot be said, since that is damaged ({error}).") from error
  message = f"{what}: {difference}."
  if not allowed:
    raise InputError(
      f"{message} Bring those back, or give a new --workdir; a training alone goes on with these "
      "by --config.data.changed=allow, which notes them."
    )
  if difference:
    print(printable(f"warning: {message}"), file=sys.stderr)


def _same_records(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
  return all(one.get(key) == other.get(key) for key in ("listing", "pictures"))


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
  """Such as "2 added, 1 removed"."""
  packed = (base64.b64decode(note["each"], validate=True) for note in (before, now))
  old, new = (np.frombuffer(each, "<u8") for each in packed)
  common, here, there = np.intersect1d(old & _NAME, new & _NAME, return_indices=True)
  both = old[here], new[there]
  was, becomes = (each & _HELD_OUT for each in both)
  sizes = np.stack([each & _SIZE for each in both])
  counts = {
    "added": np.isin(new & _NAME, common, invert=True),
    "removed": np.isin(old & _NAME, common, invert=True),
    # Some kinds of sources know none.
    "of another size": sizes.all(0) & (sizes[0] != sizes[1]),
    "moved from the held-out ones to training": was > becomes,
    "moved from training to the held-out ones": was < becomes,
  }
  found = [f"{np.count_nonzero(x):,} {what}" for what, x in counts.items() if x.any()]
  if _same_records(before, now):
    return ", ".join(found)
  found = found or ["the same names, but in another order or with other contents"]
  if not now["named"]:
    found.append(
      "and others may have moved between training and the held-out ones: records without names are "
      "told apart by their positions"
    )
  return ", ".join(found)
