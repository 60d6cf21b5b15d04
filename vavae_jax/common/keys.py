"""What a setting may be: default, range or choices, and meaning of each, in one entry of a table.

`configs.base` has the tables of the trainings. What a package takes from anybody, such as a
solver's settings, it declares itself, and `configs.base` reads it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vavae_jax.common.errors import InputError

COUNT, MAYBE = "[1, 2e9]", "[0, 2e9]"  # steps are int32
DTYPES = ("float32", "bfloat16")  # of matrix products
LAST_SEED = 2**32 - 1
LONGEST_LIST, LONGEST_TEXT = 64, 4096
NOT_EMPTY = "not empty"
LARGEST_FLOAT = 3e38  # of float32, in which everything is computed
NAMES = {int: "integer", float: "number", str: "text"}


@dataclasses.dataclass(frozen=True)
class Key:
  """A setting.

  Attributes:
    default: its value, where nobody gives another.
    within: an interval such as "[0, 1)", NOT_EMPTY for a text, or all possible values, a list where
      others may join; for a list, of each item.
    text: what it means.
    kind: of the value, or of a list's items, where the default, None or (), does not show it.
    is_list: whether it is a list, likewise.
  """

  default: Any
  within: str | Sequence[Any] = ""
  text: str = ""
  kind: type | None = None
  is_list: bool = False

  def check(self, name: str, value: Any) -> str:
    """What is wrong with a value of this name; "" if nothing is."""
    fits = self._fits(value)
    if self._takes_list:
      fits = (
        isinstance(value, list | tuple)
        and len(value) <= LONGEST_LIST
        and all(self._fits(item) for item in value)
      )
    if fits or (value is None and self.default is None):
      return ""
    given = repr(value)
    given = given if len(given) < 80 else f"{given[:60]}... ({len(given)} characters)"
    return f"{name} is {given}; {self.needed()}."

  def needed(self) -> str:
    """What is possible, such as "give a number in [0, 1)"."""
    none = " or None" if self.default is None else ""
    if not isinstance(self.within, str):
      choices = ", ".join(str(choice) or '""' for choice in self.within)
      return f"choose {'some' if self._takes_list else 'one'} of {choices}{none}"
    if self._item is bool:
      return "give True or False"
    limits = f" in {self.within}" if self.within else ""
    if self.within == NOT_EMPTY:
      limits = f" that is {NOT_EMPTY}"
    name = NAMES[self._item]
    if self._takes_list:
      return f"give a list of {name}s{limits}{none}"
    return f"give {'an' if name[0] == 'i' else 'a'} {name}{limits}{none}"

  @property
  def _takes_list(self) -> bool:
    return self.is_list or isinstance(self.default, list | tuple)

  @property
  def _item(self) -> Any:
    return self.kind or type(self.default[0] if self._takes_list else self.default)

  def _fits(self, value: Any) -> bool:
    kind = self._item
    if type(value) is not kind and not (kind is float and type(value) is int):
      return False
    if not isinstance(self.within, str):
      return value in self.within
    if kind is str:  # no file has a name with a zero byte
      there = value != "" or self.within != NOT_EMPTY
      return there and len(value) <= LONGEST_TEXT and "\0" not in value
    whole = "[-2e9, 2e9]" if kind is int else "(-inf, inf)"
    return kind is bool or _contains(self.within or whole, value, kind)


def _contains(interval: str, value: float, kind: type) -> bool:
  """Whether a number, perhaps NaN, lies in an interval."""
  low, high = map(float, interval[1:-1].split(","))
  if kind is float and not -LARGEST_FLOAT < value < LARGEST_FLOAT:
    return False
  above = low <= value if interval[0] == "[" else low < value
  return above and (value <= high if interval[-1] == "]" else value < high)


def field(
  default: Any,
  within: str | tuple[Any, ...] = "",
  text: str = "",
  *,
  kind: type | None = None,
  is_list: bool = False,
  **about: Any,
) -> Any:
  """A field of a dataclass with such a key, by which `of` finds it; `about` is for others."""
  key = Key(default, within, text, kind, is_list)
  return dataclasses.field(default=default, metadata={"key": key, **about})


def of(options: Any) -> dict[str, Key]:
  """The keys of a dataclass, by name."""
  return {field.name: field.metadata["key"] for field in dataclasses.fields(options)}


def check(keys: Mapping[str, Key], given: Mapping[str, Any], prefix: str = "") -> None:
  """Raises InputError that names every given value which its key does not allow."""
  problems = (keys[name].check(prefix + name, value) for name, value in given.items())
  if wrong := [problem for problem in problems if problem]:
    raise InputError(" ".join(wrong))


def floats(value: Any, what: str) -> np.ndarray:
  """float32 of numbers, perhaps in lists of lists; InputError where they are no array."""
  try:
    return np.asarray(value, np.float32)
  except (TypeError, ValueError) as error:
    raise InputError(f"{what} is no array of numbers ({error}).") from error


def complete(table: Mapping[str, Any], given: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  """Values by a tree of keys: those that are given, and for the others the defaults.

  InputError for a key that is not in the table, or a value that it does not allow.
  """
  if unknown := sorted(given.keys() - table.keys()):
    raise InputError(f"{prefix}{unknown[0]} is unknown; known are {', '.join(sorted(table))}.")
  whole: dict[str, Any] = {}
  for name, key in table.items():
    if isinstance(key, Key):
      whole[name] = given.get(name, key.default)
      check({name: key}, {name: whole[name]}, prefix)
    elif isinstance(given.get(name, {}), Mapping):
      whole[name] = complete(key, given.get(name, {}), f"{prefix}{name}.")
    else:
      raise InputError(f"{prefix}{name} is {given[name]!r}; give an object of settings.")
  return whole
