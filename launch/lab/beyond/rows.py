"""The rows of `launch.lab.beyond` by their names, and the configurations that they make."""

from __future__ import annotations

import operator
from collections.abc import Iterable

from ml_collections import ConfigDict, FrozenConfigDict

import lightningdit_jax.checks
from configs.lab import beyond, dilemma
from configs.lab.beyond import Row
from launch import tasks
from vavae_jax.common.errors import InputError

_CHANGES = tuple(map(operator.attrgetter, ("training", "tokenizer", "sampling")))


def together(config: FrozenConfigDict, names: Iterable[str]) -> str:
  """As many of these rows as go together, those first in order, joined by +."""
  kept = ""
  for name in names:
    wanted = f"{kept}+{name}" if kept else name
    try:
      diffusion_of(config, wanted)
      tokenizer_of(config, wanted)
    except InputError:  # such as of an early head and routed tokens
      continue
    kept = wanted
  return kept


def row_of(name: str) -> Row:
  """A row by its name, or the one that has all changes of some, joined by +."""
  rows = [beyond.ROWS[each] for each in name.split("+")]

  training, tokenizer, sampling = (
    {key: x for row in rows for key, x in changes(row).items()} for changes in _CHANGES
  )
  return Row(
    training,
    tokenizer,
    sampling,
    guide=any(row.guide for row in rows),
    longer=max(row.longer for row in rows),
    refines=any(row.refines for row in rows),
    control=any(row.control for row in rows),
  )


def owner_of(name: str) -> str:
  """The row whose trainings a row samples: itself, or the first that trains likewise."""

  def trained(row: Row) -> tuple[object, ...]:
    return dict(row.training), dict(row.tokenizer), row.longer, row.refines

  own = trained(row_of(name))
  return next((other for other, row in beyond.ROWS.items() if trained(row) == own), name)


def diffusion_of(config: FrozenConfigDict, name: str) -> FrozenConfigDict:
  """The configuration of a row's diffusion models, with its sampling; InputError if it is wrong."""
  row, found = row_of(name), beyond.diffusion(config.size, shape_of(config))
  changes = {**row.training, **{f"sample.{key}": x for key, x in row.sampling.items()}}
  _update(found, changes, name)
  resolved = tasks.frozen(found)
  lightningdit_jax.checks.check_model(resolved)
  return resolved


def shape_of(config: FrozenConfigDict) -> str:
  """Of the latents, "fPdZ"."""
  return str(config.tokenizer).split("/")[1]


def tokenizer_of(config: FrozenConfigDict, name: str) -> FrozenConfigDict:
  """The configuration of a row's tokenizer; InputError if it is wrong."""
  try:
    found = dilemma.tokenizer(
      "tiny" if config.size == "tiny" else "cifar", *config.tokenizer.split("/")
    )
  except (TypeError, ValueError, KeyError) as error:
    raise InputError(
      f"config.tokenizer is {config.tokenizer!r}, which is not VARIANT/fPdZ/klW: {error}"
    ) from error
  found.data.source = config.source
  _update(found, dict(row_of(name).tokenizer), name)
  resolved = tasks.frozen(found)
  if row_of(name).tokenizer:
    tasks.of(found).check(resolved)
  return resolved


def _update(config: ConfigDict, changes: dict[str, object], name: str) -> None:
  try:
    config.update_from_flattened_dict(changes)
  except (KeyError, AttributeError, TypeError) as error:
    raise InputError(f"The row {name} has a change that is not possible: {error}") from error
